"""Codes that lie transposed: what an un-merge tells from values is what the merge was told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.merging.compute.requantize import ValuesOf, told_codes
from regraft.merging.inputs.dequantized_view import as_stored
from regraft.merging.undo import turned_codes
from regraft.merging.undo.turned_codes import TurnedCodes, model_weight
from regraft.numerics.arrays import Bytes
from regraft.quant.bit_packing import words_for
from regraft.quant.formats.awq import Awq
from regraft.quant.formats.gptq import Gptq
from regraft.quant.formats.mxfp4 import Mxfp4
from regraft.quant.weight import Block, Codec, QuantizedWeight, Read
from regraft.tensors import TensorSpec
from regraft.testing import codecs

Arrays = Mapping[str, np.ndarray]
DTYPE_NAMES = {"int32": "I32", "uint8": "U8", "float16": "F16", "float32": "F32", "uint16": "BF16"}


def weight_of(
    shape: tuple[int, ...], dtype: str, codec: Codec, parts: Arrays
) -> tuple[QuantizedWeight, Read]:
    """Return a weight whose stored tensors are in memory, and what reads them."""
    specs = {
        role: TensorSpec(role, DTYPE_NAMES[str(a.dtype)], a.shape, Path("m"), 0, a.nbytes)
        for role, a in parts.items()
    }

    def read(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        raw = np.ascontiguousarray(parts[spec.name]).reshape(-1).view(np.uint8)
        buffer[:] = raw[offset : offset + buffer.size]

    return QuantizedWeight("w", shape, dtype, codec, specs), read


def odd_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return scales of which some are zero, subnormal, negative or very large."""
    scales = rng.uniform(0.001, 0.002, shape)
    odd = rng.choice([0.0, 2.0**-24, -0.001, 60000.0, 1e-8], shape)
    scales = np.where(rng.random(shape) < 0.2, odd, scales).astype(np.float32)
    if dtype == "BF16":
        return (scales.view(np.uint32) >> 16).astype(np.uint16)
    return scales.astype({"F16": np.float16, "F32": np.float32}[dtype])


@st.composite
def gptq(draw: st.DrawFn) -> tuple[QuantizedWeight, Read]:
    """Draw a GPTQ weight of an odd shape, its groups in any order."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    lot = 32 if bits == 3 else 32 // bits
    inputs, outputs = draw(st.integers(1, 90)), draw(st.integers(1, 70))
    if bits == 3:
        inputs, outputs = -(-inputs // lot) * lot, -(-outputs // lot) * lot
    size = draw(st.sampled_from([1, 3, 8, 16, 32, inputs]))
    dtype, order = draw(st.sampled_from(["F16", "BF16", "F32"])), draw(st.sampled_from("nrs"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = -(-inputs // size)
    parts: dict[str, Any] = {
        "codes": rng.integers(-(2**31), 2**31, (words_for(inputs, bits), outputs), np.int32),
        "zeros": rng.integers(-(2**31), 2**31, (count, words_for(outputs, bits)), np.int32),
        "scales": odd_scales(rng, (count, outputs), dtype),
    }
    if order != "n":
        groups = np.arange(inputs, dtype=np.int32) // size
        parts["groups"] = rng.permutation(groups) if order == "s" else groups
    codec = Gptq(bits, size, draw(st.booleans()))
    return weight_of((outputs, inputs), dtype, codec, parts)


@st.composite
def awq(draw: st.DrawFn) -> tuple[QuantizedWeight, Read]:
    """Draw an AWQ weight."""
    words, count, size = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = {
        "codes": rng.integers(-(2**31), 2**31, (count * size, words), np.int32),
        "zeros": rng.integers(-(2**31), 2**31, (count, words), np.int32),
        "scales": odd_scales(rng, (count, 8 * words), "F16"),
    }
    return weight_of((8 * words, count * size), "F16", Awq(size), parts)


@st.composite
def mxfp4(draw: st.DrawFn) -> tuple[QuantizedWeight, Read]:
    """Draw a stack of experts in MXFP4."""
    experts, outputs, groups = (draw(st.integers(1, n)) for n in (4, 40, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = {
        "codes": rng.integers(0, 256, (experts, outputs, groups, 16), np.uint8),
        "scales": rng.integers(0, 255, (experts, outputs, groups), np.uint8),
    }
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    return weight_of((experts, 32 * groups, outputs), dtype, Mxfp4(), parts)


def values_of(read: Read) -> Any:
    def values(weight: QuantizedWeight) -> ValuesOf:
        return lambda at: codecs.values(weight, at, read)

    return values


@settings(max_examples=60, deadline=None)
@given(made=st.one_of(gptq(), awq(), mxfp4()), room=st.integers(1, 3000), data=st.data())
def test_any_range_of_codes_is_told_as_it_was_in_the_merge(
    made: tuple[QuantizedWeight, Read], room: int, data: st.DataObject
) -> None:
    (weight, read), seen = made, as_stored(made[0])
    told = TurnedCodes(room, values_of(read), read)
    total = weight.codes.nbytes
    for _ in range(3):
        begin = data.draw(st.integers(0, total - 1))
        size = data.draw(st.integers(1, total - begin))
        found = np.empty(size, np.uint8)
        told.read(seen, begin, found)
        expected = told_codes(seen, begin, size, None, read)
        assert np.array_equal(found, expected)


@settings(max_examples=30, deadline=None)
@given(made=st.one_of(gptq(), awq(), mxfp4()))
def test_a_weight_is_seen_either_way_and_back(made: tuple[QuantizedWeight, Read]) -> None:
    weight, read = made
    seen = as_stored(weight)
    assert model_weight(seen) == weight
    assert model_weight(weight) == weight
    rows, columns = weight.matrix
    there = codecs.values(weight, Block((0, rows), (0, columns)), read)
    item = there.size // max(rows * columns, 1)
    stack = there.reshape(-1, *weight.shape[-2:], item).swapaxes(1, 2)
    whole = Block((0, seen.matrix[0]), (0, seen.matrix[1]))
    assert np.array_equal(codecs.values(seen, whole, read), stack.reshape(-1))


def test_bands_are_told_once_and_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = {
        "codes": rng.integers(-(2**31), 2**31, (64, 16), np.int32),
        "zeros": rng.integers(-(2**31), 2**31, (4, 16), np.int32),
        "scales": odd_scales(rng, (4, 128), "F16"),
    }
    weight, read = weight_of((128, 64), "F16", Awq(16), parts)
    asked: list[Block] = []

    def values(seen: QuantizedWeight) -> ValuesOf:
        def of(at: Block) -> Bytes:
            asked.append(at)
            return codecs.values(seen, at, read)

        return of

    monkeypatch.setattr(turned_codes, "_STRIP", 1)
    told, buffer = TurnedCodes(2 * weight.codes.nbytes, values, read), np.empty(64, np.uint8)
    for begin in range(0, weight.codes.nbytes, 64):
        told.read(as_stored(weight), begin, buffer)
    rows = sorted(at.rows for at in asked)
    assert rows == [(row, row + 32) for row in range(0, 128, 32)]
    told.release("codes")
    told.read(as_stored(weight), 0, buffer)
    assert len(asked) == 2 * len(rows)
    assert math.prod(weight.shape) == 2 * weight.codes.nbytes
