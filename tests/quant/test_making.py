"""Weights are quantized to the bytes that bitsandbytes and transformers make."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params
from bitsandbytes.utils import unpack_tensor_to_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from regraft.errors import NumericError
from regraft.formats.files.reading import FilePool
from regraft.numerics.arrays import Bytes, Floats
from regraft.numerics.conversions import KINDS
from regraft.quant import grid
from regraft.quant.formats.bitsandbytes import dynamic_map
from regraft.quant.making import Maker, Making
from regraft.quant.making_kernels import torch_sum
from regraft.quant.registry import find_weights, maker_of
from regraft.quant.rounding import codes_for
from regraft.quant.weight import Block
from regraft.testing.codecs import check_codec, stored

SHAPES = [(8, 128), (3, 64), (5, 7), (16, 48), (1, 1), (33, 96), (64, 320), (300, 257), (130, 512)]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NUMPY = {"U8": np.uint8, "I8": np.int8, "F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's sums depend on how many threads there are; ours are those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiles(shape: tuple[int, ...], grain: int, seed: int) -> list[Block]:
    """Return blocks that make up a weight, in a mixed order; some are parts of a row."""
    rng = np.random.default_rng(seed)
    columns = shape[-1]
    rows = int(np.prod(shape)) // columns
    cuts = sorted({0, rows, *(int(c) * grain for c in rng.integers(0, rows // grain + 1, 5))})
    found = []
    for low, high in pairwise(cuts):
        if high - low == 1 and columns > 2:
            middle = columns // 3 // 2 * 2
            found += [Block((low, high), (0, middle)), Block((low, high), (middle, columns))]
        else:
            found.append(Block((low, high), (0, columns)))
    found = [block for block in found if block.width]
    return [found[i] for i in rng.permutation(len(found))]


def values_of(weight: Floats, at: Block) -> Floats:
    return np.ascontiguousarray(
        weight[at.rows[0] : at.rows[1], at.columns[0] : at.columns[1]]
    ).ravel()


def make(
    maker: Maker, weight: Floats, grain: int = 1, seed: int = 0
) -> tuple[Making, dict[str, Bytes]]:
    """Quantize a weight tile by tile; return the bytes of what is stored, by name."""
    matrix = weight.reshape(-1, weight.shape[-1])
    making = maker.begin("w.weight", weight.shape)
    for at in tiles(weight.shape, grain, seed):
        making.gather(at, values_of(matrix, at))
    by_role = dict(making.finish())
    size = sum(o.role == "codes" for o in maker.outputs("w.weight", weight.shape))
    assert size == 1
    pieces = {}
    for at in tiles(weight.shape, grain, seed + 1):
        pieces[at.rows[0], at.columns[0]] = making.encode(at, values_of(matrix, at))
    by_role["codes"] = np.concatenate([pieces[key] for key in sorted(pieces)])
    outputs = maker.outputs("w.weight", weight.shape)
    assert {output.role for output in outputs} == set(by_role)
    for output in outputs:
        dtype = np.dtype(NUMPY[output.dtype])
        assert by_role[output.role].nbytes == dtype.itemsize * int(np.prod(output.shape))
    return making, {output.name: by_role[output.role] for output in outputs}


def four_bit_reference(
    weight: torch.Tensor, kind: str, *, nested: bool, blocksize: int = 64
) -> dict[str, torch.Tensor]:
    """Return what bitsandbytes stores of a weight."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    return {"w.weight": packed} | {
        f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()
    }


