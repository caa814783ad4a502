"""Things within a number of bytes: what is leased stays, of the rest the longest unused goes first.

It knows nothing of adapters. A thing is registered with its size and a function that loads it; a
lease of some names loads what is not there, and keeps all of them until it is released.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

from regraft.errors import MemoryCapError, Problem, UsageError

T = TypeVar("T")

NOBODY = 0
"""The owner of leases that no thread is expected to release; no thread has this number."""


@dataclass(eq=False)
class Entry(Generic[T]):
    """A thing that can be loaded.

    Attributes:
        name: what it is asked for by.
        load: makes it.
        nbytes: the bytes it is counted with.
        users: how many leases each thread has on it.
        value: the thing, while it is loaded.
        held: whether its bytes are counted now; from before it is loaded until it is dropped.
        loading: held by the thread that loads it.
    """

    name: str
    load: Callable[[], T]
    nbytes: int
    users: Counter[int] = field(default_factory=Counter)
    value: T | None = None
    held: bool = False
    loading: threading.Lock = field(default_factory=threading.Lock)


class Lease(Generic[T]):
    """Some things that stay loaded until this is released; a context manager.

    Attributes:
        values: the things by name.
    """

    def __init__(self, store: Store[T], entries: Sequence[Entry[T]], owner: int) -> None:
        self._store, self._entries, self._owner = store, tuple(entries), owner
        self._released = False
        self.values: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        return self.values[name]

    def keep(self) -> None:
        """Say that this is held until further notice, so that nobody waits for its release."""
        if not self._released:
            self._store._disown(self._entries, self._owner)
            self._owner = NOBODY

    def release(self) -> None:
        """Give the things back; a second time does nothing."""
        if not self._released:
            self._released, self.values = True, {}
            self._store._give_back(self._entries, self._owner)

    def __enter__(self) -> Lease[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.release()


class Store(Generic[T]):
    """Things by name within a cap, for any number of threads.

    Attributes:
        max_bytes: the cap.
        timeout: seconds that a lease waits for room.
        hits, misses: how often a name that was asked for was there, and was not.
        evictions: how many things were dropped to make room.
        nbytes, peak_bytes: what is counted now, and the most that ever was.
    """

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self.hits = self.misses = self.evictions = self.nbytes = self.peak_bytes = 0
        self._entries: dict[str, Entry[T]] = {}
        self._idle: OrderedDict[Entry[T], None] = OrderedDict()
        self._idle_bytes = 0
        self._busy: set[Entry[T]] = set()
        self._owners: Counter[int] = Counter()
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    def register(self, name: str, load: Callable[[], T], nbytes: int) -> None:
        """Make a name known.

        Args:
            name: what it will be asked for by.
            load: makes the thing; called by one thread at a time, again after each eviction.
            nbytes: the bytes it takes once it is loaded.

        Raises:
            UsageError: the name is taken.
        """
        with self._changed:
            if name in self._entries:
                raise UsageError("the cache has an adapter of this name", where=name,
                                 hint="Give it another name, or delete the other one")  # fmt: skip
            self._entries[name] = Entry(name, load, nbytes)

    def unregister(self, name: str) -> None:
        """Forget a name. Who leases it keeps it, and its bytes count until then."""
        with self._changed:
            entry = self._entry(name)
            del self._entries[name]
            if entry in self._idle:
                self._drop(entry)
                self._changed.notify_all()

    def names(self) -> tuple[str, ...]:
        """Return the names of everything that is registered."""
        with self._changed:
            return tuple(self._entries)

    def loaded(self) -> tuple[str, ...]:
        """Return the names of what is loaded now."""
        with self._changed:
            return tuple(n for n, entry in self._entries.items() if entry.value is not None)

    def lease(self, names: Sequence[str], *, counted: bool = True) -> Lease[T]:
        """Load what is missing of some names, all or none, and keep them until it is released.

        Room is taken for all of them at once, before any is loaded. Where it is lacking and other
        threads could make it, this waits; whoever waited longest goes first.

        Args:
            names: what to lease; one name may come several times.
            counted: whether hits and misses are counted.

        Raises:
            UsageError: a name is not known.
            MemoryCapError: they do not fit beside what cannot go.
            Exception: whatever ``load`` raises; nothing is leased then.
        """
        return self._loaded(self._take(names, self.timeout, counted))

    def try_lease(self, names: Sequence[str], *, counted: bool = True) -> Lease[T] | None:
        """Return a lease as :meth:`lease` does, or None if there is no room right now."""
        try:
            entries = self._take(names, 0.0, counted)
        except MemoryCapError:
            return None
        return self._loaded(entries)

    def _loaded(self, entries: Sequence[Entry[T]]) -> Lease[T]:
        """Return the lease of what was taken, with everything loaded."""
        lease = Lease(self, entries, threading.get_ident())
        try:
            lease.values = {entry.name: _value(entry) for entry in entries}
        except BaseException:
            lease.release()
            raise
        return lease

    def _entry(self, name: str) -> Entry[T]:
        if name not in self._entries:
            raise UsageError("there is no adapter of this name", where=name,
                             found=", ".join(self._entries) or "none",
                             hint="Call load_adapter first")  # fmt: skip
        return self._entries[name]

    def _take(self, names: Sequence[str], timeout: float, counted: bool) -> list[Entry[T]]:
        """Wait for room and mark the entries as used by this thread."""
        owner, deadline = threading.get_ident(), time.monotonic() + timeout
        with self._changed:
            entries = [self._entry(name) for name in dict.fromkeys(names)]
            if not self._may_go(None, entries, owner):
                with self._waiting() as ticket:
                    while not self._may_go(ticket, entries, owner):
                        self._wait(entries, owner, deadline)
            if counted:
                there = sum(entry.value is not None for entry in entries)
                self.hits, self.misses = self.hits + there, self.misses + len(entries) - there
            self._hold(entries, owner)
        return entries

    @contextmanager
    def _waiting(self) -> Iterator[object]:
        """Stand in the queue."""
        ticket = object()
        self._queue.append(ticket)
        try:
            yield ticket
        finally:
            self._queue.remove(ticket)
            if self._queue:
                self._changed.notify_all()

    def _may_go(self, ticket: object, entries: Sequence[Entry[T]], owner: int) -> bool:
        """Whether there is room, and nobody who has to go first.

        Who needs no room need not wait. Who has a lease already must not: those before it in the
        queue may be waiting for just that lease.
        """
        if all(entry.held for entry in entries):
            return True
        first = not self._queue or self._queue[0] is ticket or self._owners[owner] > 0
        return first and self._has_room(entries)

    def _has_room(self, entries: Sequence[Entry[T]]) -> bool:
        missing = _sum([entry for entry in entries if not entry.held])
        kept = _sum([entry for entry in entries if entry in self._idle])
        return self.nbytes + missing - (self._idle_bytes - kept) <= self.max_bytes

    def _wait(self, entries: Sequence[Entry[T]], owner: int, deadline: float) -> None:
        """Wait until something changes, if that can help.

        Raises:
            MemoryCapError: it cannot, or the time is up.
        """
        others = [entry for entry in self._busy if entry not in entries]
        stuck = [entry for entry in others if NOBODY in entry.users or owner in entry.users]
        needed, left = _sum(entries), deadline - time.monotonic()
        if needed + _sum(stuck) > self.max_bytes:
            raise self._too_small(entries, needed, _sum(stuck))
        if left <= 0:
            raise self._too_small(entries, needed, _sum(others))
        self._changed.wait(left)

    def _too_small(self, entries: Sequence[Entry[T]], needed: int, used: int) -> MemoryCapError:
        there = f", beside {used:,} bytes that are pinned or in use" if used else ""
        return MemoryCapError(
            Problem(
                "no room in the adapter cache", ", ".join(entry.name for entry in entries),
                f"at most {self.max_bytes:,} bytes (max_bytes)", f"{needed:,} bytes{there}",
                f"Allow {needed + used:,} bytes, or use fewer adapters at once",
            )
        )  # fmt: skip

    def _hold(self, entries: Sequence[Entry[T]], owner: int) -> None:
        """Count the entries, mark them as used, and drop others for them."""
        for entry in entries:
            self._wake(entry)
            entry.users[owner] += 1
            self._busy.add(entry)
        self._owners[owner] += 1
        new = [entry for entry in entries if not entry.held]
        missing = _sum(new)
        while self._idle and self.nbytes + missing > self.max_bytes:
            self._drop(next(iter(self._idle)))
            self.evictions += 1
        for entry in new:
            entry.held = True
        self.nbytes += missing
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def _wake(self, entry: Entry[T]) -> None:
        if entry in self._idle:
            del self._idle[entry]
            self._idle_bytes -= entry.nbytes

    def _drop(self, entry: Entry[T]) -> None:
        self._wake(entry)
        entry.value, entry.held = None, False
        self.nbytes -= entry.nbytes

    def _give_back(self, entries: Sequence[Entry[T]], owner: int) -> None:
        with self._changed:
            self._forget(entries, owner)
            for entry in entries:
                if not entry.users:
                    self._busy.discard(entry)
                    self._rest(entry)
            self._changed.notify_all()

    def _disown(self, entries: Sequence[Entry[T]], owner: int) -> None:
        with self._changed:
            self._forget(entries, owner)
            for entry in entries:
                entry.users[NOBODY] += 1
            self._owners[NOBODY] += 1
            self._changed.notify_all()

    def _forget(self, entries: Sequence[Entry[T]], owner: int) -> None:
        """Take one lease of an owner off the entries."""
        for users in (self._owners, *(entry.users for entry in entries)):
            users[owner] -= 1
            if not users[owner]:
                del users[owner]

    def _rest(self, entry: Entry[T]) -> None:
        """Keep an entry that nobody uses for the next who asks, if it is still known and loaded."""
        if entry.value is None or self._entries.get(entry.name) is not entry:
            self._drop(entry)
            return
        self._idle[entry] = None
        self._idle_bytes += entry.nbytes


def _value(entry: Entry[T]) -> T:
    """Return a leased entry's thing; the first to come loads it, and the others wait for it."""
    if entry.value is None:
        with entry.loading:
            if entry.value is None:
                entry.value = entry.load()
    return entry.value


def _sum(entries: Sequence[Entry[T]]) -> int:
    return sum(entry.nbytes for entry in entries)
