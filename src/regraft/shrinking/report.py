"""What ``shrink`` answers: what became of every module and copy, and how far off it is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Layer = Literal["linear", "convolution", "embedding", "experts"]
Outcome = Literal["dropped", "differs", "absent", "incomparable", "not compared"]


@dataclass(frozen=True)
class ShrunkModule:
    """An adapted module (or parameter) before and after.

    The norms are Frobenius norms of the delta, its scale included: s * B A, over all experts.

    Attributes:
        name: the name its rank and alpha have in the config.
        layer: what kind of layer it is.
        rank_before: r in the adapter.
        rank_after: r in the output.
        kept: share of the squared norm of the delta that the new rank keeps, before rounding.
        delta_norm: norm of the delta in the adapter.
        error_norm: norm of what the delta in the output is off by, its rounding included.
    """

    name: str
    layer: Layer
    rank_before: int
    rank_after: int
    kept: float
    delta_norm: float
    error_norm: float

    @property
    def error(self) -> float:
        """What the delta is off by, relative to the delta; 0 where it is all zero."""
        return _relative(self.error_norm, self.delta_norm)

    def to_json(self) -> dict[str, Any]:
        """Return the module as JSON-ready objects."""
        return asdict(self) | {"error": self.error}


@dataclass(frozen=True)
class EmbeddingCopy:
    """An embedding that PEFT saved along although it belongs to the base.

    Attributes:
        name: the tensor's name in the adapter.
        bytes: what it takes there.
        outcome: ``"dropped"``: it is the base's, and left out; ``"differs"``: it is not the base's;
            ``"absent"``: the base has none such; ``"incomparable"``: the base stores it in a form
            that is not compared; ``"not compared"``: no base was named. All but the first are kept.
    """

    name: str
    bytes: int
    outcome: Outcome


@dataclass(frozen=True)
class ShrinkReport:
    """What a shrink did.

    Attributes:
        adapter: the adapter, as the user named it.
        revision: its Hub commit, or None.
        base: the base that copies were compared with, as the user named it, or None.
        output: the folder.
        dtype: what the factors are stored in, such as ``"bfloat16"``.
        dtypes_before: what they were stored in.
        rank: the rank that was asked for, or None.
        energy: the share of the squared norm that was asked for, or None.
        uniform: whether every scale was multiplied into B, and all ranks were made one.
        error: what all deltas together are off by, relative to all deltas.
        modules: one record per adapted module, in the order of their names.
        copies: one record per copy of an embedding.
        tensors: number of tensors in the output.
        bytes_before: size of the adapter's weights file.
        bytes_after: size of the output's weights file.
        files: other files that travelled along.
        left_out: files and folders of the adapter's folder that did not.
        warnings: sentences on deltas that are off by more than 5% of their norm.
        notes: sentences that are good to know.
        seconds: wall time, from the call to the renamed folder.
        peak_memory: peak resident memory of the process in bytes, as the system reports it.
    """

    adapter: str
    revision: str | None
    base: str | None
    output: str
    dtype: str
    dtypes_before: tuple[str, ...]
    rank: int | None
    energy: float | None
    uniform: bool
    error: float
    modules: tuple[ShrunkModule, ...]
    copies: tuple[EmbeddingCopy, ...]
    tensors: int
    bytes_before: int
    bytes_after: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return asdict(self) | {"modules": [module.to_json() for module in self.modules]}


def overall_error(modules: tuple[ShrunkModule, ...]) -> float:
    """Return what all deltas together are off by, relative to all of them."""
    off = math.hypot(*(module.error_norm for module in modules))
    return _relative(off, math.hypot(*(module.delta_norm for module in modules)))


def _relative(off: float, whole: float) -> float:
    return off / whole if whole else 0.0
