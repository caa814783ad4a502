"""Progress of long work, told to whoever asks: the library itself prints nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """How far long work has come.

    Attributes:
        stage: ``"read"`` (headers), ``"resume"`` (what an earlier try did is looked at),
            ``"merge"``, ``"unmerge"``, ``"shrink"``, ``"export"``, ``"verify"``, ``"compare"`` or
            ``"digest"`` (tensors), ``"prompts"`` (logits), or ``"finish"`` (flush and rename).
        done: bytes done so far.
        total: bytes in all; 0 while unknown.
        tensor: the tensor that was finished last, or ``""``.
    """

    stage: str
    done: int
    total: int
    tensor: str = ""


Progress = Callable[[ProgressEvent], None]
"""What the ``progress`` argument takes; called from worker threads, one call at a time."""


def tell(progress: Progress | None, stage: str, total: int) -> None:
    """Report the beginning of a stage."""
    if progress is not None:
        progress(ProgressEvent(stage, total if stage == "finish" else 0, total))


class ProgressMeter:
    """Adds up the bytes of one stage, and tells how far it has come; for any number of threads.

    Args:
        progress: whom to tell, or None.
        stage: what the stage is called.
        total: bytes in all.
        done: bytes that were done before.
    """

    def __init__(self, progress: Progress | None, stage: str, total: int, done: int = 0) -> None:
        self._progress, self._stage = progress, stage
        self._total, self._done = total, done
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        """Correct the total: this is what is left to do."""
        with self._lock:
            self._total = self._done + nbytes

    def add(self, nbytes: int, tensor: str = "") -> None:
        """Account for bytes, and for the tensor that they finish."""
        # The lock is held while ``progress`` runs: it is promised one call at a time, in the order
        # of the figures. It must not add to this meter.
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(ProgressEvent(self._stage, self._done, self._total, tensor))
