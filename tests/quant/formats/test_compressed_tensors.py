"""compressed-tensors' formats as the library itself writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from regraft.errors import FormatError
from regraft.formats.files.reading import FilePool
from regraft.quant import registry
from regraft.quant.formats import compressed_tensors
from regraft.quant.weight import FoundWeights
from regraft.testing.codecs import check_codec, stored

Tensors = dict[str, torch.Tensor]

SHAPES = [(8, 128), (3, 64), (33, 96), (64, 320)]
ODD_SHAPES = [(5, 7), (16, 44), (1, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def args_of(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of weights as a config has them."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


def config_of(kind: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a config as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    said = {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"]}
    return {**said, "config_groups": {"group_0": group}, **more}


def scales_shape(shape: tuple[int, int], weights: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape that the library gives scales (``initialize_qparams``)."""
    rows, columns = shape
    match weights["strategy"]:
        case "tensor":
            return (1,)
        case "channel":
            return (rows, 1)
        case "block":
            high, wide = weights["block_structure"]
            return (-(-rows // high), -(-columns // wide))
    return (rows, columns // weights["group_size"])


def compress(
    shape: tuple[int, int], kind: str, weights: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensors, torch.Tensor]:
    """Return the tensors of a weight ``m`` as the library writes it, and as it reads it."""
    torch.manual_seed(0)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(kind)
    top = {"int": 2.0 ** (weights["num_bits"] - 1), "float": 448.0}[weights["type"]]
    top = 6.0 if kind.endswith("fp4-pack-quantized") else top
    state = {"weight": torch.randn(shape).to(dtype)}
    spread = torch.rand(scales_shape(shape, weights)) + 0.5
    state["weight_scale"] = (spread * 3 / top).to(dtype)
    if kind.startswith("mxfp"):
        state["weight_scale"] = 2.0 ** torch.floor(torch.log2(spread * 3 / top)).to(dtype)
    if kind.startswith("nvfp4"):
        state["weight_global_scale"] = torch.tensor([1234.567])
        state["weight_scale"] = (spread * 617.0 / top).to(torch.float8_e4m3fn).float()
    if not weights["symmetric"]:
        low = -(2 ** (weights["num_bits"] - 1))
        zeros = torch.randint(low, -low, state["weight_scale"].shape, dtype=torch.int8)
        state["weight_zero_point"] = zeros
    state = compressor.compress(state, scheme)
    given = dict(state)
    zeros = given.get("weight_zero_point")
    if zeros is not None and zeros.dim() == 2 and zeros.shape[0] == 1:
        # as it is the library cannot read zeros that are one row of words: their strides are odd
        given["weight_zero_point"] = torch.tensor(zeros[0].tolist(), dtype=torch.int32)[:, None].T
    values = compressor.decompress(given, scheme)["weight"]
    return {f"m.{name}": tensor.contiguous() for name, tensor in state.items()}, values


def check(
    folder: Path, tensors: Tensors, config: dict[str, Any], values: torch.Tensor,
    dtype: str | None = None,
) -> None:  # fmt: skip
    """Check the one weight of a checkpoint."""
    path = folder / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        place = stored([path], config, dtype, files)
        found = compressed_tensors.find(place)
        assert found.problems == ()
        (one,) = found.weights
        assert one.name == "m.weight"
        assert one.dtype == NAMES[values.dtype]
        assert place.read is not None
        check_codec(one, values.float().numpy(), place.read)


STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "group", "group_size": 32},
    {"strategy": "group", "group_size": 16},
    {"strategy": "channel"},
    {"strategy": "tensor"},
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_numbers(
    tmp_path: Path, bits: int, strategy: dict[str, Any], symmetric: bool
) -> None:
    weights = {**args_of(bits, "int", **strategy), "symmetric": symmetric}
    whole = strategy["strategy"] in ("channel", "tensor")
    for shape in SHAPES + (ODD_SHAPES if whole else []):
        for dtype in DTYPES:
            tensors, values = compress(shape, "pack-quantized", weights, dtype)
            check(tmp_path, tensors, config_of("pack-quantized", weights), values)
            if shape != (1, 1):
                check(tmp_path, tensors, {}, values)


BYTES = [
    ("int-quantized", "int", True), ("int-quantized", "int", False),
    ("naive-quantized", "int", True), ("float-quantized", "float", True),
    ("naive-quantized", "float", True),
]  # fmt: skip
BLOCKS: list[dict[str, Any]] = [
    {"strategy": "block", "block_structure": [16, 32]},
    {"strategy": "block", "block_structure": [128, 128]},
]


@pytest.mark.parametrize(("form", "kind", "symmetric"), BYTES)
@pytest.mark.parametrize("strategy", STRATEGIES + BLOCKS)
def test_bytes(
    tmp_path: Path, form: str, kind: str, symmetric: bool, strategy: dict[str, Any]
) -> None:
    weights = {**args_of(8, kind, **strategy), "symmetric": symmetric}
    grouped = strategy["strategy"] == "group"
    for shape in SHAPES + ([] if grouped else [*ODD_SHAPES, (130, 150)]):
        for dtype in DTYPES:
            tensors, values = compress(shape, form, weights, dtype)
            check(tmp_path, tensors, config_of(form, weights), values)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weights = args_of(4, "float", "tensor_group", group_size=16)
    tensors, values = compress(shape, "nvfp4-pack-quantized", weights, dtype)
    config = config_of("nvfp4-pack-quantized", weights)
    check(tmp_path, tensors, config, values, "F16")
    check(tmp_path, tensors, {}, values)


@pytest.mark.parametrize(
    ("form", "bits"), [("mxfp4-pack-quantized", 4), ("mxfp8-quantized", 8)]
)  # fmt: skip
@pytest.mark.parametrize("shape", [*SHAPES, (5, 32)])
def test_powers_of_two(tmp_path: Path, form: str, bits: int, shape: tuple[int, int]) -> None:
    weights = args_of(bits, "float", "group", group_size=32, scale_dtype="torch.uint8")
    tensors, values = compress(shape, form, weights, torch.bfloat16)
    check(tmp_path, tensors, config_of(form, weights), values)


def test_every_power_of_two(tmp_path: Path) -> None:
    weights = args_of(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    state = {
        "weight_packed": torch.arange(255 * 16, dtype=torch.int32).to(torch.uint8).reshape(255, 16),
        "weight_scale": torch.arange(255, dtype=torch.int32).to(torch.uint8).reshape(255, 1),
    }
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    values = compressor.decompress(dict(state), scheme)["weight"]
    assert not torch.isnan(values).any()
    tensors = {f"m.{name}": tensor for name, tensor in state.items()}
    check(tmp_path, tensors, config_of("mxfp4-pack-quantized", weights), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_float32_make_what_the_model_is(tmp_path: Path, dtype: torch.dtype) -> None:
    # transformers: compressor.decompress(...)["weight"].to(dtype)
    weights = args_of(8, "float", "channel")
    tensors, values = compress((33, 96), "float-quantized", weights, torch.float32)
    config = config_of("float-quantized", weights)
    check(tmp_path, tensors, config, values.to(dtype), NAMES[dtype])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_inputs_in_any_order(tmp_path: Path, bits: int, symmetric: bool) -> None:
    # the library cannot do this any more: its values of a weight in the natural order, shuffled
    weights = {**args_of(bits, "int", "group", group_size=16), "symmetric": symmetric}
    tensors, values = compress((24, 64), "pack-quantized", weights, torch.bfloat16)
    order = torch.randperm(64)
    codes = unpack_from_int32(tensors["m.weight_packed"], bits, torch.Size((24, 64)))
    tensors["m.weight_packed"] = pack_to_int32(codes[:, order].contiguous(), bits)
    tensors["m.weight_g_idx"] = (order // 16).int()
    config = config_of("pack-quantized", weights)
    check(tmp_path, tensors, config, values[:, order].contiguous())
    unset = {**tensors, "m.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    unset["m.weight_packed"] = pack_to_int32(codes.contiguous(), bits)
    check(tmp_path, unset, config, values)


def test_a_model_of_several_formats(tmp_path: Path) -> None:
    four, eight = args_of(4, "int", "group", group_size=32), args_of(8, "float", "channel")
    packed, first = compress((8, 64), "pack-quantized", four, torch.bfloat16)
    floats, second = compress((8, 64), "float-quantized", eight, torch.bfloat16)
    tensors = {f"a.{name}": tensor for name, tensor in packed.items()}
    tensors |= {f"b.{name}": tensor for name, tensor in floats.items()}
    tensors |= {f"b.m.{name}": torch.ones(1) for name in ("input_scale", "k_scale", "v_scale")}
    groups = {
        "group_0": {"targets": ["re:a.*"], "weights": four, "format": "pack-quantized"},
        "group_1": {"targets": ["b.m"], "weights": eight, "format": "float-quantized"},
        "group_2": {"targets": ["Attention"], "weights": None, "input_activations": eight},
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
    with FilePool() as files:
        place = stored([path], {**config, "config_groups": groups}, "BF16", files)
        method, found = registry.find_weights(place)
        assert method == "compressed-tensors"
        assert place.read is not None
        for weight, values in zip(found.weights, (first, second), strict=True):
            check_codec(weight, values.float().numpy(), place.read)
        assert sorted(found.skipped) == ["b.m.input_scale", "b.m.k_scale", "b.m.v_scale"]


# -- what is refused -------------------------------------------------------------------------------


def search(folder: Path, tensors: Tensors, config: dict[str, Any]) -> FoundWeights:
    """Look for weights in tensors."""
    path = folder / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        return compressed_tensors.find(stored([path], config, "BF16", files))


GROUPED = args_of(4, "int", "group", group_size=32)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    tensors, _ = compress((8, 64), "pack-quantized", GROUPED, torch.bfloat16)
    del tensors[f"m.{part}"]
    (problem,) = search(tmp_path, tensors, config_of("pack-quantized", GROUPED)).problems
    assert problem.what == "a quantized weight lacks a part of it"


def test_a_missing_global_scale_is_named(tmp_path: Path) -> None:
    weights = args_of(4, "float", "tensor_group", group_size=16)
    tensors, _ = compress((8, 64), "nvfp4-pack-quantized", weights, torch.bfloat16)
    del tensors["m.weight_global_scale"]
    (problem,) = search(tmp_path, tensors, config_of("nvfp4-pack-quantized", weights)).problems
    assert "m.weight_global_scale" in problem.expected


CHANGES: dict[str, tuple[str, Any, str]] = {
    "truncated codes": ("weight_packed", lambda t: t[:, :-1].contiguous(), "fits (8, 7) words"),
    "codes of another dtype": ("weight_packed", lambda t: t.to(torch.int64), "I32 weight_packed"),
    "a dimension more": ("weight_packed", lambda t: t[None], "I32 weight_packed"),
    "another shape": ("weight_shape", lambda t: t + 8, "fits (8, 8) words"),
    "a shape of floats": ("weight_shape", lambda t: t.float(), "I64 or I32 (2,)"),
    "a shape of three": ("weight_shape", lambda t: torch.cat([t, t[:1]]), "I64 or I32 (2,)"),
    "too few scales": ("weight_scale", lambda t: t[:-1].contiguous(), "group of 32"),
    "other groups": ("weight_scale", lambda t: t[:, :1].contiguous(), "group of 32"),
    "scales of whole numbers": ("weight_scale", lambda t: t.to(torch.int16), "with BF16"),
    "too few zeros": ("weight_zero_point", lambda t: t[:, :1].contiguous(), "I32 (1, 2)"),
    "zeros of bytes": ("weight_zero_point", lambda t: t.to(torch.int8), "I8 (8, 2)"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    part, change, expected = CHANGES[case]
    weights = {**GROUPED, "symmetric": False}
    tensors, _ = compress((8, 64), "pack-quantized", weights, torch.bfloat16)
    tensors[f"m.{part}"] = change(tensors[f"m.{part}"])
    found = search(tmp_path, tensors, config_of("pack-quantized", weights))
    assert found.weights == ()
    assert any(expected in problem.expected for problem in found.problems), found.problems


NO_FIT = "a weight fits no group of the config"
NOT_READ = "in config_groups cannot be read"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other bits": (config_of("pack-quantized", {**GROUPED, "num_bits": 8}), NO_FIT),
    "floats": (config_of("pack-quantized", {**GROUPED, "type": "float"}), NO_FIT),
    "another group size": (config_of("pack-quantized", {**GROUPED, "group_size": 64}), NO_FIT),
    "zeros": (config_of("pack-quantized", {**GROUPED, "symmetric": False}), NO_FIT),
    "another format": (config_of("int-quantized", GROUPED), NO_FIT),
    "channels": (config_of("pack-quantized", args_of(4, "int", "channel")), NO_FIT),
    "one scale": (config_of("pack-quantized", args_of(4, "int", "tensor")), NO_FIT),
    "ignored": (config_of("pack-quantized", GROUPED, ignore=["m"]), "says is none"),
    "3 bits": (config_of("pack-quantized", {**GROUPED, "num_bits": 3}), NOT_READ),
    "a group of nothing": (config_of("pack-quantized", {**GROUPED, "group_size": None}), NOT_READ),
    "tokens": (config_of("pack-quantized", args_of(4, "int", "token")), NOT_READ),
    "a text for a group": (config_of("pack-quantized", {}, config_groups={"g": "x"}), NOT_READ),
    "a list of groups": (config_of("pack-quantized", {}, config_groups=[1]), "cannot be read"),
    "marlin": (config_of("marlin-24", GROUPED), "compressed is not supported"),
    "sparse": (
        config_of("pack-quantized", GROUPED, sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse weights",
    ),
    "6 bits": (config_of("mxfp6-pack-quantized", GROUPED), "compressed is not supported"),
    "rotated": (
        config_of("pack-quantized", GROUPED, transform_config={"config_groups": {"R1": {}}}),
        "rotated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_contradicts_is_refused(tmp_path: Path, case: str) -> None:
    config, what = CONFIGS[case]
    tensors, _ = compress((8, 64), "pack-quantized", GROUPED, torch.bfloat16)
    found = search(tmp_path, tensors, config)
    assert found.weights == ()
    (problem,) = found.problems
    assert what in problem.what


def test_a_group_that_names_a_module_is_the_one_it_has_to_fit(tmp_path: Path) -> None:
    tensors, _ = compress((8, 64), "pack-quantized", GROUPED, torch.bfloat16)
    config = config_of("pack-quantized", GROUPED)
    config["config_groups"]["group_1"] = {"targets": ["m"], "weights": {**GROUPED, "num_bits": 8}}
    (problem,) = search(tmp_path, tensors, config).problems
    assert problem.what == NO_FIT


def test_weights_that_are_not_compressed_are_refused(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.ones(8, 64), "m.weight_scale": torch.ones(8, 1)}
    (problem,) = search(tmp_path, tensors, {}).problems
    assert problem.found == "F32 (8, 64) with F32 (8, 1)"


def contents_trouble(folder: Path, tensors: Tensors, config: dict[str, Any]) -> str:
    """Return what is said of the contents of a checkpoint."""
    path = folder / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        place = stored([path], config, "BF16", files)
        found = compressed_tensors.find(place)
        assert found.problems == ()
        with pytest.raises(FormatError) as caught:
            registry.check_contents(found.weights, place)
    return str(caught.value)


def test_contents_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    tensors, _ = compress((8, 64), "pack-quantized", GROUPED, torch.bfloat16)
    config = config_of("pack-quantized", GROUPED)
    broken = tensors["m.weight_scale"].clone()
    broken[2, 1] = torch.nan
    said = contents_trouble(tmp_path, {**tensors, "m.weight_scale": broken}, config)
    assert "1 of 16 are not" in said
    groups = (torch.arange(64) // 32).int()
    groups[0] = 1
    said = contents_trouble(tmp_path, {**tensors, "m.weight_g_idx": groups}, config)
    assert "2 groups of 32 inputs" in said
    groups[0] = 2
    said = contents_trouble(tmp_path, {**tensors, "m.weight_g_idx": groups}, config)
    assert "2 groups of 32 inputs" in said


def test_scales_of_four_bits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    nv = args_of(4, "float", "tensor_group", group_size=16)
    tensors, _ = compress((8, 64), "nvfp4-pack-quantized", nv, torch.bfloat16)
    config = config_of("nvfp4-pack-quantized", nv)
    zero = {**tensors, "m.weight_global_scale": torch.zeros(1)}
    assert "cannot be divided" in contents_trouble(tmp_path, zero, config)
    nan = tensors["m.weight_scale"].view(torch.uint8).clone()
    nan[0, 0] = 0x7F
    broken = {**tensors, "m.weight_scale": nan.view(torch.float8_e4m3fn)}
    assert "1 of 32 are not" in contents_trouble(tmp_path, broken, config)
    mx = args_of(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
    tensors, _ = compress((8, 64), "mxfp4-pack-quantized", mx, torch.bfloat16)
    tensors["m.weight_scale"][3, 1] = 255
    said = contents_trouble(tmp_path, tensors, config_of("mxfp4-pack-quantized", mx))
    assert "1 of 16 are not" in said
