"""GGUF's blocks told from their values: they come back whatever they hold, and cost little."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from regraft.deltas.kernels.weights import Weights
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.formats import gguf_blocks
from regraft.quant.formats.gguf_blocks import LAYOUTS, differences, restored
from regraft.testing.gguf_files import CANNOT_QUANTIZE

PLAIN = ("F32", "F16", "BF16")
DTYPES = ("BF16", "F16", "F32")


def decoded(kind: str, stored: Bytes, dtype: str) -> Floats:
    """Return what the gguf package makes of blocks, rounded to a dtype."""
    of_kind: Any = gguf.GGMLQuantizationType[kind]
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(stored.reshape(1, -1), of_kind).astype(np.float32)
    own = kind if kind in PLAIN else dtype
    raw = np.empty(values.size * (4 if own == "F32" else 2), np.uint8)
    Weights.of_bytes(raw, own).take(Weights.of_floats(values.reshape(-1)), np.zeros(4))
    return np.ascontiguousarray(Weights.of_bytes(raw, own).floats())


def check(kind: str, stored: Bytes, values: Floats, dtype: str) -> Bytes:
    """Check that blocks come back; return the differences, (bytes, blocks)."""
    kept = differences(kind, stored, values, dtype)
    assert kept.size == stored.size
    assert np.array_equal(restored(kind, kept, values, dtype), stored)
    unsigned = np.where(values == 0, np.float32(0), values)  # as an undo may have them
    assert np.array_equal(restored(kind, kept, unsigned, dtype), stored)
    return kept.reshape(LAYOUTS[kind].nbytes, -1)


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), count=st.integers(1, 4))
def test_blocks_of_any_bytes_come_back(
    kind: str, data: st.DataObject, dtype: str, count: int
) -> None:
    """Scales may be NaN, infinite, zero, subnormal or negative."""
    size = count * LAYOUTS[kind].nbytes
    special = st.sampled_from([0, 1, 0x80, 0xFF, 0x7C, 0xFC, 0x7E])
    stored = data.draw(arrays(np.uint8, size, elements=st.one_of(st.integers(0, 255), special)))
    check(kind, stored, decoded(kind, stored, dtype), dtype)


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4))
def test_blocks_come_back_from_values_that_are_not_theirs(kind: str, seed: int, count: int) -> None:
    rng, layout = np.random.default_rng(seed), LAYOUTS[kind]
    stored = rng.integers(0, 256, count * layout.nbytes, np.uint8)
    values = rng.integers(0, 2**32, count * layout.elements, np.uint32).view(np.float32)
    check(kind, stored, values, "F32")


@pytest.mark.parametrize("kind", sorted(LAYOUTS.keys() - CANNOT_QUANTIZE - set(PLAIN)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_of_what_was_quantized_are_told(kind: str, dtype: str) -> None:
    weights = np.random.default_rng(1).normal(0, 0.02, (64, 256)).astype(np.float32)
    stored = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind]).reshape(-1)
    kept, layout = check(kind, stored, decoded(kind, stored, dtype), dtype), LAYOUTS[kind]
    codes = layout.stages[-1]
    assert not kept[codes.begin : codes.end].any()
    upper = [stage.begin + 1 for stage in layout.stages[:-1]]
    assert np.mean(kept[upper] != 0) < 0.01  # scales are near what is told: one byte of two


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K"])
def test_scales_of_parts_are_told_where_the_ends_have_the_likely_codes(kind: str) -> None:
    """Each part has its lowest and its highest code, and numbers of units that differ."""
    layout, rng = LAYOUTS[kind], np.random.default_rng(2)
    stored = rng.integers(0, 256, (40, layout.nbytes), np.uint8)
    for stage in layout.stages:
        if stage.tell is None:
            scales = rng.uniform(0.001, 0.002, (40, (stage.end - stage.begin) // 2))
            stored[:, stage.begin : stage.end] = scales.astype("<f2").view(np.uint8)
    codes = layout.stages[-1]
    stored[:, codes.begin : codes.end] = 0
    stored[:, codes.begin : codes.end : 2] = 0xFF
    kept = check(kind, stored.reshape(-1), decoded(kind, stored.reshape(-1), "BF16"), "BF16")
    parts = layout.stages[1]
    assert np.mean(kept[parts.begin : parts.end] != 0) < 0.1


@pytest.mark.parametrize("kind", LAYOUTS)
def test_pieces_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(3).integers(0, 256, 11 * LAYOUTS[kind].nbytes, np.uint8)
    values = decoded(kind, stored, "BF16")
    whole = differences(kind, stored, values, "BF16")
    monkeypatch.setattr(gguf_blocks, "_PIECE", 4 * LAYOUTS[kind].elements)
    assert np.array_equal(differences(kind, stored, values, "BF16"), whole)
    assert np.array_equal(restored(kind, whole, values, "BF16"), stored)
