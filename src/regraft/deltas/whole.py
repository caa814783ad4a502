"""Of a delta on a part of a stored tensor, the whole delta of its module that it is a part of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from regraft.deltas.views import Delta, View


@dataclass(frozen=True)
class Whole:
    """A module's delta, as the base stores the module.

    Attributes:
        name: tells it from other modules' deltas: the module, and the number of the expert.
        left: (rows, r), of all rows.
        right: (r, columns).
        first: the row that the part begins with.
        transposed: whether rows are input features, as transformers' Conv1D has them.
    """

    name: str
    left: View
    right: View
    first: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.result[0], self.right.result[1]

    @property
    def place(self) -> tuple[tuple[int, int], int, bool]:
        """What deltas on the same rows of a tensor have in common if modules are cut alike."""
        return self.shape, self.first, self.transposed


def whole_of(delta: Delta) -> Whole:
    """Return the delta of a module that a delta is a part of.

    Raises:
        ValueError: it is no product of an adapter's factors.
    """
    left, right = delta.left, delta.right
    if left is None or right is None or delta.origin is None:
        raise ValueError(f"a {delta.feature} delta is of no module's factors")
    transposed = left.transpose
    axis = 1 if transposed else 0  # of the features among the left factor's axes
    cut = left.select[axis]
    first = cut[0] if isinstance(cut, tuple) else 0
    select = (*left.select[:axis], None, *left.select[axis + 1 :])
    rows = left.shape[axis]
    matrix = (delta.rank, rows) if transposed else (rows, delta.rank)
    name = f"{delta.origin.module}[{_expert(left if transposed else right, delta.rank)}]"
    return Whole(name, replace(left, select=select, matrix=matrix), right, first, transposed)


def _expert(a: View, rank: int) -> int:
    """Return the number of the expert whose A a view is; 0 where there are no experts."""
    chosen = a.select[0]
    return chosen[0] // rank if isinstance(chosen, tuple) else 0
