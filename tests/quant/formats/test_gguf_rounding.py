"""Values rounded to codes of GGUF's blocks: held against what the gguf package decodes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from regraft.quant.formats.gguf_rounding import GRIDS, rounded
from regraft.quant.rounding import NOISE, SURVIVED
from regraft.testing.gguf_files import Array, blocks

ROWS, WIDTH = 48, 512


def decoded(raw: Array, kind: str) -> Array:
    found: Array = gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[kind])
    return found.reshape(-1)


@pytest.fixture(params=sorted(GRIDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stored(kind: str) -> Array:
    """Return blocks of a type with sane scales, any codes, and scales of parts of both signs."""
    rng = np.random.default_rng(3)
    raw = blocks(rng.normal(size=(ROWS, WIDTH)), kind, rng).reshape(-1, GRIDS[kind].nbytes).copy()
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    places = halves.get(kind, (0,) if kind.startswith("IQ4") else ())
    for at in places:
        scales = rng.uniform(0.01, 0.02, len(raw)).astype("<f2")
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(-1)


def test_values_that_codes_stand_for_keep_every_byte(kind: str, stored: Array) -> None:
    was = decoded(stored, kind)
    for rounding in ("nearest", "stochastic"):
        sums = np.zeros(2)
        found, changed = rounded(kind, stored, was, was.copy(), rounding, 7, 0, sums)
        assert np.array_equal(found, stored)
        assert (changed, *sums) == (0, 0, 0)


def test_the_sums_are_those_of_what_gguf_decodes(kind: str, stored: Array) -> None:
    was = decoded(stored, kind)
    delta = np.random.default_rng(4).normal(size=was.size).astype(np.float32) * 0.05
    values, sums = was + delta, np.zeros(2)
    found, changed = rounded(kind, stored, was, values, "stochastic", 7, 0, sums)
    after = decoded(found, kind)
    moved, added = (after - was).astype(np.float64), (values - was).astype(np.float64)
    assert sums[SURVIVED] == pytest.approx(moved @ added, rel=1e-9)
    assert sums[NOISE] == pytest.approx(np.sum((moved - added) ** 2), rel=1e-9)
    assert changed >= np.count_nonzero(after != was) > 0


def test_only_codes_change(kind: str, stored: Array) -> None:
    was, grid = decoded(stored, kind), GRIDS[kind]
    values = was + np.float32(0.1)
    found, _ = rounded(kind, stored, was, values, "stochastic", 7, 0, np.zeros(2))
    one, two = (raw.reshape(-1, grid.nbytes) for raw in (stored, found))
    rest = [at for at in range(grid.nbytes) if not grid.begin <= at < grid.end]
    assert np.array_equal(one[:, rest], two[:, rest])


def test_nearest_is_the_nearest_level_on_either_side(kind: str, stored: Array) -> None:
    """Held against a search of every code, in float64."""
    was, grid = decoded(stored, kind), GRIDS[kind]
    rng = np.random.default_rng(5)
    values = was + rng.normal(size=was.size).astype(np.float32) * 0.1
    found, _ = rounded(kind, stored, was, values, "nearest", 0, 0, np.zeros(2))
    count = grid.most - grid.least + 1
    rows = stored.reshape(-1, grid.nbytes)
    away = np.full(was.size, np.inf)
    for code in range(grid.least, grid.least + count):
        codes = np.full((len(rows), grid.elements), code, np.uint8)
        other = rows.copy()
        other[:, grid.begin : grid.end] = grid.pack(codes)
        with np.errstate(invalid="ignore"):
            away = np.minimum(away, np.abs(decoded(other, kind).astype(np.float64) - values))
    off = np.abs(decoded(found, kind).astype(np.float64) - values)
    assert np.all(off <= away * (1 + 1e-4) + 1e-6)


def test_on_average_nothing_of_a_small_delta_is_lost(kind: str, stored: Array) -> None:
    """Where a code has room on both sides."""
    grid = GRIDS[kind]
    middle = np.full((len(stored) // grid.nbytes, grid.elements), (grid.most + 1) // 2, np.uint8)
    raw = stored.reshape(-1, grid.nbytes).copy()
    raw[:, grid.begin : grid.end] = grid.pack(middle)
    was = decoded(raw, kind)
    sign = np.where(np.random.default_rng(6).random(was.size) < 0.5, -1, 1)
    delta = (1e-3 * sign).astype(np.float32)
    sums = np.zeros(2)
    rounded(kind, raw.reshape(-1), was, was + delta, "stochastic", 9, 0, sums)
    scales, _ = grid.scales(raw)
    steps = np.repeat(np.abs(scales), was.size // scales.size)
    gaps = 1.0 if grid.levels is None else 12.0
    alive = steps > 1e-3
    due = float(np.sum(np.square((was + delta - was)[alive], dtype=np.float64)))
    spread = np.sqrt(np.sum(steps[alive] * gaps * 1e-9))  # of a sum of coin tosses
    lost = due - sums[SURVIVED] + float(np.sum(np.square((was + delta - was)[~alive])))
    assert abs(lost) < 5 * spread


def test_bytes_do_not_depend_on_how_a_tensor_is_cut(kind: str, stored: Array) -> None:
    was, grid = decoded(stored, kind), GRIDS[kind]
    values = was + np.random.default_rng(7).normal(size=was.size).astype(np.float32) * 0.01
    whole, _ = rounded(kind, stored, was, values, "stochastic", 11, 0, np.zeros(2))
    cut, half = len(stored) // grid.nbytes // 3, grid.elements
    parts = [
        rounded(kind, stored[a * grid.nbytes : b * grid.nbytes], was[a * half : b * half],
                values[a * half : b * half], "stochastic", 11, a * half, np.zeros(2))[0]
        for a, b in ((0, cut), (cut, len(stored) // grid.nbytes))
    ]  # fmt: skip
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_no_number_or_beyond_the_grid(kind: str, stored: Array, value: float) -> None:
    was, grid = decoded(stored, kind), GRIDS[kind]
    values = np.full(was.size, value, np.float32)
    found, changed = rounded(kind, stored, was, values, "stochastic", 1, 0, np.zeros(2))
    codes = grid.unpack(found.reshape(-1, grid.nbytes)[:, grid.begin : grid.end])
    if np.isnan(value):
        assert changed == 0
        return
    scales, _ = grid.scales(found.reshape(-1, grid.nbytes))
    up = np.repeat(scales * np.sign(value), was.size // scales.size).reshape(codes.shape)
    assert np.all(codes[up > 0] == grid.most)
    assert np.all(codes[up < 0] == grid.least)


def test_blocks_without_a_scale_stay(kind: str) -> None:
    grid = GRIDS[kind]
    raw = np.zeros(4 * grid.nbytes, np.uint8)
    was = decoded(raw, kind)
    found, changed = rounded(kind, raw, was, was + 1, "stochastic", 1, 0, np.zeros(2))
    assert changed == 0
    assert np.array_equal(found, raw)
