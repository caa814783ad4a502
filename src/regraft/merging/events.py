"""Progress of long work, told to whoever asks: the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """How far a merge has come.

    Attributes:
        stage: ``"read"`` (headers), ``"merge"`` (tensors), or ``"finish"`` (flush and rename).
        done: bytes of output made so far.
        total: bytes of output in all; 0 while unknown.
        tensor: the tensor that was finished last, or ``""``.
    """

    stage: str
    done: int
    total: int
    tensor: str = ""


Progress = Callable[[ProgressEvent], None]
"""What the ``progress`` argument takes; called from worker threads, one call at a time."""
