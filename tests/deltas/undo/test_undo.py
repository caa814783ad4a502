"""What is kept of weights gives them back exactly, whatever they are and however they were cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deltas import reference
from regraft.deltas.kernels import merge as kernels
from regraft.deltas.kernels.streams import PLAIN
from regraft.deltas.kernels.weights import Weights
from regraft.deltas.matrix_units import UNIT_COLUMNS, Units
from regraft.deltas.undo import correction_coding as planes
from regraft.deltas.undo.units import Decoder, Encoder, TileCorrection, TileRows, merge, sizes_of

SIZES = {"F32": 4, "BF16": 2, "F16": 2}
FLAGS = (0, kernels.ROW_FACTOR, kernels.COLUMN_FACTOR, kernels.ROUND_TO_SOURCE)
ODD = np.array(
    [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-38, -1e-42, 6e-5, -6e-8, 65000.0], np.float32
)


@dataclass(frozen=True)
class Case:
    """A matrix and its deltas, merged."""

    rows: int
    columns: int
    source: str
    merged: str
    raw: np.ndarray
    result: np.ndarray
    run: TileRows

    @property
    def units(self) -> Units:
        return Units.of(self.rows, self.columns, [])

    @property
    def item(self) -> int:
        return SIZES[self.source]


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values as the bytes of a dtype."""
    raw = np.zeros(values.size * SIZES[dtype], np.uint8)
    flat = np.ascontiguousarray(values.ravel())
    Weights.of_bytes(raw, dtype).take(Weights.of_floats(flat), np.zeros(4))
    return raw


