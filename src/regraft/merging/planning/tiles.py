"""Cutting a step into tiles, the pieces of a tensor that are in memory at one time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from regraft.deltas.matrix_units import UNIT_COLUMNS
from regraft.merging.planning.plan import Step
from regraft.quant.weight import Block
from regraft.tensors import DTYPES


@dataclass(frozen=True)
class Tile:
    """A contiguous piece of a step's work.

    Attributes:
        number: 0-based; tiles of a step are hashed in this order.
        kind: ``bytes`` are copied, ``values`` converted, ``rows`` merged, ``append`` made from
            patches alone.
        rows: half-open range of rows (``rows``, ``append``), or of values (``values``).
        columns: half-open range of columns; less than a whole row only when rows are split.
        read_at, read: offset in the source and length, in bytes.
        write_at, write: offset in the result and length, in bytes.
    """

    number: int
    kind: Literal["bytes", "values", "rows", "append"]
    rows: tuple[int, int]
    columns: tuple[int, int]
    read_at: int
    read: int
    write_at: int
    write: int


def tiles_of(step: Step, tile_bytes: int, grain: int = 1) -> Iterator[Tile]:
    """Yield a step's tiles in order; each reads at most about ``tile_bytes``, whole units.

    Args:
        step: the step.
        tile_bytes: how much may be read at a time.
        grain: bytes of the source whose multiples are good places to cut it.
    """
    if grain <= tile_bytes:
        tile_bytes -= tile_bytes % grain
    if step.only_scales:
        yield from _byte_tiles(step.nbytes, tile_bytes)
    elif step.segments or step.patches or step.codes_of is not None:
        yield from _row_tiles(step, tile_bytes)
    elif step.source.dtype == step.dtype:
        yield from _byte_tiles(step.source.nbytes, tile_bytes)
    else:
        yield from _value_tiles(step, tile_bytes)


def whole_tile(step: Step) -> Tile:
    """Return one tile of all bytes of a step that copies them."""
    return next(_byte_tiles(step.nbytes, max(step.nbytes, 1)))


def _byte_tiles(total: int, tile_bytes: int) -> Iterator[Tile]:
    for number, start in enumerate(range(0, max(total, 1), tile_bytes)):
        length = min(tile_bytes, total - start)
        yield Tile(number, "bytes", (0, 0), (0, 0), start, length, start, length)


def _value_tiles(step: Step, tile_bytes: int) -> Iterator[Tile]:
    size, out_size = _sizes(step)
    total, each = step.source.numel, max(1, tile_bytes // size)
    for number, start in enumerate(range(0, max(total, 1), each)):
        stop = min(start + each, total)
        count = stop - start
        yield Tile(
            number, "values", (start, stop), (0, 1), start * size, count * size,
            start * out_size, count * out_size,
        )  # fmt: skip


def _row_tiles(step: Step, tile_bytes: int) -> Iterator[Tile]:
    height, width = step.matrix
    size, out_size = _sizes(step)
    each, units = tile_bytes // (width * size), step.units
    number = 0
    if each >= 1 or needs_whole_rows(step):
        grain = math.lcm(units.rows, row_grain(step))
        each = max(each - each % grain, grain)
        for first in range(0, height, each):
            last = min(first + each, height)
            tile = _block(number, (first, last), (0, width), width, size, out_size)
            yield _coded(step, tile)
            number += 1
    else:
        step_columns = max(tile_bytes // size // UNIT_COLUMNS, 1) * UNIT_COLUMNS
        for row in range(height):
            for left in range(0, width, step_columns):
                right = min(left + step_columns, width)
                tile = _block(number, (row, row + 1), (left, right), width, size, out_size)
                yield _coded(step, tile)
                number += 1
    yield from _appended(step, number, height, width, tile_bytes, out_size)


def _block(
    number: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    width: int,
    size: int,
    out_size: int,
) -> Tile:
    at = rows[0] * width + columns[0]
    count = (rows[1] - rows[0]) * (columns[1] - columns[0])
    return Tile(number, "rows", rows, columns, at * size, count * size, at * out_size,
                count * out_size)  # fmt: skip


def _appended(
    step: Step, number: int, height: int, width: int, tile_bytes: int, out_size: int
) -> Iterator[Tile]:
    total = step.shape[0] if step.shape else 0
    if not step.patches or total <= height:
        return
    each = max(1, tile_bytes // (width * out_size))
    for first in range(height, total, each):
        last = min(first + each, total)
        at, length = first * width * out_size, (last - first) * width * out_size
        yield Tile(number, "append", (first, last), (0, width), 0, 0, at, length)
        number += 1


def needs_whole_rows(step: Step) -> bool:
    """Whether a row cannot be split: its DoRA norm is taken over all of it, or its codes are not
    packed row by row."""
    return row_grain(step) > 1 or any(
        d.magnitude is not None and not d.by_column for d in step.deltas
    )


def smallest_tile(step: Step, *, backwards: bool = False) -> int:
    """Return the bytes that have to be read at a time: rows that cannot be split.

    Backwards, codes are always told from whole rows.
    """
    if not needs_whole_rows(step) and not (backwards and step.coded is not None):
        return 0
    height, width = step.matrix
    rows = min(math.lcm(step.units.rows, row_grain(step)), height)
    return rows * width * step.source.itemsize


def row_grain(step: Step) -> int:
    """Return how many rows have to stay together for their codes to be whole bytes."""
    weight = step.codes_of
    return weight.codec.row_grain(weight) if weight is not None else 1


def _coded(step: Step, tile: Tile) -> Tile:
    """Return a tile with the place of its codes, where codes are what is written."""
    weight = step.codes_of
    if weight is None:
        return tile
    at, length = weight.codec.place(weight, Block(tile.rows, tile.columns))
    return replace(tile, write_at=at, write=length)


def _sizes(step: Step) -> tuple[int, int]:
    return step.source.itemsize, DTYPES[step.dtype].bits // 8