def check_four_bits(
    weight: torch.Tensor, kind: str, *, nested: bool, blocksize: int = 64, seed: int = 0
) -> None:
    dtype = next(name for name, kind_ in DTYPES.items() if kind_ == weight.dtype)
    maker = maker_of(kind, dtype=dtype, nested=nested, blocksize=blocksize)
    outputs = maker.outputs("w.weight", tuple(weight.shape))
    _, made = make(maker, weight.float().numpy(), grain=1 + weight.shape[-1] % 2, seed=seed)
    expected = four_bit_reference(weight, kind, nested=nested, blocksize=blocksize)
    assert set(made) == set(expected)
    assert outputs[0].name == "w.weight"
    for output in outputs:
        theirs, ours = expected[output.name], made[output.name].tobytes()
        if output.role == "state":
            ours = ours.rstrip(b" ") if nested else ours
        else:
            assert tuple(theirs.shape) == output.shape
        assert ours == theirs.contiguous().view(torch.uint8).numpy().tobytes(), output.name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_four_bits_are_those_of_bitsandbytes(
    kind: str, nested: bool, shape: tuple[int, ...], dtype: str
) -> None:
    torch.manual_seed(len(shape) + shape[0])
    check_four_bits(torch.randn(shape).to(DTYPES[dtype]), kind, nested=nested)
    check_four_bits(
        (torch.randn(shape) * 0.02).to(DTYPES[dtype]), kind, nested=nested, blocksize=128
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-42, 1e-39, 1e-38, 1e-30, 1e30, 1e36])
def test_four_bits_of_extreme_weights_are_those_of_bitsandbytes(
    kind: str, nested: bool, scale: float
) -> None:
    torch.manual_seed(1)
    weight = torch.randn(37, 66).clamp(-1, 1) * scale
    weight[3:9] = 0
    check_four_bits(weight, kind, nested=nested)
    check_four_bits(torch.full((3, 43), scale), kind, nested=nested)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_halfway_between_levels_go_where_bitsandbytes_sends_them(kind: str) -> None:
    levels = functional.get_4bit_type(kind, device="cpu").sort().values
    middle = (levels[1:] + levels[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(far)) for far in (-9.0, 9.0)]
    row = torch.cat([torch.ones(1), middle, *near, levels, torch.zeros(2)])
    row = row[:64]
    check_four_bits(torch.stack([row * scale for scale in (1, 3, 0.7, 1e-3)]), kind, nested=False)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 150), seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["nf4", "fp4"]), nested=st.booleans(),
    dtype=st.sampled_from(list(DTYPES.values())), spread=st.floats(0, 3),
)  # fmt: skip
def test_four_bits_of_any_weight_are_those_of_bitsandbytes(
    rows: int, columns: int, seed: int, kind: str, nested: bool, dtype: torch.dtype, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * np.exp(rng.normal(-4, spread, (rows, 1)))
    weight = torch.from_numpy(values.astype(np.float32)).to(dtype)
    check_four_bits(weight, kind, nested=nested, seed=seed)


@pytest.mark.slow
def test_sums_are_those_of_torch_on_one_thread() -> None:
    rng = np.random.default_rng(3)
    for n in [*range(1, 300), *rng.integers(300, 600_000, 60).tolist(), 2**18, 2**18 + 1]:
        x = np.abs(rng.standard_normal(n)).astype(np.float32)
        assert np.float32(torch_sum(x)) == np.float32(torch.from_numpy(x).sum().item()), n


def test_the_map_of_scales_is_that_of_bitsandbytes() -> None:
    assert dynamic_map().tobytes() == functional.create_dynamic_map().numpy().tobytes()


@pytest.mark.slow
def test_many_scales_are_quantized_as_bitsandbytes_does() -> None:
    """Enough of them that every entry of the table of codes is met."""
    torch.manual_seed(2)
    spread = torch.randn(8192, 1).exp() * 0.02
    check_four_bits(torch.randn(8192, 512) * spread, "nf4", nested=True)
    check_four_bits(torch.randn(8192, 512), "fp4", nested=True)


def test_a_padded_state_is_read_by_bitsandbytes() -> None:
    maker = maker_of("nf4", dtype="F16", nested=True)
    _, made = make(maker, np.ones((4, 32), np.float32))
    state = torch.from_numpy(made["w.weight.quant_state.bitsandbytes__nf4"].copy())
    assert unpack_tensor_to_dict(state)["nested_offset"] == 1.0
    longest = maker.state((4, 32), -2.2250738585072014e-308)  # type: ignore[attr-defined]
    assert len(longest) == state.numel()
    assert json.loads(longest)["shape"] == [4, 32]


# -- 8 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-6, 1e4])
def test_int8_is_that_of_bitsandbytes(dtype: str, shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(4)
    weight = (torch.randn(shape).clamp(-4, 4) * scale).to(DTYPES[dtype])
    weight[0] = 0
    params = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    _, made = make(maker_of("int8", dtype=dtype), weight.float().numpy())
    assert made["w.weight"].tobytes() == codes.view(torch.uint8).numpy().tobytes()
    assert made["w.SCB"].tobytes() == scales.numpy().tobytes()
    assert made["w.weight_format"].tobytes() == b"\0"
    assert params.data.dtype == torch.int8
    assert made["w.weight"].tobytes() == params.data.view(torch.uint8).numpy().tobytes()
    assert made["w.SCB"].tobytes() == params.SCB.numpy().tobytes()


# -- fp8 -------------------------------------------------------------------------------------------


def fp8_reference(weight: torch.Tensor, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return what transformers makes of a weight."""
    config = SimpleNamespace(weight_block_size=block, scale_fmt=None)
    op = Fp8Quantize(SimpleNamespace(quantization_config=config))
    made: dict[str, torch.Tensor] = op.convert({"w.weight": weight})
    return made


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("shape", "block"),
    [((256, 384), (128, 128)), ((128, 128), (128, 128)), ((6, 128, 256), (128, 128)),
     ((15, 21), (5, 7)), ((12, 64), (1, 64)), ((9, 33), (9, 33))],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-4, 60.0])
def test_fp8_is_that_of_transformers(
    dtype: str, shape: tuple[int, ...], block: tuple[int, int], scale: float
) -> None:
    torch.manual_seed(5)
    weight = (torch.randn(shape) * scale * torch.randn(shape).exp()).to(DTYPES[dtype])
    weight[..., : block[0], : block[1]] = 0
    expected = fp8_reference(weight, block)
    maker = maker_of("fp8", dtype=dtype, block=block)
    _, made = make(maker, weight.float().numpy())
    assert set(made) == set(expected)
    for output in maker.outputs("w.weight", shape):
        theirs = expected[output.name]
        assert tuple(theirs.shape) == output.shape
        assert made[output.name].tobytes() == theirs.view(torch.uint8).numpy().tobytes(), output


def test_every_float16_is_rounded_to_e4m3_as_torch_does() -> None:
    """All of them within 448, with a factor of one, and what lies beside a tie in float32."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.abs(every) <= 448]
    ties = (every[1:] + every[:-1]) / np.float32(2)
    some = np.concatenate([every, ties, np.nextafter(ties, np.float32(9)), [448.0]])
    weight = some.astype(np.float32)[None]
    _, made = make(maker_of("fp8", block=(1, weight.size)), weight)
    expected = torch.from_numpy(weight).to(torch.float8_e4m3fn).view(torch.uint8)
    assert made["w.weight_scale_inv"].view(np.float32)[0] == 1
    assert made["w.weight"].tobytes() == expected.numpy().tobytes()


def test_ragged_fp8_blocks_have_scales_of_their_own() -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((130, 200)).astype(np.float32)
    maker = maker_of("fp8", ragged=True)
    assert maker.fits((130, 200))
    assert not maker_of("fp8").fits((130, 200))
    _, made = make(maker, weight)
    scales = made["w.weight_scale_inv"].view(np.float32).reshape(2, 2)
    codes = torch.from_numpy(made["w.weight"].copy()).view(torch.float8_e4m3fn).reshape(130, 200)
    for i, rows in enumerate((slice(0, 128), slice(128, 130))):
        for j, columns in enumerate((slice(0, 128), slice(128, 200))):
            part = torch.from_numpy(weight[rows, columns])
            factor = 448 / part.abs().max()
            assert scales[i, j] == (1 / factor).item()
            assert torch.equal(
                (part * factor).to(torch.float8_e4m3fn).view(torch.uint8),
                codes[rows, columns].contiguous().view(torch.uint8),
            )


def test_fp8_blocks_too_small_for_a_factor_are_zeros() -> None:
    weight = np.full((128, 128), 1e-37, np.float32)
    _, made = make(maker_of("fp8"), weight)
    assert not made["w.weight"].any()
    assert made["w.weight_scale_inv"].view(np.float32)[0] == 1


# -- all of them -----------------------------------------------------------------------------------

EVERY: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}), ("nf4", {"nested": True}), ("fp4", {}), ("fp4", {"nested": True}), ("int8", {}),
    ("fp8", {}), ("fp8", {"ragged": True}),
]  # fmt: skip