def merged_case(
    rows: int, columns: int, source: str, merged: str, *, seed: int = 0, flags: Any = (0,),
    rank: int = 3, relative: float = 0.01, size: float = 0.02, odd: bool = False,
) -> Case:  # fmt: skip
    """Draw a matrix with deltas of the given flags and merge it."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(rows, columns)) * size).astype(np.float32)
    if odd:
        places = rng.random(values.shape) < 0.3
        values[places] = rng.choice(ODD, int(places.sum()))
    raw = stored(values, source)
    table = np.zeros((len(flags), 5), np.int64)
    left, right, factors = [], [], [np.empty(0, np.float32)]
    for line, flag in zip(table, flags, strict=True):
        done = sum(f.size for f in factors)
        line[:] = (rows * rank * len(left), columns * rank * len(right), rank, flag, done)
        left.append(rng.normal(size=rows * rank).astype(np.float32) * np.float32(relative * size))
        right.append(rng.normal(size=columns * rank).astype(np.float32))
        if flag & (kernels.ROW_FACTOR | kernels.COLUMN_FACTOR):
            count = rows if flag & kernels.ROW_FACTOR else columns
            factors.append((1 + 0.05 * rng.normal(size=count)).astype(np.float32))
    result = np.zeros(values.size * SIZES[merged], np.uint8)
    run = TileRows(
        Weights.of_bytes(raw, source), Weights.of_bytes(result, merged), rows, columns, 0, 0,
        np.concatenate([np.empty(0, np.float32), *left]),
        np.concatenate([np.empty(0, np.float32), *right]), columns, table,
        np.linspace(0.5, 1.5, len(flags)).astype(np.float32), np.concatenate(factors), 0,
    )  # fmt: skip
    return Case(rows, columns, source, merged, raw, result, run)


def keep(case: Case) -> TileCorrection:
    """Merge and keep, all in one tile."""
    encoder = Encoder()
    encoder.begin(case.units, 0, case.units.count, case.item)
    merge(case.run, np.zeros(4), encoder)
    return encoder.finish(case.raw)


def restored(case: Case, kept: TileCorrection) -> tuple[np.ndarray, bool]:
    """Return the weights as they are restored, and whether the streams were sound."""
    raw = np.full_like(case.raw, 0xAA)
    decoder = Decoder(case.units, 0, case.units.count, kept, case.item)
    decoder.restore(replace(case.run, source=Weights.of_bytes(raw, case.source)))
    return raw, decoder.finish(raw)


def assert_exact(case: Case) -> TileCorrection:
    kept = keep(case)
    raw, sound = restored(case, kept)
    assert np.array_equal(raw, case.raw)
    assert sound
    return kept


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 9),
    columns=st.sampled_from([1, 2, 7, 511, 512, 513, 1030]),
    source=st.sampled_from(list(SIZES)),
    merged=st.sampled_from(list(SIZES)),
    flags=st.lists(st.sampled_from(FLAGS), max_size=3),
    relative=st.sampled_from([0.0, 1e-6, 1e-3, 0.05, 1.0, 1e3]),
    size=st.sampled_from([1.0, 0.02, 1e-6, 1e-38, 1e4]),
    odd=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(4, 513, "BF16", "BF16", [0], 0.05, 0.02, True, 0)
@example(3, 512, "F32", "BF16", [], 0.0, 1e-38, True, 1)
def test_weights_come_back_exactly(
    rows: int, columns: int, source: str, merged: str, flags: list[int], relative: float,
    size: float, odd: bool, seed: int,
) -> None:  # fmt: skip
    case = merged_case(
        rows, columns, source, merged, seed=seed, flags=flags, relative=relative, size=size, odd=odd
    )
    assert_exact(case)


@pytest.mark.parametrize(("source", "merged"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32")])
def test_a_delta_of_half_a_percent_needs_a_fraction_of_a_percent(source: str, merged: str) -> None:
    case = merged_case(256, 2048, source, merged, rank=8, relative=0.005 / 8**0.5)
    kept = assert_exact(case)
    assert kept.payload.size < 0.002 * case.raw.size


def test_a_whole_matrix_of_surprises_takes_no_more_than_itself() -> None:
    case = merged_case(8, 1024, "BF16", "BF16", size=1e-30, relative=1e30)
    kept = assert_exact(case)
    assert (kept.lengths == PLAIN).all()
    assert kept.payload.size == case.raw.size


@pytest.mark.parametrize(("source", "merged"), [("BF16", "BF16"), ("F16", "F32"), ("F32", "BF16")])
@pytest.mark.parametrize("flags", [(0,), (kernels.ROW_FACTOR, 0)])
def test_tiles_change_no_byte(source: str, merged: str, flags: tuple[int, ...]) -> None:
    case = merged_case(37, 300, source, merged, flags=flags, relative=0.1, odd=True)
    whole, units = keep(case), case.units
    assert units.rows == 8
    parts = []
    for first, last in ((0, 16), (16, 24), (24, 37)):
        encoder, cut = Encoder(), slice(first * 300 * case.item, last * 300 * case.item)
        low, high = units.of_tile((first, last), (0, 300))
        encoder.begin(units, low, high, case.item)
        out = np.zeros((last - first) * 300 * SIZES[merged], np.uint8)
        run = replace(
            case.run, source=Weights.of_bytes(case.raw[cut], source), rows=last - first,
            merged=Weights.of_bytes(out, merged), first_row=first,
        )  # fmt: skip
        merge(run, np.zeros(4), encoder)
        parts.append(encoder.finish(case.raw[cut]))
    for field in ("payload", "lengths", "counts"):
        joined = np.concatenate([getattr(part, field) for part in parts])
        assert np.array_equal(joined, getattr(whole, field)), field
    assert sizes_of(units, whole.lengths, whole.counts, case.item).sum() == whole.payload.size


def test_rows_longer_than_a_unit_are_cut() -> None:
    case = merged_case(3, 2 * UNIT_COLUMNS + 100, "BF16", "BF16", relative=0.05)
    assert (case.units.rows, case.units.parts, case.units.count) == (1, 3, 9)
    assert case.units.of_tile((1, 2), (UNIT_COLUMNS, 2 * UNIT_COLUMNS)) == (4, 5)
    assert_exact(case)


def test_rows_are_joined_only_as_far_as_segments_allow() -> None:
    assert Units.of(64, 16, []).rows == 64 * 4
    assert Units.of(64, 16, [0, 24, 40]).rows == 8
    assert Units.of(64, 16, [0, 3]).rows == 1
    assert Units.of(7, 5000, []).rows == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), merged=st.sampled_from(list(SIZES)))
def test_streams_of_a_stranger_do_no_harm(seed: int, merged: str) -> None:
    """Nothing is read or written out of bounds, and that something was wrong shows."""
    rng = np.random.default_rng(seed)
    case = merged_case(8, 600, "BF16", merged, relative=0.5)
    sound = keep(case)
    lengths = rng.integers(0, 200, sound.lengths.size).astype(np.uint32)
    counts = rng.integers(0, 5, sound.counts.size).astype(np.uint16)
    lengths[rng.random(lengths.size) < 0.3] = PLAIN
    size = int(sizes_of(case.units, lengths, counts, case.item).sum())
    kept = TileCorrection(rng.integers(0, 256, size).astype(np.uint8), lengths, counts)
    restored(case, kept)


def test_a_truncated_stream_shows() -> None:
    case = merged_case(8, 600, "BF16", "BF16", relative=0.5)
    kept = keep(case)
    lengths = kept.lengths.copy()
    lengths[0] -= 1
    shorter = TileCorrection(np.delete(kept.payload, int(lengths[0])), lengths, kept.counts)
    _, sound = restored(case, shorter)
    assert not sound


# -- the rule, written out plainly -----------------------------------------------------------------

DIGITS = {"F32": (23, -126), "BF16": (7, -126), "F16": (10, -14)}


def spacing(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return s(x, dtype) of docs/arithmetic.md."""
    digits, lowest = DIGITS[dtype]
    exponents = np.frexp(values)[1] - 1
    return np.maximum(np.where(values == 0, -1023, exponents), lowest) - digits


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    return Weights.of_bytes(raw, dtype).floats()


