"""From adapters and a live model to the jobs of a merge; nothing of the model is changed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from regraft.errors import MismatchError, Problem, UnsupportedError
from regraft.merging.compute.requantize import Coder
from regraft.merging.compute.step_math import ReadSource
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.planning.match import Work
from regraft.merging.planning.plan import Step
from regraft.merging.planning.planner import action_of, segments_of
from regraft.merging.planning.quantized.quantized_output import unfit_for_codes
from regraft.merging.planning.ties import cannot_part
from regraft.runtime.forward.layers.served import check_mergeable
from regraft.runtime.in_place.changes import Change, dequantized, plain_linear, untied
from regraft.runtime.in_place.copies import Copies
from regraft.runtime.in_place.jobs import CodedJob, ParameterJob, PlainJob
from regraft.runtime.in_place.pool import Piece
from regraft.runtime.in_place.quantized import LiveQuantized
from regraft.runtime.in_place.weights import check_at_hand, plain
from regraft.runtime.model.live_base import LiveBase, torch_dtype_of
from regraft.runtime.model.matching import LiveAdapter, match_live, weighted, without_place
from regraft.tensors import TensorSpec


@dataclass(frozen=True)
class InPlaceOptions:
    """How adapters are merged.

    Attributes:
        rounding: how values become codes, of :data:`regraft.quant.weight.ROUNDINGS`.
        seed: which random bits that takes.
        dequantize: whether quantized layers become plain ones.
        threads: how many.
    """

    rounding: str
    seed: int
    dequantize: bool
    threads: int


@dataclass
class PreparedMerge:
    """A merge that can be carried out, and taken back.

    Attributes:
        copies: the adapters.
        jobs: what is done to which parameter.
        changes: what of the model's tables is replaced once all jobs are done.
        replaced: quantized weights that plain ones take the place of.
    """

    copies: Copies
    jobs: list[ParameterJob] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    replaced: list[LiveQuantized] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that adapters change."""
        return tuple(job.step.name for job in self.jobs if job.step.action != "convert")

    @property
    def coded(self) -> list[ParameterJob]:
        """The jobs on weights that stay quantized."""
        return [job for job in self.jobs if isinstance(job, CodedJob)]

    @property
    def nbytes(self) -> int:
        """The bytes that the way back takes."""
        kept = sum(job.nbytes for job in self.jobs) + self.copies.nbytes
        return kept + sum(quantized.nbytes for quantized in self.replaced)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Look at all parameters as they are now.

        Raises:
            UnsupportedError: one is offloaded.
            MismatchError: one is not what it was.
        """
        try:
            for quantized in self.replaced:
                quantized.open()
            for job in self.jobs:
                job.open()
            yield
        finally:
            for job in self.jobs:
                job.close()
            for quantized in self.replaced:
                quantized.close()

    def forward(self) -> Iterator[Piece]:
        """Yield what is left to be merged."""
        for job in self.jobs:
            for tile in job.tiles:
                if tile.number not in job.done:
                    yield partial(job.forward, tile)

    def backward(self) -> Iterator[Piece]:
        """Yield what there is to be taken back."""
        for job in self.jobs:
            for tile in job.tiles if job.keeps else ():
                if tile.number in job.done:
                    yield partial(job.backward, tile)


def prepare(
    base: LiveBase, adapters: Sequence[tuple[LiveAdapter, float]], choices: InPlaceOptions
) -> PreparedMerge:
    """Find out what a merge does to a live model.

    Raises:
        MismatchError: adapters and model do not fit; lists every misfit.
        AdapterError: an adapter holds NaN or infinity.
        UnsupportedError: a weight is offloaded, or no layer can take its place.
    """
    check_mergeable(base, [adapter.adapter for adapter, _ in adapters])
    works = match_live(base, [weighted(a.adapter, weight) for a, weight in adapters])
    coded = [work for name, work in works.items() if name in base.quantized]
    problems = unfit_for_codes(coded, kept=not choices.dequantize)
    problems += without_place(base, works)
    parted = parted_ties(base, works, problems)
    if problems:
        raise MismatchError(problems)
    preparation = _Preparation(
        base, PreparedMerge(Copies([adapter for adapter, _ in adapters])), choices
    )
    for name, work in works.items():
        if name in parted or name not in base.tied:
            preparation.add(name, work)
    for alias in parted - set(works):
        preparation.add(alias, Work(alias, base.checkpoint.tensors[base.tied[alias]]))
    if choices.dequantize:
        for name in base.quantized:
            if name not in works:
                preparation.add(name, Work(name, base.checkpoint.tensors[name]))
    return preparation.finished(parted)


def parted_ties(base: LiveBase, works: dict[str, Work], problems: list[Problem]) -> set[str]:
    """Return the tied parameters that get another value than the ones they are tied to.

    Args:
        base: the model.
        works: what adapters do to it; each side of a tie has its own.
        problems: what stands against parting a tie is added.
    """
    parted = set()
    for owner in dict.fromkeys(base.tied.values()):
        aliases = [alias for alias, of in base.tied.items() if of == owner]
        differing = [a for a in aliases if _what(works.get(a)) != _what(works.get(owner))]
        if not differing:
            continue
        changed = [name for name in (*differing, owner) if name in works]
        problem = cannot_part(base.index, aliases, changed[:1], base.config or {})
        if problem is not None:
            problems.append(problem)
        parted |= set(differing)
    return parted


def _what(work: Work | None) -> tuple[Any, ...]:
    """Return what is done, whichever side of a tie it is done to."""
    if work is None:
        return None, None, [], []
    return work.carried, work.replaced, work.deltas, work.patches


class _Preparation:
    """Makes the jobs of a merge."""

    def __init__(self, base: LiveBase, prepared: PreparedMerge, choices: InPlaceOptions) -> None:
        self._base, self._prepared, self._choices = base, prepared, choices

    def add(self, name: str, work: Work) -> None:
        """Add what a work does to a parameter.

        Raises:
            UnsupportedError: its values are not at hand.
        """
        if name in self._base.quantized:
            self._add_quantized(name, work)
            return
        _, module, leaf = self._base.owner(name)
        parameter = getattr(module, leaf)
        check_at_hand(parameter, name)
        step, read = _step(name, work, virtual=False), self._read(work)
        store = self._prepared.copies
        if name not in self._base.tied:
            current = partial(getattr, module, leaf)
            self._prepared.jobs.append(PlainJob(step, store, current, read, keeps=True))
            return
        data = plain(parameter)
        values = data.clone() if read is None else torch.empty_like(data)
        new = nn.Parameter(values, requires_grad=parameter.requires_grad)
        self._prepared.jobs.append(PlainJob(step, store, lambda: new, read, keeps=False))
        self._prepared.changes.append(Change(module._parameters, leaf, new))

    def _add_quantized(self, name: str, work: Work) -> None:
        _, module, leaf = self._base.owner(name)
        spec = self._base.checkpoint.tensors[name]
        quantized = LiveQuantized(spec, module, leaf, self._base.scales.get(name))
        step, store = _step(name, work, virtual=True), self._prepared.copies
        if not self._choices.dequantize:
            step = replace(step, coded=quantized.weight, dtype=quantized.weight.codes.dtype)
            coder = Coder(quantized.weight, self._choices.rounding, self._choices.seed)
            self._prepared.jobs.append(CodedJob(step, store, quantized, coder))
            return
        if not isinstance(module, nn.Linear) or leaf != "weight":
            raise UnsupportedError(
                "only linear layers can become plain ones", where=name,
                found=type(module).__name__, hint="Merge without dequantize",
            )  # fmt: skip
        self._prepared.replaced.append(quantized)
        dtype = torch_dtype_of(spec.dtype)
        values = torch.empty(spec.shape, dtype=dtype, device=quantized.parameter.device)
        new = nn.Parameter(values, requires_grad=False)
        read = self._read(work) or partial(_read_values, quantized, spec)
        self._prepared.jobs.append(PlainJob(step, store, lambda: new, read, keeps=False))
        self._replace(module, plain_linear(module, new))

    def _replace(self, module: nn.Module, new: nn.Module) -> None:
        """Put a layer in the place of another one, wherever the model has that."""
        modules = self._base.modules
        for path, found in modules.items():
            if found is module:
                parent, _, leaf = path.rpartition(".")
                self._prepared.changes.append(Change(modules[parent]._modules, leaf, new))
                self._prepared.changes.append(Change(modules, path, new))

    def _read(self, work: Work) -> ReadSource | None:
        """Return what reads the adapter's tensor that a work starts from; None for the base's."""
        if work.source_adapter is None:
            return None
        return partial(self._prepared.copies.read, work.source_adapter, work.source)

    def finished(self, parted: set[str]) -> PreparedMerge:
        """Return all, with what changes in the model's config."""
        model, prepared = self._base.model, self._prepared
        if parted:
            prepared.changes += untied(model)
        if prepared.replaced:
            prepared.changes += dequantized(model)
        return prepared


def _read_values(quantized: LiveQuantized, spec: TensorSpec, offset: int, buffer: Any) -> None:
    source = DequantizingSource({spec.name: quantized.weight}, quantized)
    source.read(spec, offset, buffer)


def _step(name: str, work: Work, *, virtual: bool) -> Step:
    """Return how a parameter is made; ``virtual`` is whether it is quantized."""
    base = work.base
    assert base is not None  # what the model does not have is refused
    source = work.source
    if not virtual and work.source_adapter is None:
        source = replace(source, start=0)
    idle = not (work.deltas or work.patches or work.source_adapter is not None)
    action = "convert" if idle else action_of(work)
    return Step(
        name, action, source, work.source_adapter, base.dtype, base.shape, segments_of(work),
        tuple(work.patches),
    )  # fmt: skip
