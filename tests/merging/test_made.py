"""Models put into a format, as transformers and bitsandbytes do it, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from blake3 import blake3
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import regraft
from faithful.harness import load_complete
from merging import toys
from merging.test_undo import assert_restores
from regraft.errors import UnsupportedError
from regraft.testing import zoo

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {}), "nf4, double": ("nf4", {"double_quant": True}),
    "fp4": ("fp4", {}), "int8": ("int8", {}),
}  # fmt: skip
THEIRS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
ARCHITECTURES = ("llama_tied", "gemma3", "opt", "bloom", "mixtral", "qwen3_moe", "gpt_oss", "t5",
                 "bert_seqcls", "vit_conv", "llava")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose sizes are odd: blocks of 64 reach over rows, and the last one is short."""
    return zoo.make_base("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of whole blocks of 128 by 128, but for keys and values."""
    config = transformers.LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    zoo.randomize(model)
    folder = tmp_path_factory.mktemp("bases") / "wide"
    model.bfloat16().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor in the files of a model."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def quantized_modules(model: nn.Module) -> dict[str, str]:
    """Return the classes of the modules of a library of quantization, by name."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind for name, kind in classes.items() if kind in ("Linear4bit", "Linear8bitLt")}


def their_values(module: nn.Module) -> torch.Tensor:
    """Return what a quantized module's weight stands for, as its library computes it.

    By its general code: what bitsandbytes has for CPUs takes the scales of other blocks where rows
    are no whole number of blocks.
    """
    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        state = weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        return _dequantize_4bit_compute(
            weight.data.reshape(-1), absmax.float(), state.code, state.blocksize, state.shape,
            state.dtype,
        )  # fmt: skip
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def plain_copy(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a loaded model's weights, those of quantized modules dequantized by their library."""
    found = {
        f"{name}.weight": their_values(module)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }
    return dict(model.named_parameters()) | found


# -- against transformers and bitsandbytes ---------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
def test_every_tensor_is_what_transformers_saves(llama: Path, tmp_path: Path, kind: str) -> None:
    to, options = OURS[kind]
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=BitsAndBytesConfig(**THEIRS[kind]), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    regraft.quantize(llama, tmp_path / "ours", to, **options)
    expected, found = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:  # its length has to be known before its numbers are
            states = [json.loads(each.numpy().tobytes()) for each in (found[name], tensor)]
            assert states[0] == states[1]
            continue
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
    ours = load_complete(tmp_path / "ours", "llama")
    assert quantized_modules(ours) == quantized_modules(theirs) != {}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_modules_that_transformers_would_quantize_are_quantized(
    tmp_path: Path, architecture: str, to: str
) -> None:
    """And what was made is what regraft itself reads back as plain weights."""
    base = zoo.make_base(architecture, tmp_path / "base", "float32")
    receipt = regraft.quantize(base, tmp_path / "out", to)
    loader = getattr(transformers, zoo.ARCHITECTURES[architecture].auto)
    theirs = loader.from_pretrained(base, quantization_config=BitsAndBytesConfig(**THEIRS[to]))
    ours = load_complete(tmp_path / "out", architecture)
    modules = quantized_modules(ours)
    assert modules == quantized_modules(theirs) != {}
    assert sum(record.codes > 0 for record in receipt.tensors) == len(modules)
    regraft.dequantize(tmp_path / "out", tmp_path / "plain", dtype="float32")
    plain = load_complete(tmp_path / "plain", architecture)
    expected = plain_copy(ours)
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, expected[name].float()), name


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_the_logits_are_those_of_the_dequantized_model(wide: Path, tmp_path: Path, to: str) -> None:
    regraft.quantize(wide, tmp_path / "out", to)
    regraft.dequantize(tmp_path / "out", tmp_path / "plain", dtype="float32")
    inputs = zoo.example_inputs("llama")
    found = zoo.logits(load_complete(tmp_path / "out", "llama"), inputs)
    expected = zoo.logits(zoo.load_base(tmp_path / "plain"), inputs)
    assert np.abs(found - expected).max() < 0.05 * np.ptp(expected)  # they compute in 8 or 16 bits


@pytest.mark.parametrize("to", ["nf4", "int8", "fp8"])
def test_a_merge_on_the_way_is_a_merge_first(wide: Path, tmp_path: Path, to: str) -> None:
    """All values pass from the merge into codes in float32, which the file between would keep."""
    adapter = toys.write_adapter(
        tmp_path / "adapter", toys.lora("model.layers.0.mlp.up_proj", 256, 128),
        target_modules=["up_proj"],
    )  # fmt: skip
    regraft.merge(wide, adapter, tmp_path / "merged", dtype="float32")
    regraft.quantize(tmp_path / "merged", tmp_path / "later", to)
    regraft.merge(wide, adapter, tmp_path / "direct", quantize=to)
    later, direct = stored(tmp_path / "later"), stored(tmp_path / "direct")
    name = "model.layers.0.mlp.up_proj.weight"
    assert later.keys() == direct.keys()
    assert torch.equal(direct[name].view(torch.uint8), later[name].view(torch.uint8))
    load_complete(tmp_path / "direct", "llama")


