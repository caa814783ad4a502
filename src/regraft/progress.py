"""Progress of long work, told to whoever asks: the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """How far long work has come.

    Attributes:
        stage: ``"read"`` (headers), ``"resume"`` (what an earlier try did is looked at),
            ``"merge"``, ``"unmerge"``, ``"shrink"``, ``"verify"`` or ``"compare"`` (tensors),
            ``"prompts"`` (logits), or ``"finish"`` (flush and rename).
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
