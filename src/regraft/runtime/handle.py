"""The handle on a live model: adapters are loaded, chosen, mixed, merged and taken off through it.

It is no wrapper. The model is used as before; which adapters answer is said here. PEFT's verbs have
PEFT's names.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.errors import UsageError
from regraft.runtime import loading, scopes
from regraft.runtime.hooks import Hooks, State
from regraft.runtime.live_base import LiveBase
from regraft.runtime.matching import LiveAdapter
from regraft.runtime.operations import Operations, operations_of
from regraft.runtime.selection import Named, Rows, Selection

Choice = str | Sequence[str] | Mapping[str, float] | None
"""Adapters that answer together: a name, names, names with weights; None for no adapter."""

_KEPT_MIXES = 64
_numbers = itertools.count(1)
_attached: weakref.WeakKeyDictionary[nn.Module, Adapters] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    adapter: Any = None,
    name: str = "default",
    *,
    is_trainable: bool = False,
    dtype: torch.dtype | str | None = None,
    token: str | None = None,
) -> Adapters:
    """Put adapters on a running model, without a wrapper.

    Args:
        model: a torch model: transformers' (16-bit, or bitsandbytes 8-bit or 4-bit), or any other.
        adapter: an adapter's folder or Hub id ``org/name[@revision]``, which then answers; a
            :class:`LoraConfig` (regraft's or PEFT's), for one to be trained; None for none yet.
        name: what it is called from now on.
        is_trainable: whether an adapter that is loaded goes on in training.
        dtype: of the adapter's tensors; by default as they are stored.
        token: Hub token; by default the one the machine is logged in with.

    Returns:
        The handle. The model itself is used as before, and is as before in class, module tree and
        ``state_dict()``.

    Raises:
        UsageError: the model has a handle already.
        RegraftError: the adapter cannot be read, or does not fit; the model is then as before.
    """
    if model in _attached:
        raise UsageError(
            "this model has adapters attached already", where=type(model).__name__,
            hint="Use that handle's load_adapter, or regraft.handle_of(model) to find it",
        )  # fmt: skip
    adapters = Adapters(model)
    try:
        if isinstance(adapter, str | Path):
            adapters.load_adapter(
                adapter, name, is_trainable=is_trainable, dtype=dtype, token=token
            )
        elif adapter is not None:
            adapters.add_adapter(name, adapter)
        if adapter is not None:
            adapters.set_adapter(name)
    except BaseException:
        adapters.detach()
        raise
    return adapters


def handle_of(model: nn.Module) -> Adapters | None:
    """Return the handle of a model, None if it has none."""
    return _attached.get(model)


class Adapters:
    """The adapters of one live model; made by :func:`attach`.

    Which of them answer is said for everyone by :meth:`set_adapter`, and for a block of code, in
    this thread or asyncio task alone, by :meth:`using`, :meth:`rows` and :meth:`disable_adapter`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base = LiveBase(model)
        self._state = State(next(_numbers))
        self._hooks = Hooks(self.base, self._state)
        self._adapters: dict[str, LiveAdapter] = {}
        self._selections: dict[str, Selection] = {}
        self._mixes: OrderedDict[Named, Selection] = OrderedDict()
        self._lock = threading.RLock()
        self._frozen: list[nn.Parameter] = []
        _attached[model] = self

    def __repr__(self) -> str:
        active = ", ".join(f"{n}" if w == 1 else f"{n}={w:g}" for n, w in self._default_names)
        names = ", ".join(self._adapters) or "none"
        return f"Adapters({names}; active: {active or 'none'})"

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.base.model

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that answer here: in this thread or task, if a scope says so, or for all."""
        selection = self._state.selection()
        if isinstance(selection, Rows):
            parts = [each.names for each in selection.distinct if each is not None]
            return list(dict.fromkeys(name for names in parts for name, _ in names))
        return [name for name, _ in selection.names] if selection is not None else []

    @property
    def _default_names(self) -> Named:
        default = self._state.default
        return default.names if isinstance(default, Selection) else ()

    def adapter(self, name: str) -> LiveAdapter:
        """Return an adapter with its tensors.

        Raises:
            UsageError: there is none of this name.
        """
        if name not in self._adapters:
            raise UsageError(
                "there is no adapter of this name", where=repr(name),
                expected=" or ".join(map(repr, self._adapters)) or "one that was loaded",
                hint="load_adapter(source, name) loads one",
            )  # fmt: skip
        return self._adapters[name]

    # -- adapters come and go --------------------------------------------------------------------

    def load_adapter(
        self,
        source: str | Path,
        name: str = "default",
        *,
        is_trainable: bool = False,
        dtype: torch.dtype | str | None = None,
        token: str | None = None,
    ) -> LiveAdapter:
        """Load an adapter beside the others; which ones answer stays as it is.

        Args:
            source: a folder or a Hub id ``org/name[@revision]``.
            name: what it is called.
            is_trainable: whether it goes on in training; its tensors are then float32.
            dtype: of its tensors; by default as they are stored.
            token: Hub token; by default the one the machine is logged in with.

        Raises:
            UsageError: the name is taken.
            RegraftError: it cannot be read, or does not fit the model. Nothing has changed then.
        """
        self._check_new(name)
        files = loading.open_files(source, token)
        adapter = loading.load(name, files, loading.describe(files))
        return self._take(loading.prepared(adapter, self.base, dtype, is_trainable=is_trainable))

    def add_adapter(self, name: str, config: Any) -> LiveAdapter:
        """Make a new adapter to be trained; which ones answer stays as it is.

        Args:
            name: what it is called.
            config: a :class:`LoraConfig` of regraft or PEFT, or a mapping of its fields.

        Raises:
            UsageError: the name is taken.
            UnsupportedError: the config asks for what regraft does not train.
            MismatchError: the config selects nothing in this model.
        """
        from regraft.runtime.training import as_config, new_adapter

        self._check_new(name)
        return self._take(new_adapter(self.base, as_config(config), name))

    def _check_new(self, name: str) -> None:
        if name in self._adapters:
            raise UsageError(
                "there is an adapter of this name already", where=repr(name),
                hint="Choose another name, or delete_adapter(name) first",
            )  # fmt: skip

    def _take(self, adapter: LiveAdapter) -> LiveAdapter:
        with self._lock:
            self._check_new(adapter.name)
            operations = operations_of(self.base, [(adapter, 1.0)])
            self._cover(operations)
            self._adapters[adapter.name] = adapter
            self._selections[adapter.name] = Selection(((adapter.name, 1.0),), operations)
            if adapter.is_trainable:
                self._freeze_base()
        return adapter

    def _cover(self, operations: Operations) -> None:
        self._hooks.cover(operations.steps, operations.replacements)

    def _freeze_base(self) -> None:
        """Let nothing but adapters be trained; undone by :meth:`detach`."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def delete_adapter(self, name: str) -> None:
        """Let go of an adapter.

        Raises:
            UsageError: there is none of this name, or it answers now.
        """
        self.adapter(name)
        with self._lock:
            if name in self.active_adapters or name in dict(self._default_names):
                raise UsageError(
                    "this adapter answers now", where=repr(name),
                    hint="Choose another one with set_adapter(name), or None, and then delete it",
                )  # fmt: skip
            del self._adapters[name], self._selections[name]
            for mix in [mix for mix in self._mixes if name in dict(mix)]:
                del self._mixes[mix]

    def detach(self) -> nn.Module:
        """Take everything off the model and return it: as it was before :func:`attach`."""
        with self._lock:
            self._hooks.remove()
            self._state.default = None
            self._adapters.clear()
            self._selections.clear()
            self._mixes.clear()
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._frozen.clear()
            model = self.model
            _attached.pop(model, None)
        return model

    unload = detach

    # -- which ones answer -----------------------------------------------------------------------

    def set_adapter(self, adapters: Choice) -> None:
        """Say which adapters answer wherever no scope says otherwise.

        Args:
            adapters: a name; several, which add up; names with weights; None for none.

        Raises:
            UsageError: a name is unknown.
            MismatchError: they cannot go together.
        """
        self._state.default = self.selection(adapters)

    @contextmanager
    def using(self, adapters: Choice) -> Iterator[None]:
        """Let these adapters answer in a block, in this thread or asyncio task alone.

        A thread that is started inside the block does not have it; ``contextvars.copy_context``
        and ``asyncio.to_thread`` take it along.

        Raises:
            UsageError, MismatchError: as :meth:`set_adapter`.
        """
        with self._scope(self.selection(adapters)):
            yield

    @contextmanager
    def rows(self, adapters: Sequence[Choice], *, repeats: int = 1) -> Iterator[None]:
        """Let each row of a batch have adapters of its own in a block, here alone.

        Args:
            adapters: for each row a name, names, names with weights, or None.
            repeats: rows that the model makes of each, one after the other, such as
                ``num_beams`` or ``num_return_sequences`` of ``generate``.

        Raises:
            UsageError: a name is unknown; in the block, a batch of another length.
        """
        chosen = [self.selection(each) for each in adapters for _ in range(repeats)]
        distinct = tuple(dict.fromkeys(chosen))
        number = {selection: at for at, selection in enumerate(distinct)}
        with self._scope(Rows(distinct, tuple(number[each] for each in chosen))):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the base alone answer in a block, in this thread or asyncio task."""
        with self._scope(None):
            yield

    @contextmanager
    def _scope(self, selection: Selection | Rows | None) -> Iterator[None]:
        if scopes.in_task():
            self._state.in_tasks = True
        with scopes.scope(self._state.key, selection):
            yield

    def selection(self, adapters: Choice) -> Selection | None:
        """Return what a choice of adapters stands for; None for no adapter.

        Raises:
            UsageError: a name is unknown, or a weight is no finite number.
            MismatchError: they cannot go together.
        """
        if isinstance(adapters, str):
            self.adapter(adapters)
            return self._selections[adapters]
        parts = named(adapters)
        for name, _ in parts:
            self.adapter(name)
        if len(parts) == 1 and parts[0][1] == 1.0:
            return self._selections[parts[0][0]]
        return self._mix(parts) if parts else None

    def _mix(self, parts: Named) -> Selection:
        with self._lock:
            if parts not in self._mixes:
                chosen = [(self._adapters[name], weight) for name, weight in parts]
                operations = operations_of(self.base, chosen)
                self._cover(operations)
                self._mixes[parts] = Selection(parts, operations)
            self._mixes.move_to_end(parts)
            while len(self._mixes) > _KEPT_MIXES:
                self._mixes.popitem(last=False)
            return self._mixes[parts]

    # -- training --------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained: all trainable tensors of all adapters, with PEFT's names."""
        for adapter in self._adapters.values():
            for key, tensor in adapter.tensors.items():
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    yield f"{adapter.name}.{key}", tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter


def named(adapters: Sequence[str] | Mapping[str, float] | None) -> Named:
    """Return adapters by name with their weights.

    Raises:
        UsageError: a weight is no finite number, or a name comes twice.
    """
    if adapters is None:
        return ()
    if not isinstance(adapters, Mapping):
        if len(set(adapters)) < len(adapters):
            raise UsageError(
                "an adapter is named twice", where=", ".join(map(repr, adapters)),
                hint="Give it a weight instead: {name: 2.0}",
            )  # fmt: skip
        return tuple((name, 1.0) for name in adapters)
    for name, weight in adapters.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or weight != weight or abs(weight) == float("inf"):
            raise UsageError(
                "an adapter's weight has to be a number", where=repr(name), found=repr(weight)
            )
    return tuple((name, float(weight)) for name, weight in adapters.items())
