"""The adapters of a handle by name: some stay in memory, and a cache keeps the others."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from regraft.errors import UsageError
from regraft.runtime.forward.selection import Named, RowSelection, Selection
from regraft.runtime.model.matching import LiveAdapter
from regraft.runtime.store.cache import AdapterCache
from regraft.runtime.store.leases import Lease

K = TypeVar("K")
V = TypeVar("V")

KEPT_MIXES = 64
"""How many mixes of adapters are kept, so that choosing one again costs nothing."""

KEPT_ROWS = 2
"""How many lists of rows are kept; each has copies of its adapters' factors, side by side."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory, and what it does to the model when it answers alone."""

    adapter: LiveAdapter
    selection: Selection


class Chosen(Mapping[str, LoadedAdapter]):
    """Adapters that were chosen; those of a cache stay in memory until it is released.

    Attributes:
        selection: what they do together, once that is known.
    """

    def __init__(self, held: Mapping[str, LoadedAdapter], lease: Lease[Any] | None) -> None:
        self._held, self._lease = held, lease
        self.selection: Selection | None = None

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __enter__(self) -> Chosen:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def parts(self, names: Named) -> list[tuple[LiveAdapter, float]]:
        """Return some of the adapters themselves, each with its weight."""
        return [(self._held[name].adapter, weight) for name, weight in names]

    def keep(self) -> None:
        """Let it be released by another thread than this one."""
        if self._lease is not None:
            self._lease.keep()

    def release(self) -> None:
        """Let the cache drop them when it needs room."""
        if self._lease is not None:
            self._lease.release()


class Library:
    """Adapters by name; safe to use from several threads."""

    def __init__(self, cache: AdapterCache | None) -> None:
        self.cache = cache
        self._held: dict[str, LoadedAdapter] = {}
        self._names: dict[str, bool] = {}  # whether the cache keeps it
        self._mixes: OrderedDict[Named, Selection] = OrderedDict()
        self._rows: OrderedDict[tuple[tuple[Named, ...], int], RowSelection] = OrderedDict()
        # Whatever is kept of a mix is of the adapters that have its names now. ``make`` is called
        # under it, and may come back for the mixes of rows, in the same thread.
        self._lock = threading.RLock()
        self._is_closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order in which they came."""
        return tuple(self._names)

    def resident(self) -> list[LiveAdapter]:
        """Return the adapters that stay in memory."""
        return [held.adapter for held in list(self._held.values())]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable tensors that stay in memory, by the adapter's name and their key.

        What several keys share comes once.
        """
        seen: set[int] = set()
        for adapter in self.resident():
            for key, tensor in adapter.tensors.items():
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    if id(tensor) not in seen:
                        yield f"{adapter.name}.{key}", tensor
                    seen.add(id(tensor))

    def check_new(self, name: str) -> None:
        """Refuse a name that is taken.

        Raises:
            UsageError: it is.
        """
        if name in self._names:
            raise UsageError(
                "there is an adapter of this name already", where=repr(name),
                hint="Choose another name, or delete_adapter(name) first",
            )  # fmt: skip

    def check_known(self, names: Sequence[str]) -> None:
        """Refuse names that nothing has.

        Raises:
            UsageError: there are some; all are listed.
        """
        unknown = [name for name in names if name not in self._names]
        if unknown and self._is_closed:
            raise UsageError(
                "the adapters were taken off this model", where=", ".join(map(repr, unknown)),
                hint="regraft.attach(model) attaches adapters again, with a handle of their own",
            )  # fmt: skip
        if unknown:
            known = list(self._names)
            shown = ", ".join(map(repr, known[:20])) + (", ..." if len(known) > 20 else "")
            raise UsageError(
                "there is no adapter of this name", where=", ".join(map(repr, unknown)),
                expected=shown or "one that was loaded",
                hint="load_adapter(source, name) loads one",
            )  # fmt: skip

    def add(self, held: LoadedAdapter) -> None:
        """Take an adapter that stays in memory.

        Raises:
            UsageError: its name is taken.
        """
        with self._lock:
            self.check_new(held.adapter.name)
            self._held[held.adapter.name] = held
            self._names[held.adapter.name] = False

    def register(
        self,
        name: str,
        read: Callable[[], Any],
        nbytes: int,
        place: Callable[[Any], LoadedAdapter] | None = None,
    ) -> None:
        """Take an adapter that the cache reads when it is asked for.

        Args:
            name: what it is called.
            read: reads it; without ``place`` it returns what is held.
            nbytes: the bytes of its tensors.
            place: brings what was read to the model's device.

        Raises:
            UsageError: its name is taken.
        """
        if self.cache is None:
            raise ValueError("there is no cache")
        with self._lock:
            self.check_new(name)
            self.cache.register(name, read, nbytes, place)
            self._names[name] = True

    def remove(self, name: str) -> None:
        """Let go of an adapter, and of the mixes that it is part of.

        Raises:
            UsageError: there is none of this name.
        """
        with self._lock:
            self.check_known([name])
            if self._names.pop(name) and self.cache is not None:
                self.cache.unregister(name)
            self._held.pop(name, None)
            for mix in [mix for mix in self._mixes if name in dict(mix)]:
                del self._mixes[mix]
            for rows in [each for each in self._rows if any(name in dict(mix) for mix in each[0])]:
                del self._rows[rows]

    def close(self) -> None:
        """Let go of all, for good."""
        self._is_closed = True
        for name in self.names:
            self.remove(name)

    def choose(self, names: Sequence[str]) -> Chosen:
        """Return adapters by name, to be released when they are not used any more.

        Raises:
            UsageError: a name is not known.
            MemoryCapError: the cache has no room for them.
        """
        while True:
            self.check_known(names)
            try:
                return self._chosen(names)
            except KeyError:  # another thread deletes one of them; it may load it again
                continue

    def _chosen(self, names: Sequence[str]) -> Chosen:
        known = self._names
        cached = [name for name in names if known[name]]
        lease = self.cache.lease(cached) if cached and self.cache is not None else None
        there = lease.values if lease is not None else {}
        held = {name: there[name] if name in there else self._held[name] for name in names}
        return Chosen(held, lease)

    def mix(self, parts: Named, chosen: Chosen, make: Callable[[], Selection]) -> Selection:
        """Return what a mix does; kept, unless the cache might drop an adapter of it.

        Args:
            parts: the mix.
            chosen: its adapters, as they were chosen.
            make: finds out what they do together.
        """
        return self._kept(self._mixes, KEPT_MIXES, parts, [parts], chosen, make)

    def rows(
        self,
        of_row: tuple[Named, ...],
        repeats: int,
        chosen: Chosen,
        make: Callable[[], RowSelection],
    ) -> RowSelection:
        """Return what answers for each row; kept in the same way."""
        return self._kept(self._rows, KEPT_ROWS, (of_row, repeats), of_row, chosen, make)

    def _kept(
        self, kept: OrderedDict[K, V], most: int, key: K, mixes: Sequence[Named], chosen: Chosen,
        make: Callable[[], V],
    ) -> V:  # fmt: skip
        names = {name for parts in mixes for name, _ in parts}
        with self._lock:
            # What is kept is of the adapters that have these names now. Those that were chosen
            # may be others: deleted since, and perhaps loaded again under the same name.
            is_theirs = all(self._held.get(name) is chosen[name] for name in names)
            found = kept.get(key) if is_theirs else None
            if found is None:
                found = make()
            if is_theirs:
                kept[key] = found
                kept.move_to_end(key)
                while len(kept) > most:
                    kept.popitem(last=False)
        return found
