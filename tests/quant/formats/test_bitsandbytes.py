"""NF4, FP4 and LLM.int8 as bitsandbytes writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file

from regraft.formats.files.reading import FilePool
from regraft.quant.formats import bitsandbytes, int8
from regraft.testing.codecs import check_codec, stored

SHAPES = [(8, 128), (3, 64), (5, 7), (16, 48), (1, 1), (33, 96), (64, 320)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def save_four_bit(
    path: Path, weight: torch.Tensor, kind: str, blocksize: int, *, nested: bool
) -> torch.Tensor:
    """Write one quantized weight ``w`` as transformers saves it; return it dequantized.

    The reference is the library's plain torch code: its AVX-512 kernel is wrong where a row is no
    multiple of the block. The library compiles the code for up to eight sizes; here for one.
    """
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    tensors = {"w": packed}
    for key, value in state.as_dict(packed=True).items():
        tensors[f"w.{key}"] = value
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    first = weight.shape == SHAPES[0] and weight.dtype == DTYPES[0] and blocksize == 64
    return (_compiled if first else _dequantize_4bit_compute)(
        packed.reshape(-1), absmax.float(), state.code, blocksize, weight.shape, weight.dtype
    )


def _compiled(*arguments: Any) -> torch.Tensor:
    """Dequantize as the library does without the tests: compiled, or plainly where it cannot be."""
    try:
        found: torch.Tensor = torch.compile(_dequantize_4bit_compute, dynamic=False)(*arguments)
    except Exception:
        found = _dequantize_4bit_compute(*arguments)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits_are_read_as_bitsandbytes_reads_them(
    tmp_path: Path, kind: str, nested: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    for blocksize in (64, 128, 32):
        path = tmp_path / f"{blocksize}.safetensors"
        expected = save_four_bit(path, weight, kind, blocksize, nested=nested)
        with FilePool() as files:
            place = stored([path], {}, None, files)
            found = bitsandbytes.find(place)
            assert found.problems == ()
            (one,) = found.weights
            assert place.read is not None
            check_codec(one, expected.float().numpy(), place.read)


def test_int8_is_read_as_bitsandbytes_reads_it(tmp_path: Path) -> None:
    weight = torch.randn(17, 45, dtype=torch.float16)
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    path = tmp_path / "m.safetensors"
    save_file({"w.weight": codes, "w.SCB": scales}, path)
    expected = functional.int8_vectorwise_dequant(codes, scales).to(torch.float16)
    with FilePool() as files:
        place = stored([path], {}, "F16", files)
        (one,) = int8.find(place).weights
        assert place.read is not None
        check_codec(one, expected.float().numpy(), place.read)
    assert np.isfinite(expected.numpy()).all()
