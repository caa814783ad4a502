"""The measurements of live models: regraft and PEFT in one process, in turns, on one base."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

import regraft
from benchmarks.live import models
from benchmarks.live.models import Sizes
from benchmarks.live.timing import Job, Times, in_turns, there_and_back

MIX = 8
"""Adapters, and rows, of a mixed batch."""


@dataclass(frozen=True)
class Inputs:
    """What lies on the disk: a base, and adapters by name."""

    base: Path
    adapters: dict[str, Path]

    @property
    def names(self) -> list[str]:
        return list(self.adapters)


# -- loading, switching, answering -----------------------------------------------------------------


class Running:
    """One base that answers three times over the same weights: alone, under regraft, under PEFT."""

    def __init__(self, inputs: Inputs, sizes: Sizes) -> None:
        self.inputs, self.sizes = inputs, sizes
        self.model = models.load_base(inputs.base)
        self.bare = models.sharing(self.model)
        self.peft = models.peft_model(self.model, inputs.adapters)
        self.adapters = regraft.attach(self.model)
        for name, path in inputs.adapters.items():
            self.adapters.load_adapter(path, name=name)

    def load(self) -> Times:
        """Time loading one more adapter onto the running model, and selecting it."""
        path, rounds = self.inputs.adapters[self.inputs.names[0]], self.sizes.rounds

        def ours() -> None:
            self.adapters.load_adapter(path, name="new")

        def theirs(**options: Any) -> Callable[[], None]:
            return lambda: self.peft.load_adapter(path, adapter_name="new", **options)

        def remove() -> None:
            self.adapters.set_adapter(None)
            self.adapters.delete_adapter("new")

        def remove_theirs() -> None:
            self.peft.set_adapter(self.inputs.names[0])
            self.peft.delete_adapter("new")

        def select() -> None:
            ours()
            self.adapters.set_adapter("new")

        def select_theirs() -> None:
            theirs()()
            self.peft.set_adapter("new")

        jobs = {
            "load, regraft": Job(ours, after=remove),
            "load, peft": Job(theirs(), after=remove_theirs),
            "load, peft on meta": Job(theirs(low_cpu_mem_usage=True), after=remove_theirs),
            "load and select, regraft": Job(select, after=remove),
            "load and select, peft": Job(select_theirs, after=remove_theirs),
        }
        return in_turns(jobs, rounds)

    def switch(self) -> Times:
        """Time switching to another adapter."""
        ours, theirs, scoped = (itertools.cycle(self.inputs.names) for _ in range(3))

        def scope() -> None:
            with self.adapters.using(next(scoped)):
                pass

        jobs = {
            "switch, regraft": Job(lambda: self.adapters.set_adapter(next(ours))),
            "switch, peft": Job(lambda: self.peft.set_adapter(next(theirs))),
            "scope, regraft": Job(scope),
        }
        times = in_turns(jobs, self.sizes.rounds)
        self._select_first()
        return times

    def _select_first(self) -> None:
        self.adapters.set_adapter(self.inputs.names[0])
        self.peft.set_adapter(self.inputs.names[0])

    def forward(self) -> Times:
        """Time forward passes of the base alone and with one adapter."""
        times: Times = {}
        first = self.inputs.names[0]
        calls: dict[str, tuple[Any, Callable[[], None]]] = {
            "base": (self.bare, lambda: None),
            "none": (self.model, lambda: self.adapters.set_adapter(None)),
            "regraft": (self.model, lambda: self.adapters.set_adapter(first)),
            "peft": (self.peft, lambda: None),
        }
        self._select_first()
        for batch, length in self.sizes.prompts:
            ids = models.prompt(self.sizes.shape, batch, length)
            jobs = {
                f"prompt {batch} x {length}, {name}": Job(passing(model, ids), before=select)
                for name, (model, select) in calls.items()
            }
            times |= in_turns(jobs, self.sizes.rounds)
        for batch in (1, MIX):
            jobs = {
                f"token, batch {batch}, {name}": self._token(model, batch, before=select)
                for name, (model, select) in calls.items()
            }
            times |= in_turns(jobs, 2 * self.sizes.rounds)
        return times

    def mixed(self) -> Times:
        """Time a batch whose rows have an adapter each beside one with one adapter for all."""
        names = self.inputs.names[:MIX]
        self._select_first()

        def ours(model: Any, adapters: Callable[[], Any]) -> Any:
            def call(**inputs: Any) -> Any:
                with adapters():
                    return model(**inputs)

            return call

        calls = {
            "one, regraft": ours(self.model, lambda: self.adapters.using(names[0])),
            "rows, regraft": ours(self.model, lambda: self.adapters.rows(names)),
            "one, peft": self.peft,
            "rows, peft": ours(self.peft, contextlib.nullcontext),
        }
        more: dict[str, Any] = {"rows, peft": {"adapter_names": names}}
        ids = models.prompt(self.sizes.shape, MIX, self.sizes.cached // 2)
        jobs = {
            f"mixed prompt {MIX} x {self.sizes.cached // 2}, {name}":
                Job(passing(call, ids, **more.get(name, {})))
            for name, call in calls.items()
        }  # fmt: skip
        times = in_turns(jobs, self.sizes.rounds)
        jobs = {
            f"mixed token, {name}": self._token(call, MIX, **more.get(name, {}))
            for name, call in calls.items()
        }
        return times | in_turns(jobs, 2 * self.sizes.rounds)

    def _token(
        self, call: Any, batch: int, before: Callable[[], None] | None = None, **more: Any
    ) -> Job:
        """Return the forward pass over one token more than what is cached."""
        if before is not None:
            before()
        shape, cached = self.sizes.shape, self.sizes.cached
        past = passing(call, models.prompt(shape, batch, cached), **more)().past_key_values
        token = models.prompt(shape, batch, 1, seed=1)
        step = passing(call, token, past_key_values=past, **more)
        return Job(step, before, lambda: past.crop(-1))


def passing(call: Any, ids: torch.Tensor, **more: Any) -> Callable[[], Any]:
    """Return a forward pass without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return call(input_ids=ids, use_cache=True, **more)

    return run


