"""Adapters merged into a live model, in its own memory, and taken out again bit by bit.

The bits are those of the merge on files, and so is the way back: of each parameter there is kept
what does not follow from the merged values and the deltas. Nothing is copied but what an adapter
replaces. Whatever fails, the model is as it was before the call.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regraft.errors import UsageError
from regraft.quant.rounding import NOISE, SURVIVED
from regraft.quant.weight import ROUNDINGS
from regraft.runtime.in_place.changes import apply_all, revert_all
from regraft.runtime.in_place.pool import Piece, default_threads, run_all
from regraft.runtime.in_place.preparing import Choices, Prepared, prepare
from regraft.runtime.live_base import LiveBase
from regraft.runtime.matching import LiveAdapter

Weighted = Sequence[tuple[LiveAdapter, float]]
"""Adapters, each with a factor on its scale, in the order they are added."""


def merge(
    base: LiveBase,
    adapters: Weighted,
    *,
    rounding: str | None = None,
    seed: int = 0,
    dequantize: bool = False,
    threads: int | None = None,
    undo: bool = True,
) -> Merged:
    """Merge adapters into a live model, in place.

    Args:
        base: the model.
        adapters: the adapters with their weights; their tensors are copied.
        rounding: how values become codes of a quantized weight: ``stochastic``, which keeps the
            deltas on average (the default), or ``nearest``.
        seed: which random bits that takes.
        dequantize: put plain layers in the place of all quantized ones, with the values that the
            merge of files out of the format gives.
        threads: how many; by default one for each core at hand.
        undo: whether the model can be un-merged afterwards.

    Raises:
        UsageError: the call contradicts itself.
        MismatchError: adapters and model do not fit; lists every misfit.
        AdapterError: an adapter holds NaN or infinity.
        NumericError: a weight would hold NaN or infinity where it held a number.
        UnsupportedError: a weight is offloaded.
    """
    if rounding not in (None, *ROUNDINGS):
        raise UsageError(f"there is no rounding {rounding!r}", expected=" or ".join(ROUNDINGS))
    count = default_threads() if threads is None else threads
    if count < 1:
        raise UsageError("nothing is done by no threads", expected="at least 1", found=str(count))
    merged = Merged(base, adapters, Choices(rounding or "stochastic", seed, dequantize, count))
    merged.carry_out()
    if not undo:
        merged.forget()
    return merged


def swap(merged: Merged, adapters: Weighted, *, undo: bool = True) -> Merged:
    """Take what is merged out of a model, and merge other adapters the same way.

    Raises:
        RegraftError: as :func:`merge` and :meth:`Merged.unmerge`; the model is then merged as
            before.
    """
    other = Merged(merged.base, adapters, merged.choices)
    merged.unmerge()
    try:
        other.carry_out()
    except BaseException:
        merged.carry_out(to_the_end=True)
        raise
    if not undo:
        other.forget()
    return other


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
        report: what was done.
    """

    def __init__(self, base: LiveBase, adapters: Weighted, choices: Choices) -> None:
        """Find out what is to be done; :meth:`carry_out` does it.

        Raises:
            RegraftError: it cannot be done.
        """
        self.base, self.choices = base, choices
        self.is_merged = False
        self._prepared: Prepared | None = prepare(base, adapters, choices)
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
        """Merge; if anything fails, the model is as it was.

        Args:
            to_the_end: do not stop for Ctrl-C.

        Raises:
            RegraftError: as :func:`merge`.
        """
        started, prepared = time.perf_counter(), self._the_prepared()
        with prepared.opened():
            try:
                self._run(prepared.forward(), to_the_end=to_the_end)
                apply_all(prepared.changes)
                self.is_merged = True
            except BaseException:
                self.is_merged = False
                revert_all(prepared.changes)
                self._run(prepared.backward(), to_the_end=True)
                raise
        self.report = _report(prepared, time.perf_counter() - started)

    def unmerge(self) -> None:
        """Take the adapters out: every bit is what it was, and tied weights are one again.

        If anything fails, the model is merged as it was.

        Raises:
            UsageError: nothing is merged, or the way back was not kept.
            MismatchError: the weights have been changed since the merge.
        """
        if not self.is_merged:
            raise UsageError("no adapter is merged", hint="Merge one first")
        prepared = self._the_prepared()
        with prepared.opened():
            try:
                self._run(prepared.backward())
                revert_all(prepared.changes)
                self.is_merged = False
            except BaseException:
                self.is_merged = True
                apply_all(prepared.changes)
                self._run(prepared.forward(), to_the_end=True)
                raise

    def forget(self) -> None:
        """Let go of all that :meth:`unmerge` needs: the model stays merged."""
        self._prepared = None
        self.report = replace(self.report, undo_bytes=0)

    def _the_prepared(self) -> Prepared:
        if self._prepared is None:
            raise UsageError(
                "what takes the adapters out again was not kept", hint="Load the model again"
            )
        return self._prepared

    def _run(self, pieces: Iterator[Piece], *, to_the_end: bool = False) -> None:
        run_all(pieces, self.choices.threads, to_the_end=to_the_end)


def _report(prepared: Prepared, seconds: float) -> MergeReport:
    sums = np.sum([np.zeros(6), *(job.sums for job in prepared.coded)], axis=0)
    weights, deltas = float(sums[0]), float(sums[1])
    survived = noise = None
    if weights > 0 and deltas > 0:
        survived = float(f"{sums[4 + SURVIVED] / deltas:.9g}")
        noise = float(f"{np.sqrt(sums[4 + NOISE] / weights):.9g}")
    return MergeReport(prepared.names, seconds, prepared.nbytes, survived, noise)