def predicted(case: Case, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and radii of all weights."""
    p = as_float32(case.result, case.merged).astype(np.float64).reshape(case.rows, case.columns)
    radius = np.ldexp(1.0, spacing(p, case.merged) - 1)
    for d in reversed(range(len(case.run.table))):
        _, _, _, flags, at = case.run.table[d]
        left = case.run.left[d * case.rows * rank :][: case.rows * rank].reshape(-1, rank)
        right = case.run.right[d * case.columns * rank :][: case.columns * rank].reshape(rank, -1)
        if flags & kernels.ROUND_TO_SOURCE:
            radius = radius + np.ldexp(1.0, spacing(p, case.source) - 1)
        if flags & kernels.ROW_FACTOR:
            inverse = 1 / case.run.factors[at : at + case.rows].astype(np.float64)[:, None]
            p, radius = p * inverse, radius * np.abs(inverse)
        if flags & kernels.COLUMN_FACTOR:
            inverse = 1 / case.run.factors[at : at + case.columns].astype(np.float64)
            p, radius = p * inverse, radius * np.abs(inverse)
        if flags or d < len(case.run.table) - 1:
            radius = radius + np.abs(p) * 2.0**-24
        p = p - np.float64(case.run.scales[d]) * reference.product(left, right).astype(np.float64)
    return p, radius


def number_of(weight: float, plain: int, p: float, radius: float, s: int, dtype: str) -> Any:
    """Return what is written of one weight, in how many bits, and whether it is an exception."""
    low = np.ceil((p - radius) / 2.0**s)
    count = np.floor((p + radius) / 2.0**s) - low + 1
    bits = int(count - 1).bit_length() if count < 1e9 else 64
    if bits > DIGITS[dtype][0]:
        return (1, 1, False) if plain == 0 else (plain << 1, 1 + 8 * SIZES[dtype], False)
    low = low if count >= 1 else np.rint(p / 2.0**s)
    which = weight / 2.0**s - low
    fits = 0 <= which < 2**bits and which == int(which) and (weight != 0 or plain == 0)
    return (int(which) if fits else 0), bits, not fits


def stream(case: Case, rank: int) -> bytes:
    """Return the stream of a matrix that is one unit, by the rule alone."""
    p, radius = predicted(case, rank)
    plain = case.raw.view(np.dtype(f"u{case.item}")).reshape(p.shape)
    weights = as_float32(case.raw, case.source).astype(np.float64).reshape(p.shape)
    s = spacing(p, case.source)
    value = held = 0
    exceptions = b""
    for start in range(0, case.columns, 512):
        for i in range(case.rows):
            for j in range(start, min(start + 512, case.columns)):
                at, bare = (i, j), int(plain[i, j])
                number, bits, odd = number_of(
                    float(weights[at]), bare, float(p[at]), float(radius[at]), int(s[at]),
                    case.source,
                )  # fmt: skip
                value, held = value | number << held, held + bits
                if odd:
                    place = i * case.columns + j
                    exceptions += place.to_bytes(2, "little") + bare.to_bytes(case.item, "little")
    return value.to_bytes((held + 7) // 8, "little") + exceptions


@pytest.mark.parametrize(
    ("source", "merged", "flags"),
    [
        ("BF16", "BF16", (1,)), ("BF16", "BF16", (2,)), ("BF16", "BF16", (0, 0)),
        ("BF16", "BF16", (1, 0, 1)), ("BF16", "BF16", (4, 0)), ("BF16", "F16", (0,)),
        ("BF16", "F32", (0,)), ("BF16", "F32", (0, 0)), ("BF16", "F32", (1,)), ("F16", "F16", (0,)),
        ("F16", "F16", (1, 2)), ("F16", "F32", (2,)), ("F16", "BF16", (0,)), ("F32", "F32", (0,)),
        ("F32", "F32", (0, 0)), ("F32", "F32", (1,)), ("F32", "F16", (0,)), ("F32", "BF16", ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("relative", "size"), [(0.01, 0.02), (1.0, 0.02), (0.05, 3e-5)])
def test_what_is_kept_is_what_the_rule_says(
    source: str, merged: str, flags: tuple[int, ...], relative: float, size: float
) -> None:
    case = merged_case(4, 600, source, merged, flags=flags, relative=relative, size=size, seed=3)
    kept, wanted = keep(case), stream(case, 3)
    if len(wanted) > case.raw.size:
        assert kept.lengths.tolist() == [PLAIN]
    else:
        assert kept.payload.tobytes() == wanted


# -- differences -----------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    item=st.sampled_from([1, 2, 3, 4, 8]),
    count=st.integers(0, 50),
    near=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_values_are_told_from_others(item: int, count: int, near: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, item * count).astype(np.uint8)
    other = values.copy() if near else rng.integers(0, 256, values.size).astype(np.uint8)
    if near and count:
        other[0] ^= 1
    kept = planes.compress(values, other, item)
    assert np.array_equal(planes.restore(kept, other, item), values)
    assert bool(kept) == bool((values != other).any())


@pytest.mark.parametrize("kept", [b"x", b"\x28\xb5\x2f\xfd\x00", planes.compress(
    np.ones(8, np.uint8), np.zeros(8, np.uint8), 1)])  # fmt: skip
def test_a_stranger_s_difference_is_refused(kept: bytes) -> None:
    with pytest.raises(ValueError):
        planes.restore(kept, np.zeros(6, np.uint8), 2)