# -- merging in memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Merging:
    """Merges and un-merges in memory.

    Attributes:
        times: seconds of each.
        cycles: how often each merged and un-merged.
        changed: weights that are not what they were afterwards, by who did it.
        weights: how many weights the adapter is on.
        undo_bytes: what is kept to take the merge back.
        model_bytes: the bytes of the model.
    """

    times: Times
    cycles: int
    changed: dict[str, int]
    weights: int
    undo_bytes: int
    model_bytes: int


def merging(inputs: Inputs, sizes: Sizes) -> Merging:
    """Merge and un-merge the same adapter; PEFT on weights of its own, since it changes them."""
    name = inputs.names[0]
    model = models.load_base(inputs.base)
    before = copy.deepcopy(model)
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), inputs.adapters[name], name).eval()
    adapters = regraft.attach(model, inputs.adapters[name], name=name)
    kept: list[int] = []

    def merge() -> None:
        kept.append(adapters.merge_adapter(name).undo_bytes)

    pairs = {
        "regraft": (merge, adapters.unmerge_adapter),
        "peft": (lambda: theirs.merge_adapter([name]), theirs.unmerge_adapter),
    }
    times = there_and_back(pairs, ("merge", "unmerge"), sizes.slow_rounds)
    adapted = {n for n, _ in theirs.get_base_model().named_parameters() if ".base_layer." in n}
    return Merging(
        times,
        len(kept),
        {"regraft": changed(before, model), "peft": changed(before, theirs.get_base_model())},
        sum(p.numel() for n, p in before.named_parameters() if _wrapped(n) in adapted),
        max(kept),
        sum(p.numel() * p.element_size() for p in before.parameters()),
    )


def _wrapped(name: str) -> str:
    """Return the name that PEFT gives a parameter of a layer it adapts."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def changed(before: Any, after: Any) -> int:
    """Count the weights of a model whose bits are not those of another."""
    values = dict(after.named_parameters())
    return sum(
        _different(p, values[n] if n in values else values[_wrapped(n)])
        for n, p in before.named_parameters()
    )


def _different(one: torch.Tensor, other: torch.Tensor) -> int:
    first, second = (
        t.detach().view(torch.int16 if t.element_size() == 2 else torch.int32).numpy()
        for t in (one, other)
    )
    return int(np.count_nonzero(first != second))


# -- loading a model with an adapter merged in -----------------------------------------------------


def load_merged(inputs: Inputs, sizes: Sizes) -> Times:
    """Time loading the base, and loading it with an adapter merged in; with and without a first
    forward pass, since what is only mapped is read then."""
    adapter = inputs.adapters[inputs.names[0]]
    ids = models.prompt(sizes.shape, 1, 1)
    loads: dict[str, Callable[[], Any]] = {
        "from_pretrained": lambda: models.load_base(inputs.base),
        "from_pretrained that reads": lambda: models.load_base(inputs.base, disable_mmap=True),
        "load_merged": lambda: regraft.load_merged(inputs.base, adapter).eval(),
        "merge_and_unload": lambda: PeftModel.from_pretrained(
            models.load_base(inputs.base), adapter
        ).merge_and_unload(),
    }
    jobs = {}
    for name, load in loads.items():
        held: list[Any] = []
        jobs[name] = Job(_into(held, load), after=_dropped(held))
        jobs[f"{name}, first pass"] = Job(_into(held, _used(load, ids)), after=_dropped(held))
    return in_turns(jobs, sizes.slow_rounds)


def _used(load: Callable[[], Any], ids: torch.Tensor) -> Callable[[], Any]:
    """Return a function that loads a model, uses it once and returns it."""

    def run() -> Any:
        model = load()
        passing(model, ids)()
        return model

    return run


def _into(held: list[Any], make: Callable[[], Any]) -> Callable[[], None]:
    return lambda: held.append(make())


def _dropped(held: list[Any]) -> Callable[[], None]:
    def drop() -> None:
        held.clear()
        gc.collect()

    return drop