# -- fp8 -------------------------------------------------------------------------------------------


def test_fp8_is_read_by_transformers_as_by_regraft(wide: Path, tmp_path: Path) -> None:
    regraft.quantize(wide, tmp_path / "out", "fp8")
    codes = [name for name, t in stored(tmp_path / "out").items() if t.dtype == torch.float8_e4m3fn]
    assert len(codes) == 10  # all but keys and values, which are half a block
    theirs = load_complete(tmp_path / "out", "llama")
    regraft.dequantize(tmp_path / "out", tmp_path / "plain")
    ours = stored(tmp_path / "plain")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours[name]), name


FP8_LAYERS = {"llama": 10, "mixtral": 8}


@pytest.mark.parametrize("architecture", FP8_LAYERS)
def test_on_a_gpu_the_modules_that_are_fp8_would_be_those_with_scales(
    wide: Path, tmp_path: Path, architecture: str
) -> None:
    """There transformers puts modules of its own in their place, stacks of experts among them."""
    base = wide
    if architecture == "mixtral":
        config = transformers.MixtralConfig(
            vocab_size=zoo.VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, num_local_experts=3, pad_token_id=0,
        )  # fmt: skip
        model = transformers.MixtralForCausalLM(config)
        zoo.randomize(model)
        model.bfloat16().save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    regraft.quantize(base, tmp_path / "out", "fp8")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**settings), pre_quantized=True)
    model_class = zoo.model_class(base)
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(base))
    quantizer._process_model_before_weight_loading(model)
    scaled = {name for name in model.state_dict() if name.endswith("_scale_inv")}
    assert scaled == {name for name in stored(tmp_path / "out") if name.endswith("_scale_inv")}
    assert len(scaled) == FP8_LAYERS[architecture]


# -- what is no linear layer -----------------------------------------------------------------------


def test_layers_that_lie_transposed_are_refused(tmp_path: Path) -> None:
    base = zoo.make_base("gpt2", tmp_path / "base")
    with pytest.raises(UnsupportedError, match="no linear layer"):
        regraft.quantize(base, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_the_last_layer_of_torch_s_attention_stays_plain(tmp_path: Path) -> None:
    """torch has a class of its own for it, which transformers does not replace."""
    base = zoo.make_base("toynet", tmp_path / "base")
    regraft.quantize(base, tmp_path / "out", "nf4")
    loaded = load_complete(tmp_path / "out", "toynet")
    assert quantized_modules(loaded) == {"head": "Linear4bit"}


def test_the_list_of_plain_modules_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    """transformers looks through all of it for every module."""
    base = zoo.make_base("qwen3_moe", tmp_path / "base")
    regraft.quantize(base, tmp_path / "out", "nf4")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    experts = [name for name in settings["llm_int8_skip_modules"] if "experts" in name]
    assert experts == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


# -- verified and undone ---------------------------------------------------------------------------


MADE: list[dict[str, Any]] = [
    {"quantize": "nf4", "double_quant": True}, {"quantize": "int8", "rounding": "stochastic"},
    {"quantize": "int8", "dtype": "float32"},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", MADE, ids=str)
def test_what_was_made_is_verified_and_undone(tmp_path: Path, options: dict[str, Any]) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "adapter")
    out = tmp_path / "out"
    regraft.merge(base, adapter, out, undo=True, **options)
    report = regraft.verify(out, base=base, adapters=[adapter])
    assert report.verdict == "exact", report
    assert_restores(base, out, tmp_path)
    weights = load_file(out / "model.safetensors")
    weights[f"{toys.Q0}.weight"][2] ^= 1
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    edited = regraft.verify(out, base=base, adapters=[adapter])
    assert edited.verdict != "exact"
    assert [t.name for t in edited.tensors if t.verdict != "exact"] == [f"{toys.Q0}.weight"]


@pytest.mark.parametrize("options", MADE[:2], ids=str)
def test_a_whole_weight_of_an_adapter_is_made_and_undone(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = {f"base_model.model.{toys.Q0}.weight": toys.draw(toys.HIDDEN, toys.HIDDEN, seed=3)}
    down = "model.layers.1.mlp.down_proj"
    tensors = whole | toys.lora(down, toys.HIDDEN, toys.INTER)
    base, out = toys.write_base(tmp_path / "base"), tmp_path / "out"
    adapter = toys.write_adapter(
        tmp_path / "adapter", tensors, target_modules=["down_proj"], modules_to_save=["q_proj"]
    )
    receipt = regraft.merge(base, adapter, out, undo=True, **options)
    stored = load_numpy(adapter / "adapter_model.safetensors")
    digests = {name: blake3(tensor.tobytes()).hexdigest() for name, tensor in stored.items()}
    assert receipt.adapters[0].tensors == digests
    assert regraft.verify(out, base=base, adapters=[adapter]).verdict == "exact"
    assert_restores(base, out, tmp_path)
