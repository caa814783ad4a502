"""Words of codes, parts of stored matrices, and values that have a scale each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from regraft.numerics.arrays import Bytes
from regraft.numerics.conversions import KINDS
from regraft.quant import grid
from regraft.quant.bit_packing import (
    codes_down,
    codes_of,
    lot_of,
    transposed,
    window,
    words_down,
    words_for,
    words_of,
)
from regraft.quant.rounding import codes_for
from regraft.quant.weight import ROUNDINGS
from regraft.tensors import TensorSpec


def random_words(*shape: int) -> npt.NDArray[np.uint32]:
    """Return random words."""
    return np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stream_has_the_lowest_bits_first(bits: int) -> None:
    words = random_words(lot_of(bits)[1] * 5)
    stream = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, bits)
    codes = codes_of(words, bits)
    assert np.array_equal(codes, (stream << np.arange(bits)).sum(1))
    assert np.array_equal(words_of(codes, bits), words)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 5, 40])
def test_columns_are_streams(bits: int, width: int) -> None:
    lot, per_lot = lot_of(bits)
    words = random_words(3 * per_lot, width)
    codes = codes_down(words, width, bits, 3 * lot)
    for column in range(width):
        stream = codes_of(np.ascontiguousarray(words[:, column]), bits)
        assert np.array_equal(codes[column::width], stream)
    assert np.array_equal(words_down(codes, width, bits).reshape(words.shape), words)
    fewer = words_down(codes[: width * (lot + 1)], width, bits)
    assert fewer.size == words_for(lot + 1, bits) * width


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 40), (3, 100)])
def test_words_are_transposed(shape: tuple[int, int]) -> None:
    words = random_words(*shape)
    assert np.array_equal(transposed(words), words.T)


@pytest.mark.parametrize("width", [1, 7, 1000, 5000])
def test_a_window_is_a_part_of_the_matrix(width: int) -> None:
    matrix = random_words(70, width)
    raw = matrix.tobytes()
    spec = TensorSpec("m", "I32", matrix.shape, Path("m"), 0, len(raw))
    reads = list[int]()

    def read(of: TensorSpec, offset: int, buffer: Bytes) -> None:
        assert of is spec
        reads.append(buffer.size)
        buffer[:] = np.frombuffer(raw[offset : offset + buffer.size], np.uint8)

    for rows in ((0, 70), (3, 69), (69, 70)):
        for columns in ((0, width), (width // 2, width), (width // 3, width // 3 + 1)):
            part = window(read, spec, rows, columns, np.uint32)
            assert np.array_equal(part, matrix[slice(*rows), slice(*columns)])
    assert max(reads) <= max(matrix.nbytes, 256 * 2**10)


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("has_zeros", [True, False])
def test_a_scale_for_each_value_is_as_good_as_one_for_several(
    kind: int, rounding: str, has_zeros: bool
) -> None:
    rng = np.random.default_rng(1)
    rows, columns, run = 3, 9000, 3
    levels = grid.Levels.of(np.arange(16))
    codes = rng.integers(0, 16, rows * columns).astype(np.uint8)
    scales = rng.standard_normal((rows, columns // run)).astype(np.float32) * np.float32(0.01)
    scales[0, :50] = 0
    zeros = rng.integers(0, 16, scales.shape).astype(np.float32)
    if not has_zeros:
        zeros = zeros[:0]
    wide = zeros.repeat(run, 1) if has_zeros else zeros
    some = grid.Codes(
        codes, rows, columns, levels, scales.ravel(), zeros.ravel(), columns // run, run
    )
    each = grid.Codes(
        codes, rows, columns, levels, scales.repeat(run, 1).ravel(), wide.ravel(), columns, 1
    )
    results = list[tuple[bytes, ...]]()
    changes = rng.standard_normal(rows * columns).astype(np.float32) * np.float32(0.02)
    for block in (some, each):
        x16 = np.zeros(0 if kind == KINDS["F32"] else codes.size, np.uint16)
        x32 = np.zeros(codes.size if kind == KINDS["F32"] else 0, np.float32)
        grid.values_of(block, x16, x32, kind)
        sums = np.zeros(2, np.float64)
        new = codes_for(block, kind, changes, rounding, 7, (0, columns), sums)
        assert (new != codes).any()
        results.append((x16.tobytes(), x32.tobytes(), new.tobytes()))
    assert results[0] == results[1]
