"""A low-rank update that differs from row to row of a batch, in a few batched products.

Rows of a batch that use the same adapter form a group. Groups are cut into chunks of one size, so
that all chunks of similar rank are one batched product. What that costs hardly depends on how many
adapters there are; a loop over adapters would take as many small products as there are adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from regraft.runtime.forward.layers import on_gpu

Pair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r); the scale is in B."""

CHUNK_COST = 0.25
"""What a chunk costs by itself (its factors are read), as a share of what a row costs."""

GATHER_COST = 20.0
"""What it costs to take a row from its place and to put its result back, in ranks of one row."""

PART_COST = 8.0
"""What a further batched product costs by itself, in ranks of one row."""


@dataclass(frozen=True)
class Layout:
    """How the rows of one bucket are laid out in chunks.

    Attributes:
        rank: what the pairs are padded to.
        size: rows of each chunk.
        owners: the pair that each chunk is for.
        places: the row of the batch in each place of each chunk; a place to spare has row -1.
    """

    rank: int
    size: int
    owners: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def is_full(self) -> bool:
        """Whether no place is to spare."""
        return -1 not in self.places

    @property
    def is_run(self) -> bool:
        """Whether the places are consecutive rows, so that nothing has to be moved."""
        first = self.places[0]
        return self.is_full and self.places == tuple(range(first, first + len(self.places)))

    @property
    def cost(self) -> float:
        """The layout's cost, counted in ranks of one row."""
        moved = 0.0 if self.is_run else GATHER_COST * len(self.places)
        return self.rank * (len(self.places) + CHUNK_COST * len(self.owners)) + moved


def rank_buckets(ranks: Sequence[int]) -> list[list[int]]:
    """Return pair numbers by rank, those between two powers of two together.

    Within a bucket ranks are padded to the largest, which at most doubles any.
    """
    buckets: dict[int, list[int]] = {}
    for number, rank in enumerate(ranks):
        if rank:
            buckets.setdefault((rank - 1).bit_length(), []).append(number)
    return [buckets[key] for key in sorted(buckets)]


def lay_out(ranks: Sequence[int], rows: Sequence[int | None]) -> tuple[Layout, ...]:
    """Return the cheapest layouts that together hold all rows; each is for a range of ranks.

    Neighbouring buckets of ranks become one where padding costs less than to pick rows apart.

    Args:
        ranks: of the pairs.
        rows: the pair that each row of the batch uses.
    """
    used = {number for number in rows if number is not None}
    buckets = [[n for n in bucket if n in used] for bucket in rank_buckets(ranks)]
    buckets = [bucket for bucket in buckets if bucket]
    best: list[tuple[float, tuple[Layout, ...]]] = [(0.0, ())]  # by the number of buckets done
    for last in range(1, len(buckets) + 1):
        choices = []
        for first in range(last):
            layout = _one_layout(ranks, rows, [n for bucket in buckets[first:last] for n in bucket])
            cost, before = best[first]
            choices.append((cost + layout.cost + PART_COST, (*before, layout)))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]


def _one_layout(ranks: Sequence[int], rows: Sequence[int | None], members: list[int]) -> Layout:
    """Return the cheapest single layout of the rows that use one of ``members``."""
    groups: dict[int, list[int]] = {number: [] for number in members}
    for row, number in enumerate(rows):
        if number in groups:
            groups[number].append(row)
    rank = max(ranks[number] for number in members)
    longest = max(len(group) for group in groups.values())
    sizes = range(1, longest + 1)
    return min((_in_chunks(groups, rank, size) for size in sizes), key=lambda lay: lay.cost)


def _in_chunks(groups: dict[int, list[int]], rank: int, size: int) -> Layout:
    """Cut groups into chunks; chunks are in the order of their first rows."""
    chunks = [
        (group[at : at + size], number)
        for number, group in groups.items()
        for at in range(0, len(group), size)
    ]
    chunks.sort()
    places = [row for chunk, _ in chunks for row in [*chunk, *[-1] * (size - len(chunk))]]
    return Layout(rank, size, tuple(number for _, number in chunks), tuple(places))


