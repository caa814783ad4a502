"""FP8 weights as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from regraft.errors import FormatError, UnsupportedError
from regraft.formats.files.reading import FilePool
from regraft.quant.registry import check_contents, find_weights, method_of
from regraft.quant.weight import FoundWeights, QuantizedWeight
from regraft.testing.codecs import check_codec, stored, values, whole

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def codes(*shape: int) -> torch.Tensor:
    """Return random codes, none of them NaN."""
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0x3C
    return raw.view(torch.float8_e4m3fn)


def found(
    folder: Path, tensors: dict[str, torch.Tensor], config: Any, files: FilePool
) -> FoundWeights:
    path = folder / "m.safetensors"
    save_file(tensors, path)
    return find_weights(stored([path], config, "BF16", files))[1]


def check(
    folder: Path, tensors: dict[str, torch.Tensor], expected: torch.Tensor, config: Any, dtype: str
) -> QuantizedWeight:
    """Check that one weight is read as expected, with its scales in another file."""
    paths = [folder / f"{i}.safetensors" for i in range(len(tensors))]
    for path, (name, value) in zip(paths, tensors.items(), strict=True):
        save_file({name: value}, path)
    with FilePool() as files:
        place = stored(paths, config, dtype, files)
        (one,) = find_weights(place)[1].weights
        assert place.read is not None
        check_codec(one, expected.to(DTYPES[dtype]).float().numpy(), place.read)
    return one


def reference(weight: torch.Tensor, scales: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return what transformers dequantizes a weight to."""
    value: torch.Tensor = Fp8Dequantize(None)._dequantize_one(weight, scales, DTYPES[dtype])
    return value


SHAPES = [
    ((256, 384), (2, 3)), ((128, 128), (1, 1)), ((3, 128, 256), (3, 1, 2)), ((15, 21), (3, 7)),
    ((7, 33), (7, 1)), ((7, 33), (1, 33)), ((9, 33), (1, 1)), ((2, 3, 6, 10), (2, 3, 2, 2)),
    ((64, 96), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("shape", "grid"), SHAPES)
def test_weights_are_read_as_transformers_reads_them(
    tmp_path: Path, shape: tuple[int, ...], grid: tuple[int, ...], dtype: str
) -> None:
    torch.manual_seed(0)
    weight, scales = codes(*shape), torch.rand(grid) * 0.01
    tensors = {"m.weight": weight, "m.weight_scale_inv": scales}
    check(tmp_path, tensors, reference(weight, scales, dtype), BLOCKS, dtype)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8])
