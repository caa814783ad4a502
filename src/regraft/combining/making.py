"""The new adapter: its modules' factors, made when they are asked for, and the rest of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import starmap
from typing import Any

import numpy as np

from regraft.adapters.dialects.form import Bits, LoraModule, Moved, PlainAdapter
from regraft.adapters.dialects.shared.peft_config import KEPT
from regraft.combining.inputs import Inputs
from regraft.combining.matching import Group, NotFinite, Replaced, values_of
from regraft.combining.outcome import Choices, NewFactors, made_of, measured, new_factors
from regraft.concurrency import available_cores, for_each
from regraft.deltas.rounding import encode
from regraft.errors import AdapterError, NumericError, Problem
from regraft.formats.files.reading import FilePool
from regraft.formats.problems import capped
from regraft.progress import ProgressMeter
from regraft.tensors import DTYPES

MOST_THREADS = 4
"""Modules that are measured at a time; each takes some ten times its factors' memory."""

_NOTHING = np.empty(0, np.float32)

KEPT_BYTES = 40 * 2**20
"""Factors that are kept from the time they are measured until they are written; those beyond are
made again, which takes a little longer."""


class Maker:
    """Makes the modules of the new adapter; each twice at most: to be measured, and written."""

    def __init__(self, groups: Sequence[Group], choices: Choices, files: FilePool) -> None:
        """Take what is to be combined, and how."""
        self._groups = {group.name: group for group in groups}
        self._choices, self._files = choices, files
        self._ranks: dict[str, int] = {}
        self._kept: dict[str, NewFactors] = {}
        self._room = KEPT_BYTES
        self._lock = threading.Lock()  # held while a module that was measured is noted
        self._last: tuple[str, NewFactors] | None = None

    def measured(self, told: ProgressMeter, root: Any) -> list[NewFactors]:
        """Make all modules and return what is known of them, without the factors of most.

        Raises:
            AdapterError: factors hold NaN or infinity; lists every one.
            NumericError: values are too large for the dtype; lists every module.
        """
        found: dict[str, NewFactors] = {}
        bad = dict[str, Problem]()

        def measure(group: Group, _: None) -> None:
            try:
                rank, made = measured(group, self._choices, self._files)
            except NotFinite as refused:
                bad.update(refused.problems)
                return
            self._keep(group.name, rank, made)
            found[group.name] = replace(made, a=_NOTHING, b=_NOTHING)
            told.add(size_of(group), group.name)

        threads = min(MOST_THREADS, available_cores())
        for_each(self._groups.values(), measure, threads, memory=lambda: None)
        if bad:
            raise AdapterError(capped([bad[name] for name in sorted(bad)], root))
        lost = {name: found[name].lost for name in self._groups if found[name].lost}
        if lost:
            raise NumericError(capped(list(starmap(self._too_large, lost.items())), root))
        return [found[name] for name in self._groups]

    def _too_large(self, name: str, count: int) -> Problem:
        dtype = DTYPES[self._choices.dtype].config_name
        return Problem(
            f"the new factors do not fit {dtype}: values would become infinite", name,
            "values that the dtype can hold", f"{count} that are too large",
            "Give another --dtype: bfloat16 has the range of float32",
        )  # fmt: skip

    def _keep(self, name: str, rank: int, made: NewFactors) -> None:
        size = made.a.nbytes + made.b.nbytes
        with self._lock:
            self._ranks[name] = rank
            if size <= self._room:
                self._room -= size
                self._kept[name] = made

    def _made(self, name: str) -> NewFactors:
        if name in self._kept:
            return self._kept[name]
        if self._last is None or self._last[0] != name:
            self._last = None  # let go of the last module's before making the next
            group = self._groups[name]
            deltas = made_of(group, self._choices, self._files)
            made = new_factors(group, self._ranks[name], self._choices, deltas)
            self._last = name, made
        return self._last[1]

    def module(self, name: str) -> LoraModule:
        """Return a module of the new adapter; its tensors are made when their bits are read."""
        group, rank = self._groups[name], self._ranks[name]
        first = group.parts[0].module
        (out, columns), experts = group.sizes, group.experts
        a = self._tensor(name, "a", _a_shape(first, experts, rank, columns))
        b = self._tensor(name, "b", _b_shape(first, experts, rank, out))
        return LoraModule(name, rank, 1.0, a, b, group.kind, self._bias(group))

    def _tensor(self, name: str, side: str, shape: tuple[int, ...]) -> Moved:
        def move() -> Bits:
            return self._as_bits(getattr(self._made(name), side)).reshape(shape)

        return Moved(self._choices.dtype, shape, (), move)

    def _as_bits(self, values: np.ndarray) -> Bits:
        unsigned = f"<u{DTYPES[self._choices.dtype].bits // 8}"
        return encode(values, self._choices.dtype).view(unsigned)

    def _bias(self, group: Group) -> Moved | None:
        """Return the sum of B's biases, with scales and weights; None if there are none."""
        held = [(part, part.module.bias) for part in group.parts if part.module.bias is not None]
        if not held:
            return None
        shape = held[0][1].shape

        def move() -> Bits:
            terms = [
                part.weight * part.module.scale * values_of(bias, self._files).astype(np.float64)
                for part, bias in held
            ]
            return self._as_bits(np.add.reduce(terms).astype(np.float32)).reshape(shape)

        return Moved(self._choices.dtype, shape, (), move)


def _a_shape(first: LoraModule, experts: int, rank: int, columns: int) -> tuple[int, ...]:
    if first.kind == "experts":
        return experts, rank, columns
    return (rank, *first.a.shape[1:])


def _b_shape(first: LoraModule, experts: int, rank: int, out: int) -> tuple[int, ...]:
    if first.kind == "experts":
        return experts, out, rank
    return (out, rank, *first.b.shape[2:])


def size_of(group: Group) -> int:
    """Return the bytes of a module's factors in all adapters: what progress is counted in."""
    return sum(part.module.a.nbytes + part.module.b.nbytes for part in group.parts)


def new_adapter(
    inputs: Inputs, groups: Sequence[Group], maker: Maker, rest: Replaced
) -> PlainAdapter:
    """Return the new adapter; what cannot be combined is that of the first that says it."""
    plains = [adapter.plain for adapter in inputs.adapters]
    metadata: dict[str, str] = {}
    for plain in reversed(plains):
        metadata |= {key: value for key, value in plain.metadata.items() if key != KEPT}
    return PlainAdapter(
        modules=tuple(maker.module(group.name) for group in groups),
        whole=rest.whole,
        token_rows=rest.token_rows,
        base=next((plain.base for plain in plains if plain.base), None),
        task_type=next((plain.task_type for plain in plains if plain.task_type), None),
        metadata=metadata,
        ensure_weight_tying=any(plain.ensure_weight_tying for plain in plains),
    )