def shape_for(kind: str, settings_: Mapping[str, Any]) -> tuple[int, int]:
    return (256, 384) if kind == "fp8" and not settings_ else (150, 331)


@pytest.mark.parametrize(("kind", "settings_"), EVERY)
def test_what_was_made_is_found_and_read_back(
    tmp_path: Path, kind: str, settings_: dict[str, Any]
) -> None:
    maker = maker_of(kind, dtype="F16", **settings_)
    shape = shape_for(kind, settings_)
    weight = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    making, made = make(maker, weight, grain=2)
    path = tmp_path / "m.safetensors"
    save_file(
        {o.name: made[o.name].view(NUMPY[o.dtype]).reshape(o.shape)
         for o in maker.outputs("w.weight", shape)}, path,
    )  # fmt: skip
    whole = Block((0, shape[0]), (0, shape[1]))
    start = making.start_codes(whole, weight.ravel())
    x16 = np.empty(weight.size, np.uint16)
    grid.values_of(start, x16, np.empty(0, np.float32), KINDS["F16"])
    with FilePool() as files:
        place = stored([path], maker.config(), "F16", files)
        _, found = find_weights(place)
        (one,) = found.weights
        assert place.read is not None
        check_codec(one, x16.view(np.float16).astype(np.float32).reshape(shape), place.read)
        assert one.codec == making.codec
        again = making.weight("F16", one.parts)
        assert again == one
    error = np.abs(x16.view(np.float16).astype(np.float32) - weight.ravel())
    assert error.max() < 1.2 * {"nf4": 0.7, "fp4": 0.9, "int8": 0.03, "fp8": 0.16}[kind]