def test_scales_may_have_other_dtypes(tmp_path: Path, kind: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = codes(256, 128)
    scales = torch.tensor([[0.017], [0.25]]).to(kind)
    if kind == torch.uint8:
        scales = torch.tensor([[0], [131]], dtype=torch.uint8)
    tensors = {"m.weight": weight, "m.weight_scale_inv": scales}
    check(tmp_path, tensors, reference(weight, scales, "BF16"), BLOCKS, "BF16")


@pytest.mark.parametrize(
    "name", ["m.weight_scale_inv", "m.weight_scale", "m.scale", "m.qscale_weight"]
)
def test_scales_may_have_other_names(tmp_path: Path, name: str) -> None:
    weight, scales = codes(128, 256), torch.rand(1, 2)
    expected = reference(weight, scales, "BF16")
    one = check(tmp_path, {"m.weight": weight, name: scales}, expected, BLOCKS, "BF16")
    assert one.parts["scales"].name == name


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_may_serve_a_whole_weight(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scales = codes(24, 40), torch.rand(shape)
    expected = weight.float() * scales.reshape(())
    config = {"quant_method": "fp8", "weight_block_size": None}
    check(tmp_path, {"m.weight": weight, "m.weight_scale_inv": scales}, expected, config, "BF16")


@pytest.mark.parametrize("shape", [(24,), (24, 1)])
def test_fbgemm_has_a_scale_for_each_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scales = codes(24, 40), torch.rand(shape)
    expected = weight.float() * scales.reshape(24, 1)
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    check(tmp_path, {"m.weight": weight, "m.weight_scale": scales}, expected, config, "BF16")


def test_fbgemm_has_a_scale_for_each_column_of_an_expert(tmp_path: Path) -> None:
    weight, scales = codes(3, 24, 40), torch.rand(3, 1, 40)
    tensors = {"e.gate_up_proj": weight, "e.gate_up_proj_scale": scales}
    config = {"quant_method": "fbgemm_fp8"}
    check(tmp_path, tensors, weight.float() * scales, config, "BF16")


def deepseek(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a weight dequantized as DeepSeek's ``weight_dequant`` does, short blocks too."""
    wide = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)
    return weight.float() * wide[..., : weight.shape[-2], : weight.shape[-1]]


@pytest.mark.parametrize("shape", [(130, 128), (200, 300), (5, 576), (2, 192, 130), (3, 130, 64)])
def test_blocks_at_the_ends_may_be_short(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    weight, scales = codes(*shape), torch.rand(grid)
    tensors = {"m.weight": weight, "m.weight_scale_inv": scales}
    check(tmp_path, tensors, deepseek(weight, scales), BLOCKS, "BF16")


def test_codes_that_are_no_numbers_are_read_as_such(tmp_path: Path) -> None:
    raw = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    path = tmp_path / "m.safetensors"
    weight, scales = raw.view(torch.float8_e4m3fn), torch.full((1, 1), 0.5)
    save_file({"m.weight": weight, "m.weight_scale_inv": scales}, path)
    expected = reference(weight, scales, "BF16").float().numpy().ravel()
    with FilePool() as files:
        place = stored([path], BLOCKS, "BF16", files)
        (one,) = find_weights(place)[1].weights
        assert place.read is not None
        bits = values(one, whole(one), place.read).view(np.uint16).astype(np.uint32) << 16
    ours = bits.view(np.float32)
    assert np.array_equal(np.isnan(ours), np.isnan(expected))
    assert np.isnan(ours).nonzero()[0].tolist() == [127, 255]
    assert np.array_equal(ours, expected, equal_nan=True)


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    tensors = {
        "m.weight": codes(128, 128), "m.weight_scale_inv": torch.ones(1, 1),
        "m.activation_scale": torch.ones(()), "n.input_scale": torch.ones(1),
        "n.weight": torch.ones(4, 4, dtype=torch.bfloat16),
    }  # fmt: skip
    with FilePool() as files:
        one = found(tmp_path, tensors, BLOCKS, files)
    assert set(one.skipped) == {"m.activation_scale", "n.input_scale"}
    assert [weight.name for weight in one.weights] == ["m.weight"]


def test_a_checkpoint_without_config_is_known_by_its_names(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"m.weight": codes(128, 128), "m.weight_scale_inv": torch.ones(1, 1)}, path)
    with FilePool() as files:
        assert method_of(stored([path], {}, None, files)) == "fp8"


BAD: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"m.weight": codes(8, 8)}, "an FP8 weight has no scales"),
    ({"m.weight_scale_inv": torch.ones(1, 1)}, "scales belong to no weight"),
    ({"m.weight": codes(8), "m.weight_scale_inv": torch.ones(1)}, "do not fit"),
    ({"m.weight": codes(9, 8), "m.weight_scale_inv": torch.ones(2, 1)}, "do not fit"),
    ({"m.weight": codes(9, 8), "m.weight_scale_inv": torch.ones(3)}, "do not fit"),
    ({"m.weight": codes(2, 9, 8), "m.weight_scale_inv": torch.ones(3, 1, 1)}, "do not fit"),
    ({"m.weight": codes(2, 9, 8), "m.weight_scale_inv": torch.ones(1)}, "do not fit"),
    ({"m.weight": codes(8, 8), "m.weight_scale_inv": torch.ones(0, 1)}, "do not fit"),
    ({"m.weight": codes(8, 8), "m.weight_scale_inv": torch.ones(1, 1).int()}, "do not fit"),
    ({"m.weight": torch.ones(8, 8).to(torch.int8), "m.scale": torch.ones(8, 1)}, "another format"),
    ({"m.weight": torch.ones(8, 8)}, "no tensor is"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_bad_files_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with FilePool() as files, pytest.raises(FormatError, match=message):
        found(tmp_path, tensors, BLOCKS, files)


@pytest.mark.parametrize("block", [None, "128", [128], [0, 128], [True, 128], {"a": 1}])
def test_block_sizes_that_are_none_are_passed_over(tmp_path: Path, block: Any) -> None:
    """The grid of scales says it too, wherever it divides the matrix."""
    weight, scales = codes(256, 128), torch.rand(2, 1)
    config = {"quant_method": "fp8", "weight_block_size": json.loads(json.dumps(block))}
    tensors = {"m.weight": weight, "m.weight_scale_inv": scales}
    check(tmp_path, tensors, reference(weight, scales, "BF16"), config, "BF16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"m.weight": codes(8, 8), "m.weight_scale_inv": torch.full((1, 1), bad)}, path)
    with FilePool() as files:
        place = stored([path], BLOCKS, "BF16", files)
        weights = find_weights(place)[1].weights
        with pytest.raises(FormatError):
            check_contents(weights, place)


def test_other_methods_are_refused(tmp_path: Path) -> None:
    with FilePool() as files, pytest.raises(UnsupportedError, match="fp8"):
        found(tmp_path, {"m.weight": codes(8, 8)}, {"quant_method": "fp7"}, files)
