"""What ``combine`` answers: what became of every module, and how the adapters compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from regraft.deltas.methods.form import cosines
from regraft.deltas.ranks.reduction import Matrix


@dataclass(frozen=True)
class CombinedModule:
    """A module of the new adapter; norms are Frobenius norms of deltas with scales and weights.

    Attributes:
        name: the module's.
        kind: what kind of layer it is.
        adapters: the numbers of the adapters that have it, from 0.
        ranks: their ranks.
        rank: the new rank.
        norms: the norms of their deltas.
        norm: the norm of what the method makes of them.
        error_norm: the norm of what the new factors are off by of that, rounding included.
        kept: the share of its squared norm that the rank keeps, before rounding.
        cosines: of the deltas of each two of the adapters, without weights.
        disagreement: of each two of them the share of elements in which their signs differ.
    """

    name: str
    kind: str
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    norms: tuple[float, ...]
    norm: float
    error_norm: float
    kept: float
    cosines: tuple[tuple[float, ...], ...]
    disagreement: tuple[tuple[float, ...], ...]

    @property
    def error(self) -> float:
        """What the new delta is off by, relative to it; 0 where it is all zero."""
        return self.error_norm / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the module as JSON-ready objects."""
        return asdict(self) | {"error": self.error}


@dataclass(frozen=True)
class CombineReport:
    """What a combination did, or would do.

    Attributes:
        adapters: the adapters, as the user named them.
        weights: the factors on their scales.
        base: the base, as the user named it, or None.
        output: the folder, or None where nothing was written.
        method: its name.
        options: what the method was told.
        dtype: what the factors are stored in, such as ``"float32"``.
        modules: one record per module.
        tensors: number of tensors in the output.
        bytes: size of its weights file.
        error: what all new deltas together are off by, relative to them.
        cosines: of each two adapters, over all modules that both have.
        disagreement: likewise, the share of elements with different signs.
        advice: which method the adapters speak for, and why.
        notes: sentences that are good to know.
        seconds: wall time.
        peak_memory: peak resident memory of the process in bytes.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    base: str | None
    output: str | None
    method: str
    options: dict[str, Any]
    dtype: str
    modules: tuple[CombinedModule, ...]
    tensors: int
    bytes: int
    error: float
    cosines: tuple[tuple[float, ...], ...]
    disagreement: tuple[tuple[float, ...], ...]
    advice: str
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return asdict(self) | {"modules": [module.to_json() for module in self.modules]}


def overall_error(modules: Sequence[CombinedModule]) -> float:
    """Return what all new deltas together are off by, relative to them."""
    whole = math.hypot(*(module.norm for module in modules))
    return math.hypot(*(module.error_norm for module in modules)) / whole if whole else 0.0


def overall_cosines(
    modules: Sequence[CombinedModule], products: Sequence[Matrix], n: int
) -> Matrix:
    """Return the cosines of whole adapters: all deltas of each as one vector.

    Args:
        modules: the modules.
        products: the inner products of the deltas of each module, without weights.
        n: the number of adapters.
    """
    total = np.zeros((n, n))
    for module, own in zip(modules, products, strict=True):
        total[np.ix_(module.adapters, module.adapters)] += own
    return cosines(total)


def overall_disagreement(modules: Sequence[CombinedModule], n: int) -> Matrix:
    """Return the mean share of elements with different signs over the modules that both have."""
    total, counts = np.zeros((n, n)), np.zeros((n, n))
    for module in modules:
        at = np.ix_(module.adapters, module.adapters)
        total[at] += np.array(module.disagreement).reshape(total[at].shape)
        counts[at] += 1
    return np.divide(total, counts, out=np.zeros_like(total), where=counts > 0)


ALIKE, OPPOSED, APART = 0.5, -0.1, 0.1


def advice(between: Matrix, disagreement: Matrix) -> str:
    """Return which method adapters speak for, and why: by the cosines of their deltas."""
    n = len(between)
    if n < 2:
        return "One adapter: sum gives it back, at its own rank."
    pairs = [(between[i, j], disagreement[i, j]) for i in range(n) for j in range(i)]
    lowest, highest = min(p[0] for p in pairs), max(p[0] for p in pairs)
    signs = max(p[1] for p in pairs)
    seen = f"cosines of the deltas lie in {lowest:.2f} to {highest:.2f}"
    if lowest < OPPOSED:
        return (
            f"Two adapters pull against each other ({seen}; signs differ in up to {signs:.0%} of "
            "the elements): a sum takes from both. ties or knots keep of each element the side "
            "that has more."
        )
    if highest > ALIKE:
        return (
            f"Adapters do much of the same ({seen}): a sum does that part several times. Weights "
            "that add up to 1 average it; iso or tsv give no direction more than one adapter does."
        )
    if highest <= APART:
        return (
            f"The adapters hardly touch each other ({seen}): sum (exact), or svd with a rank, "
            "keeps what each does."
        )
    return (
        f"The adapters share a part ({seen}): try sum first; tsv and knots hold them apart where "
        "one answers in the other's words."
    )
