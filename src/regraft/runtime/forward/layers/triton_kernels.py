"""Kernels for graphics processors: updates that differ from row to row, and the exact merge.

Factors are read where they lie, by tables of their addresses, as SGMV does (Chen et al. 2023,
arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285): no adapter is copied or padded in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

Pair = tuple[Tensor, Tensor]

TOKENS = 32
"""Tokens of a tile; a tile is of one adapter."""

WIDTH = 64
"""Columns of a tile."""

MAX_SPLITS = 8
"""In how many parts the inner dimension of the first product is worked on side by side."""

BUSY = 256
"""So many tiles keep a processor busy; with fewer, the inner dimension is split."""


# -- updates of rows -------------------------------------------------------------------------------


@triton.jit
def _token(order, start, place, seq):
    """Return the token at a place of a group: row by row, as the batch holds them."""
    row = tl.load(order + start + place // seq)
    return row.to(tl.int64) * seq + place % seq


@triton.jit
def _shrink(
    x, hidden, factors, ranks, order, starts, counts, seq, width, per_split, all_places, x_stride,
    FACTOR: tl.constexpr, COMPUTE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """hidden[split, place] = the split's part of x[token] Aᵀ, in float32."""
    group = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(starts + group)
    count = tl.load(counts + group) * seq
    if tl.program_id(0) * TOKENS >= count:
        return
    rank = tl.load(ranks + group)
    a = tl.load(factors + group).to(tl.pointer_type(FACTOR))
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = place < count
    token = _token(order, start, tl.where(here, place, 0), seq)
    k = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, width)
    for at in range(first, last, WIDTH):
        column = at + tl.arange(0, WIDTH)
        inside = column < last
        taken = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=here[:, None] & inside[None, :],
            other=0.0,
        )
        factor = tl.load(
            a + k[None, :] * width + column[:, None],
            mask=(k < rank)[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(taken.to(COMPUTE), factor.to(COMPUTE), total, input_precision="ieee")
    line = split.to(tl.int64) * all_places + start.to(tl.int64) * seq + place
    tl.store(hidden + line[:, None] * RANK + k[None, :], total, mask=here[:, None])


@triton.jit
def _expand(
    hidden, out, factors, ranks, order, starts, counts, seq, width, all_places, out_stride,
    FACTOR: tl.constexpr, COMPUTE: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[token] += hidden[place] Bᵀ, with the splits of hidden added in their order."""
    group = tl.program_id(1)
    start = tl.load(starts + group)
    count = tl.load(counts + group) * seq
    if tl.program_id(0) * TOKENS >= count:
        return
    rank = tl.load(ranks + group)
    b = tl.load(factors + group).to(tl.pointer_type(FACTOR))
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = place < count
    token = _token(order, start, tl.where(here, place, 0), seq)
    k = tl.arange(0, RANK)
    line = start.to(tl.int64) * seq + place
    small = tl.zeros((TOKENS, RANK), tl.float32)
    for split in tl.static_range(SPLITS):
        at = line + tl.full((), split, tl.int64) * all_places
        small += tl.load(hidden + at[:, None] * RANK + k[None, :], mask=here[:, None], other=0.0)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    factor = tl.load(
        b + column[None, :].to(tl.int64) * rank + k[:, None],
        mask=inside[None, :] & (k < rank)[:, None],
        other=0.0,
    )
    update = tl.dot(small.to(COMPUTE), factor.to(COMPUTE), input_precision="ieee")
    target = out + token[:, None] * out_stride + column[None, :]
    mask = here[:, None] & inside[None, :]
    before = tl.load(target, mask=mask, other=0.0)
    tl.store(target, (before.to(tl.float32) + update).to(out.dtype.element_ty), mask=mask)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

PRODUCT_DTYPES = dict(_DTYPES)
"""What the factors of a product are rounded to, by the dtype of the batch; sums are float32."""


class SegmentedLora:
    """Adds to each row of a batch the update of its own pair, in place.

    Args:
        pairs: A (r, in) and B (out, r) with the scale in it, all of one dtype, on one device. The
            tensors are kept; values that change in place are seen.
        rows: for each row of the batch the number of its pair, or None.
    """

    def __init__(self, pairs: Sequence[Pair], rows: Sequence[int | None]) -> None:
        self._made_of = (tuple(pairs), tuple(rows))
        self._pairs = [(a.detach().contiguous(), b.detach().contiguous()) for a, b in pairs]
        groups = [(n, [i for i, row in enumerate(rows) if row == n]) for n in range(len(pairs))]
        self._groups = [(n, g) for n, g in groups if g and pairs[n][0].shape[0]]
        device = pairs[0][0].device
        used = [self._pairs[number] for number, _ in self._groups]
        lengths = [len(group) for _, group in self._groups]
        starts = [sum(lengths[:n]) for n in range(len(lengths))]

        def table(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self._a = table([a.data_ptr() for a, _ in used], torch.int64)
        self._b = table([b.data_ptr() for _, b in used], torch.int64)
        self._ranks = table([a.shape[0] for a, _ in used])
        self._order = table([row for _, group in self._groups for row in group])
        self._starts, self._counts = table(starts), table(lengths)
        self._rows, self._longest = sum(lengths), max(lengths, default=0)
        self._rank = max(16, triton.next_power_of_2(max((a.shape[0] for a, _ in used), default=1)))

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Return ``out`` after each row's update was added to it.

        Args:
            x: (rows, ..., in).
            out: (rows, ..., out).
        """
        if not self._groups or not out.numel():
            return out
        flat_x = x.reshape(-1, x.shape[-1]).contiguous()
        flat = (
            out.view(-1, out.shape[-1]) if out.is_contiguous() else out.reshape(-1, out.shape[-1])
        )
        self._add(flat_x, flat, flat_x.shape[0] // x.shape[0])
        return out if flat.data_ptr() == out.data_ptr() else out.copy_(flat.view_as(out))

    def __reduce__(self) -> tuple[type[SegmentedLora], tuple[object, ...]]:
        """Copies are made anew: the tables hold addresses."""
        return SegmentedLora, self._made_of

    def _add(self, x: Tensor, out: Tensor, seq: int) -> None:
        factor = self._pairs[0][0].dtype
        exact = torch.float32 in (factor, x.dtype) or factor != x.dtype
        kinds = {
            "FACTOR": _DTYPES[factor],
            "COMPUTE": tl.float32 if exact else PRODUCT_DTYPES[x.dtype],
        }
        tiles = triton.cdiv(self._longest * seq, TOKENS)
        groups, places = len(self._groups), self._rows * seq
        splits = _splits(tiles * groups, x.shape[1])
        hidden = torch.empty((splits, places, self._rank), dtype=torch.float32, device=x.device)
        about = (self._ranks, self._order, self._starts, self._counts, seq)
        sizes = {"RANK": self._rank, "TOKENS": TOKENS, "WIDTH": WIDTH}
        per_split = triton.cdiv(triton.cdiv(x.shape[1], splits), WIDTH) * WIDTH
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            _shrink[(tiles, groups, splits)](
                x, hidden, self._a, *about, x.shape[1], per_split, places, x.stride(0),
                **kinds, **sizes,
            )  # fmt: skip
            _expand[(tiles, groups, triton.cdiv(out.shape[1], WIDTH))](
                hidden, out, self._b, *about, out.shape[1], places, out.stride(0),
                **kinds, **sizes, SPLITS=splits,
            )  # fmt: skip


def _splits(tiles: int, width: int) -> int:
    """Return into how many parts to split the inner dimension: a power of two."""
    splits = 1
    while splits < MAX_SPLITS and tiles * splits < BUSY and width >= 4 * WIDTH * splits:
        splits *= 2
    return splits


# -- the merge -------------------------------------------------------------------------------------


@triton.jit
def _merge(
    weight, result, lefts, rights, ranks, scales, rows, columns, row_stride, column_stride,
    ADAPTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """result = weight plus all deltas, by the order of operations in docs/arithmetic.md."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = row < rows
    in_columns = column < columns
    inside = in_rows[:, None] & in_columns[None, :]
    at = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    total = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    for number in range(ADAPTERS):
        b = tl.load(lefts + number).to(tl.pointer_type(tl.float32))
        a = tl.load(rights + number).to(tl.pointer_type(tl.float32))
        rank = tl.load(ranks + number)
        scale = tl.load(scales + number)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        next_left = b + row.to(tl.int64) * rank
        next_right = a + column
        for _ in range(rank):
            left = tl.load(next_left, mask=in_rows, other=0.0)
            right = tl.load(next_right, mask=in_columns, other=0.0)
            next_left += 1
            next_right += columns
            acc = tl.fma(
                tl.broadcast_to(left[:, None], (ROWS, COLUMNS)),
                tl.broadcast_to(right[None, :], (ROWS, COLUMNS)),
                acc,
            )
        total = tl.fma(tl.broadcast_to(scale, (ROWS, COLUMNS)), acc, total)
    kind = result.dtype.element_ty
    if kind == tl.float32:
        tl.store(result + at, total, mask=inside)
    else:
        tl.store(result + at, total.to(kind, fp_downcast_rounding="rtne"), mask=inside)


def merge(
    weight: Tensor, pairs: Sequence[Pair], scales: Sequence[float], result: Tensor | None = None
) -> Tensor:
    """Add low-rank deltas to a weight, with the bits that a merge of files gives.

    The order of operations is that of docs/arithmetic.md: for each pair in turn a sum over k
    ascending by fused multiply-add in float32, which is then added, times its scale; one rounding
    to nearest even at the end.

    Args:
        weight: (rows, columns), of any strides; float32, bfloat16 or float16.
        pairs: A (r, columns) and B (rows, r); converted to float32, which is exact.
        scales: a factor for each pair, rounded to float32.
        result: where the result goes, with the strides of ``weight``; by default ``weight`` itself.

    Returns:
        ``result``.

    Raises:
        ValueError: ``result`` is not laid out as ``weight`` is.
    """
    result = weight if result is None else result
    if result.shape != weight.shape or result.stride() != weight.stride():
        raise ValueError("the result has to have the shape and the strides of the weight")
    rights = [a.detach().to(torch.float32).contiguous() for a, _ in pairs]
    lefts = [b.detach().to(torch.float32).contiguous() for _, b in pairs]
    rows, columns = weight.shape

    def table(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=weight.device)

    grid = (triton.cdiv(rows, 32), triton.cdiv(columns, 128))
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        _merge[grid](
            weight, result, table([b.data_ptr() for b in lefts], torch.int64),
            table([a.data_ptr() for a in rights], torch.int64),
            table([a.shape[0] for a in rights], torch.int32), table(scales, torch.float32),
            rows, columns, *weight.stride(), ADAPTERS=len(pairs), ROWS=32, COLUMNS=128,
        )  # fmt: skip
    return result
