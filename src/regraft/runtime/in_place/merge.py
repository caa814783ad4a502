"""Adapters merged into a live model, in its own memory, and taken out again bit by bit.

The bits are those of the merge on files, and so is the way back: of each parameter there is kept
what does not follow from the merged values and the deltas. Nothing is copied but what an adapter
replaces. Whatever fails, the model is as it was before the call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from regraft.concurrency import available_cores
from regraft.errors import UsageError
from regraft.quant.rounding import NOISE, SURVIVED
from regraft.quant.weight import ROUNDINGS
from regraft.runtime.forward.hooks import torn
from regraft.runtime.in_place.changes import apply_all, revert_all
from regraft.runtime.in_place.pool import run_all
from regraft.runtime.in_place.preparing import InPlaceOptions, PreparedMerge, prepare
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter
from regraft.runtime.whole import whole

Weighted = Sequence[tuple[LiveAdapter, float]]
"""Adapters, each with a factor on its scale, in the order they are added."""


def prepared_merge(
    base: LiveBase,
    adapters: Weighted,
    *,
    rounding: str | None = None,
    seed: int = 0,
    dequantize: bool = False,
    threads: int | None = None,
) -> Merged:
    """Return a merge that can be carried out; nothing of the model is changed yet.

    Args:
        base: the model.
        adapters: the adapters with their weights; their tensors are copied.
        rounding: how values become codes of a quantized weight: ``stochastic``, which keeps the
            deltas on average (the default), or ``nearest``.
        seed: which random bits that takes.
        dequantize: put plain layers in the place of all quantized ones, with the values that the
            merge of files out of the format gives.
        threads: how many; by default one for each core at hand.

    Raises:
        UsageError: the call contradicts itself.
        MismatchError: adapters and model do not fit; lists every misfit.
        AdapterError: an adapter holds NaN or infinity.
        UnsupportedError: a weight is offloaded.
    """
    if rounding not in (None, *ROUNDINGS):
        raise UsageError(f"there is no rounding {rounding!r}", expected=" or ".join(ROUNDINGS))
    count = available_cores() if threads is None else threads
    if count < 1:
        raise UsageError("nothing is done by no threads", expected="at least 1", found=str(count))
    return Merged(base, adapters, InPlaceOptions(rounding or "stochastic", seed, dequantize, count))


def exchange(there: Merged, other: Merged) -> None:
    """Take a merge out of a model and carry out another one, or leave the model as it was.

    Raises:
        RegraftError: as :meth:`Merged.unmerge` and :meth:`Merged.carry_out`; the model is then
            merged as before.
    """
    whole(partial(_exchange, there, other))


def _exchange(there: Merged, other: Merged) -> None:
    there.unmerge()
    try:
        other.carry_out()
    except BaseException:
        if not other.is_torn:
            there.carry_out(to_the_end=True)
        raise


@dataclass(frozen=True)
class MergeReport:
    """What a merge in memory did.

    Attributes:
        parameters: names of the parameters that changed.
        seconds: wall time.
        undo_bytes: what is kept for the way back, a copy of the adapters included.
        survived: of weights that stayed quantized, the share of the deltas that is in their codes;
            None without any. See "the figures of codes" in the arithmetic.
        noise: what rounding to codes added, as a share of the weights; likewise.
    """

    parameters: tuple[str, ...]
    seconds: float
    undo_bytes: int
    survived: float | None = None
    noise: float | None = None


class Merged:
    """Adapters that are merged into a live model.

    Attributes:
        base: the model.
        choices: how they were merged.
        is_merged: whether they are in the model now.
        is_torn: whether a part of them is, because a step failed and could not be taken back.
        report: what was done.
    """

    def __init__(self, base: LiveBase, adapters: Weighted, choices: InPlaceOptions) -> None:
        """Find out what is to be done; :meth:`carry_out` does it.

        Raises:
            RegraftError: it cannot be done.
        """
        self.base, self.choices = base, choices
        self.is_merged = self.is_torn = False
        self._prepared: PreparedMerge | None = prepare(base, adapters, choices)
        self.report = MergeReport((), 0.0, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that changed."""
        return self.report.parameters

    @property
    def nbytes(self) -> int:
        """The bytes kept for the way back, a copy of the adapters included."""
        return self.report.undo_bytes

    def carry_out(self, *, to_the_end: bool = False) -> None:
        """Merge; if anything fails, or Ctrl-C is pressed, the model is as it was.

        Args:
            to_the_end: do not stop for Ctrl-C; it is raised when all is done.

        Raises:
            NumericError: a weight would hold NaN or infinity where it held a number.
            RegraftError: it cannot be done.
        """
        self._check_whole()
        whole(partial(self._turn, True, to_the_end=to_the_end))

    def unmerge(self) -> None:
        """Take the adapters out: every bit is what it was, and tied weights are one again.

        If anything fails, or Ctrl-C is pressed, the model is merged as it was.

        Raises:
            UsageError: nothing is merged, or the way back was not kept.
            MismatchError: the weights have been changed since the merge.
        """
        if not self.is_merged and not self.is_torn:
            raise UsageError("no adapter is merged", hint="Merge one first")
        whole(partial(self._turn, False))

    def _turn(self, merged: bool, *, to_the_end: bool = False) -> None:
        """Make the model merged, or not merged, or leave it as it is."""
        started, prepared = time.perf_counter(), self._the_prepared()
        with prepared.opened():
            try:
                self._go(prepared, merged, to_the_end=to_the_end)
            except BaseException:
                self._go_back(prepared, merged)
                raise
        if merged:
            self.report = _report(prepared, time.perf_counter() - started)

    def _go(self, prepared: PreparedMerge, merged: bool, *, to_the_end: bool) -> None:
        """Do what is left to be done; the jobs know which of their tiles are merged."""
        pieces = prepared.forward() if merged else prepared.backward()
        run_all(pieces, self.choices.threads, to_the_end=to_the_end)
        if merged:
            apply_all(prepared.changes)
        else:
            revert_all(prepared.changes)
        self.is_merged, self.is_torn = merged, False

    def _go_back(self, prepared: PreparedMerge, merged: bool) -> None:
        """Take back what a step that failed has done; if that fails too, say so from then on."""
        if self.is_torn:  # the step was the way back from one that failed before
            return
        try:
            self._go(prepared, not merged, to_the_end=True)
        except BaseException:
            self.is_merged, self.is_torn = False, True
            raise

    def _check_whole(self) -> None:
        """Refuse to merge into weights that are neither merged nor the base's.

        Raises:
            UsageError: they are.
        """
        if self.is_torn:
            raise torn()

    def forget(self) -> None:
        """Let go of all that :meth:`unmerge` needs: the model stays merged."""
        self._prepared = None
        self.report = replace(self.report, undo_bytes=0)

    def _the_prepared(self) -> PreparedMerge:
        if self._prepared is None:
            raise UsageError(
                "what takes the adapters out again was not kept", hint="Load the model again"
            )
        return self._prepared


def _report(prepared: PreparedMerge, seconds: float) -> MergeReport:
    sums = np.sum([np.zeros(6), *(job.sums for job in prepared.coded)], axis=0)
    weights, deltas = float(sums[0]), float(sums[1])
    survived = noise = None
    if weights > 0 and deltas > 0:
        survived = float(f"{sums[4 + SURVIVED] / deltas:.9g}")
        noise = float(f"{np.sqrt(sums[4 + NOISE] / weights):.9g}")
    return MergeReport(prepared.names, seconds, prepared.nbytes, survived, noise)
