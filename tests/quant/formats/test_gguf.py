"""GGUF's types of blocks: any range decodes to what the gguf package decodes of the whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from regraft.formats.files.reading import FilePool
from regraft.formats.gguf import open_gguf
from regraft.numerics.arrays import Bytes
from regraft.quant.formats.gguf import TYPES, GgufDecoder, block_size, stored_rows
from regraft.quant.weight import Block, QuantizedWeight, Read
from regraft.tensors import TensorSpec
from regraft.testing.codecs import check_codec
from regraft.testing.gguf_files import Array, blocks, permuted, write


def reader(files: FilePool) -> Read:
    def read(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        files.read_into(spec, offset, buffer.data)

    return read


def save(path: Path, array: Array, kind: str) -> TensorSpec:
    write(path, "llama", {}, {"w": (array, kind)})
    return open_gguf(path).tensors["w"].stored


def dequantized(array: Array, kind: str) -> Array:
    with np.errstate(all="ignore"):
        whole: Array = gguf.quants.dequantize(array, gguf.GGMLQuantizationType[kind])
    return whole


@pytest.mark.parametrize("shape", [(12, 512), (1, 256), (33, 768)])
@pytest.mark.parametrize("kind", TYPES)
def test_ranges_of_rows_and_columns_are_those_of_the_whole(
    tmp_path: Path, kind: str, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    array = blocks(rng.normal(size=shape), kind, rng)
    spec = save(tmp_path / "w.gguf", array, kind)
    weight = QuantizedWeight("w", shape, "F32", GgufDecoder(kind), {"codes": spec})
    with FilePool() as files:
        check_codec(weight, dequantized(array, kind), reader(files))


@pytest.mark.parametrize("kind", TYPES)
def test_more_than_one_piece_is_decoded_as_one(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(2)
    array = blocks(rng.normal(size=(300, 1024)), kind, rng)
    spec = save(tmp_path / "w.gguf", array, kind)
    weight = QuantizedWeight("w", (300, 1024), "F32", GgufDecoder(kind), {"codes": spec})
    with FilePool() as files:
        found = weight.codec.values(weight, Block((0, 300), (0, 1024)), reader(files))
    assert np.array_equal(found.view(np.uint32), dequantized(array, kind).view(np.uint32))


def test_columns_may_begin_and_end_inside_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    array = blocks(rng.normal(size=(3, 512)), "Q4_K", rng)
    spec = save(tmp_path / "w.gguf", array, "Q4_K")
    weight = QuantizedWeight("w", (3, 512), "F32", GgufDecoder("Q4_K"), {"codes": spec})
    whole = dequantized(array, "Q4_K")
    with FilePool() as files:
        for low, high in ((0, 1), (1, 255), (255, 257), (256, 512), (511, 512), (7, 500), (9, 9)):
            at = Block((1, 2), (low, high))
            found = weight.codec.values(weight, at, reader(files))
            assert found.shape == (1, high - low)
            assert np.array_equal(found[0], whole[1, low:high], equal_nan=True)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0", "Q6_K"])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (2, 6), (3, 8), (5, 4)])
def test_rows_of_heads_come_back_in_their_order(
    tmp_path: Path, kind: str, heads: int, size: int
) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(heads * size, 256))
    array = blocks(values, kind, rng)
    spec = save(tmp_path / "w.gguf", permuted(array, heads), kind)
    weight = QuantizedWeight("w", values.shape, "F32", GgufDecoder(kind, heads), {"codes": spec})
    with FilePool() as files:
        check_codec(weight, dequantized(array, kind), reader(files))


def test_a_bias_of_heads_comes_back_in_its_order(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32)
    spec = save(tmp_path / "w.gguf", permuted(values, 3), "F32")
    weight = QuantizedWeight("b", (24,), "F32", GgufDecoder("F32", 3), {"codes": spec})
    with FilePool() as files:
        check_codec(weight, values, reader(files))


def test_stored_rows_are_where_the_converter_puts_them() -> None:
    rows = np.arange(24)
    assert np.array_equal(permuted(rows, 3)[stored_rows((0, 24), 24, 3)], rows)
    assert stored_rows((0, 8), 24, 3).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert stored_rows((9, 13), 24, 3).tolist() == [10, 12, 14, 9]


def test_what_was_added_is_taken_off_in_float32(tmp_path: Path) -> None:
    values = np.float32([0.25, 1.0, 1.1, -3.0])
    spec = save(tmp_path / "w.gguf", values, "F32")
    weight = QuantizedWeight("n", (4,), "F32", GgufDecoder("F32", added=1.0), {"codes": spec})
    with FilePool() as files:
        check_codec(weight, values - np.float32(1), reader(files))


def test_values_are_rounded_once_to_the_weights_dtype(tmp_path: Path) -> None:
    import ml_dtypes

    rng = np.random.default_rng(5)
    array = blocks(rng.normal(size=(8, 256)), "Q8_0", rng)
    spec = save(tmp_path / "w.gguf", array, "Q8_0")
    whole = dequantized(array, "Q8_0")
    with FilePool() as files:
        for dtype, rounded in (("BF16", ml_dtypes.bfloat16), ("F16", np.float16)):
            weight = QuantizedWeight("w", (8, 256), dtype, GgufDecoder("Q8_0"), {"codes": spec})
            check_codec(weight, whole.astype(rounded).astype(np.float32), reader(files))


def test_the_types_that_can_be_decoded_are_those_of_the_package_but_one() -> None:
    there = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert there - set(TYPES) == {"NVFP4"}
    assert all(block_size(name)[0] >= 1 for name in TYPES)