@pytest.mark.parametrize(
    ("kind", "settings_", "load"),
    [("nf4", {"nested": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                "bnb_4bit_use_double_quant": True}),
     ("fp4", {}, {"load_in_4bit": True}), ("int8", {}, {"load_in_8bit": True})],
)  # fmt: skip
def test_files_are_those_that_transformers_saves(
    tmp_path: Path, kind: str, settings_: dict[str, Any], load: dict[str, Any]
) -> None:
    """A model loaded by transformers in 4 or 8 bits and saved: names, dtypes, shapes and bytes."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(9)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**load), device_map={"": "cpu"},
        dtype=torch.bfloat16,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "saved")
    plain = load_torch_file(tmp_path / "plain" / "model.safetensors")
    saved = load_torch_file(tmp_path / "saved" / "model.safetensors")
    maker = maker_of(kind, dtype="BF16", **settings_)
    layers = [name for name, value in plain.items() if "proj" in name and value.ndim == 2]
    for name in layers:
        values = plain[name].float().numpy()
        _, made = make(maker, values)
        for output in maker.outputs("w.weight", values.shape):
            theirs = saved.pop(output.name.replace("w.weight", name).replace("w.", name[:-6]))
            raw = theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert made[output.name].tobytes().rstrip(b" ") == raw.rstrip(b" ")
            assert output.role == "state" or tuple(theirs.shape) == output.shape
    assert len(layers) == 7
    assert not [name for name in saved if "proj" in name]
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    ours = maker.config()
    assert ours.pop("bnb_4bit_compute_dtype") in ("bfloat16", "float32")
    said.pop("bnb_4bit_compute_dtype")
    assert ours == said


@pytest.mark.parametrize(("kind", "settings_"), EVERY)
def test_stochastic_rounding_keeps_the_mean(kind: str, settings_: dict[str, Any]) -> None:
    shape = (256, 384)
    weight = np.full(shape, 0.301, np.float32)
    weight[:, ::32] = 1
    making, _ = make(maker_of(kind, dtype="F32", **settings_), weight)
    whole = Block((0, shape[0]), (0, shape[1]))
    start = making.start_codes(whole, weight.ravel())
    sums = np.zeros(2)
    codes = codes_for(start, KINDS["F32"], weight.ravel(), "stochastic", 5, (0, shape[1]), sums)
    rounded = np.empty(weight.size, np.float32)
    done = grid.Codes(**{**vars(start), "codes": codes})
    grid.values_of(done, np.empty(0, np.uint16), rounded, KINDS["F32"])
    inner = rounded.reshape(shape)[:, 1:32]
    assert abs(float(inner.mean()) - 0.301) < 0.002
    plain = np.empty(weight.size, np.float32)
    grid.values_of(start, np.empty(0, np.uint16), plain, KINDS["F32"])
    assert len(np.unique(inner)) == 2
    assert len(np.unique(plain.reshape(shape)[:, 1:32])) == 1


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(kind: str, bad: float) -> None:
    weight = np.ones((128, 128), np.float32)
    weight[7, 9] = bad
    with pytest.raises(NumericError, match="NaN or infinity"):
        make(maker_of(kind), weight)


def test_scales_with_no_finite_mean_are_refused() -> None:
    weight = np.full((16, 64), 3e38, np.float32)
    make(maker_of("nf4"), weight)
    with pytest.raises(NumericError, match="sum of its scales"):
        make(maker_of("nf4", nested=True), weight)


def test_what_float16_cannot_hold_is_refused_for_int8() -> None:
    with pytest.raises(NumericError, match="1 of 2 blocks"):
        make(maker_of("int8"), np.array([[1, 2], [3, 70000]], np.float32))


def test_threads_may_gather_the_same_blocks() -> None:
    """A row of 8 elements is an eighth of a block, so that all threads meet in every scale."""
    weight = np.random.default_rng(8).standard_normal((4096, 8)).astype(np.float32)
    making = maker_of("nf4").begin("w", weight.shape)

    def run(part: int) -> None:
        for row in range(part, 4096, 4):
            making.gather(Block((row, row + 1), (0, 8)), weight[row])

    threads = [threading.Thread(target=run, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    small = making.finish()
    expected = np.abs(weight.reshape(-1, 64)).max(1)
    assert small["absmax"].tobytes() == expected.tobytes()
