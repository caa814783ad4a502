"""Factors and deltas as data: which part of a stored tensor is a matrix, and its use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regraft.tensors import TensorSpec

Select = int | tuple[int, int] | None
"""One axis of a view: an index (the axis goes away), a half-open range, or all of it."""


@dataclass(frozen=True)
class View:
    """A matrix (or vector) read from a stored tensor and converted to float32.

    The tensor is reshaped to ``shape``, ``select`` is applied axis by axis, and the result is
    reshaped to two axes and transposed if asked. A view without a tensor is a matrix of ones.

    Attributes:
        spec: the stored tensor, or None for ones.
        shape: the shape to read it as.
        select: one entry per axis of ``shape``.
        matrix: rows and columns before ``transpose``.
        transpose: whether the matrix is meant the other way round.
    """

    spec: TensorSpec | None
    shape: tuple[int, ...]
    select: tuple[Select, ...]
    matrix: tuple[int, int]
    transpose: bool = False

    @property
    def result(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        rows, columns = self.matrix
        return (columns, rows) if self.transpose else (rows, columns)


ONE = View(None, (1, 1), (None, None), (1, 1))
"""The factor of a delta that is a plain vector."""


def matrix_view(
    spec: TensorSpec,
    rows: int,
    columns: int,
    *,
    keep: tuple[int, int] | None = None,
    transpose: bool = False,
) -> View:
    """Return a view of a tensor as ``(rows, columns)``, or of a range of its rows."""
    kept = keep or (0, rows)
    return View(spec, (rows, columns), (kept, None), (kept[1] - kept[0], columns), transpose)


Feature = Literal["lora", "dora", "lora-bias", "pissa", "olora"]


@dataclass(frozen=True)
class Origin:
    """Whose delta one is: what methods ask for that make one of several otherwise than by a sum.

    Attributes:
        module: the module, as its adapter names it.
        scale: the adapter's own, rounded to float32 once.
        weight: the user's factor.
    """

    module: str
    scale: float
    weight: float


@dataclass(frozen=True)
class Delta:
    """One low-rank addition to a range of rows of a stored weight.

    Attributes:
        adapter: which adapter of the merge it comes from, 0-based.
        feature: what it is.
        rows: half-open range of rows of the stored weight, seen as a matrix.
        rank: r.
        scale: the float32 it is multiplied by.
        left: (rows, r); None for a residual that has to be computed from the weight.
        right: (r, columns); None likewise.
        magnitude: DoRA's magnitudes, (n, 1), or None.
        by_column: whether DoRA's norms run along columns (weights stored transposed, embeddings).
        origin: whose it is; None for a residual, and for a bias.
    """

    adapter: int
    feature: Feature
    rows: tuple[int, int]
    rank: int
    scale: float
    left: View | None
    right: View | None
    magnitude: View | None = None
    by_column: bool = False
    origin: Origin | None = None

    @property
    def is_residual(self) -> bool:
        """Whether the delta is what PiSSA or OLoRA took out of the base at their start."""
        return self.feature in ("pissa", "olora")


@dataclass(frozen=True)
class RowPatch:
    """Rows of an embedding that are replaced (or, past its end, appended).

    Attributes:
        adapter: which adapter they come from.
        indices: row numbers.
        values: (n, columns), float32.
    """

    adapter: int
    indices: tuple[int, ...]
    values: View