class GroupedLora:
    """Adds to each row of a batch the update of its own adapter.

    Made once per module and assignment, called with every batch. Factors that are not being trained
    are stacked when it is made, and must not change after that; others are stacked in each call, so
    that gradients reach them.

    Args:
        pairs: the distinct pairs; ranks may differ. Pairs of several dtypes meet in the one that
            holds them all.
        rows: for each row of the batch the number of its pair, or None: such a row stays as it is.

    Raises:
        ValueError: there are no rows, a number is out of range, or shapes do not agree.
    """

    def __init__(self, pairs: Sequence[Pair], rows: Sequence[int | None]) -> None:
        _check(pairs, rows)
        self.pairs, self.rows = tuple(pairs), tuple(rows)
        self._trained = any(t.requires_grad for pair in pairs for t in pair)
        self._on_gpu = None if self._trained else on_gpu.grouped(self.pairs, self.rows)
        # The kernels read factors where they lie; a stack of them is made only if it is needed.
        self._parts = self._stacks() if self._on_gpu is None else None

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Return ``out`` plus each row's update; where no gradient is needed, in ``out`` itself.

        Args:
            x: what the layer was given, (rows, ..., in).
            out: what it answered, (rows, ..., out).

        Raises:
            ValueError: the batch does not have as many rows as were assigned.
        """
        if x.shape[0] != len(self.rows):
            raise ValueError(f"the batch has {x.shape[0]} rows, and {len(self.rows)} were assigned")
        in_place = not self._needs_grad(x, out)
        if in_place and self._on_gpu is not None and on_gpu.can_take(x, out):
            return self._on_gpu(x, out)
        if self._parts is None:
            self._parts = self._stacks()
        for part in self._parts:
            out = part.add(x, out, in_place)
        return out

    def _stacks(self) -> list[_Part]:
        layouts = lay_out([a.shape[0] for a, _ in self.pairs], self.rows)
        with torch.inference_mode(False):  # what is made here has to serve in training too
            return [_Part(self.pairs, layout) for layout in layouts]

    def __reduce__(self) -> tuple[type[GroupedLora], tuple[object, ...]]:
        """Copies are made anew: what is stacked or pointed to belongs to the original."""
        return GroupedLora, (self.pairs, self.rows)

    def _needs_grad(self, x: Tensor, out: Tensor) -> bool:
        return torch.is_grad_enabled() and (self._trained or x.requires_grad or out.requires_grad)


class _Part:
    """The rows of one bucket of ranks."""

    def __init__(self, pairs: Sequence[Pair], layout: Layout) -> None:
        self._pairs = [pairs[number] for number in layout.owners]
        self._layout, self._run = layout, layout.is_run
        self._first, self._count = layout.places[0], len(layout.places)
        device = self._pairs[0][0].device
        filled = [place for place, row in enumerate(layout.places) if row >= 0]
        rows = [layout.places[place] for place in filled]
        self._filled = torch.tensor(filled, device=device)
        self._rows = torch.tensor(rows, device=device)
        # A place to spare takes a copy of some row; its result is dropped.
        self._taken = torch.tensor([max(row, 0) for row in layout.places], device=device)
        self._full = layout.is_full
        self._stacked: Pair | None = None
        if not any(t.requires_grad for pair in self._pairs for t in pair):
            with torch.no_grad():
                self._stacked = self._stack()

    def add(self, x: Tensor, out: Tensor, in_place: bool) -> Tensor:
        """Return ``out`` plus the update of the bucket's rows."""
        a, b = self._stacked if self._stacked is not None else self._stack()
        if self._run and in_place and out.is_contiguous() and out.dtype == a.dtype:
            mine = out.narrow(0, self._first, self._count).view(len(a), -1, out.shape[-1])
            hidden = self._shrink(x.narrow(0, self._first, self._count), a)
            mine.baddbmm_(hidden.to(b.dtype), b)  # under autocast it is of another dtype
            return out
        if self._run:
            taken = x.narrow(0, self._first, self._count)
        else:
            taken = x.index_select(0, self._taken)
        delta = torch.bmm(self._shrink(taken, a), b)
        delta = delta.view(self._count, *x.shape[1:-1], b.shape[-1])
        if self._run and in_place:
            out.narrow(0, self._first, self._count).add_(delta)
            return out
        delta = delta.to(out.dtype)
        if not self._full:
            delta = delta.index_select(0, self._filled)
        add = out.index_add_ if in_place else out.index_add
        return add(0, self._rows, delta)

    def _shrink(self, x: Tensor, a: Tensor) -> Tensor:
        """Return x Aᵀ, (chunks, tokens of a chunk, r)."""
        return torch.bmm(x.to(a.dtype).reshape(len(a), -1, x.shape[-1]), a)

    def _stack(self) -> Pair:
        """Return Aᵀ (chunks, in, r) and Bᵀ (chunks, r, out), padded with zeros to one rank."""
        rank = max(a.shape[0] for a, _ in self._pairs)
        dtype = reduce(torch.promote_types, (t.dtype for pair in self._pairs for t in pair))
        pad = torch.nn.functional.pad
        a = [pad(a.to(dtype).t(), (0, rank - a.shape[0])) for a, _ in self._pairs]
        b = [pad(b.to(dtype).t(), (0, 0, 0, rank - b.shape[1])) for _, b in self._pairs]
        return torch.stack(a), torch.stack(b)


def _check(pairs: Sequence[Pair], rows: Sequence[int | None]) -> None:
    if not rows:
        raise ValueError("no rows were assigned")
    for number in rows:
        if number is not None and not 0 <= number < len(pairs):
            raise ValueError(f"a row is assigned to pair {number}, and there are {len(pairs)}")
    for a, b in pairs:
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"no pair: A is {tuple(a.shape)} and B is {tuple(b.shape)}")
        if (a.shape[1], b.shape[0]) != (pairs[0][0].shape[1], pairs[0][1].shape[0]):
            raise ValueError("pairs of one module have to agree in its width")
