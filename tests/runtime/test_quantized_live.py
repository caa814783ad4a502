"""Adapters on models whose linear layers bitsandbytes keeps in 4 or 8 bits."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import regraft
from faithful.harness import assert_visible
from regraft.runtime.forward.layers.plain import plain_weight
from regraft.runtime.model.fingerprint import compare, fingerprint_of, parameters_of
from regraft.runtime.model.live_base import LiveBase
from regraft.testing import zoo
from regraft.testing.adapters import perturb
from runtime.live import distance, losses_of, traces_of, tree_of

pytest.importorskip("bitsandbytes")

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=zoo.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    zoo.randomize(model)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def load(base: Path, form: str) -> Any:
    config = BitsAndBytesConfig(**FORMATS[form], bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )
    return model.eval()


def adapter(base: Path, name: str) -> Path:
    """Return the folder of an adapter, made once and kept beside its base."""
    folder = base.parent / f"{base.name}-{name}"
    if folder.exists():
        return folder
    fields = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | CONFIGS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**fields))
        perturb(live, 3)
        live.save_pretrained(folder)
    return folder


def dequantized(base: Path, form: str) -> Any:
    """Return a plain model with the values that a quantized one stands for."""
    quantized, plain = load(base, form), LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for path, module in quantized.named_modules():
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                weight = plain_weight(module, "weight")
                plain.get_submodule(path).weight.copy_(weight)
    return plain.eval()


ROUNDED = 1e-2
"""How far two computations may be apart where kernels for 4 and 8 bits round activations: the least
difference before can become a step of bfloat16 after."""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_pefts_model(name: str, form: str, base: Path) -> None:
    path, inputs = adapter(base, name), zoo.example_inputs("llama")
    # PEFT's DoRA reads 4-bit weights wrongly once a pass on a CPU has packed them anew, and 8-bit
    # ones not at all after the first pass: the truth is PEFT's model on the plain values then.
    theirs = dequantized(base, form) if name == "dora" else load(base, form)
    expected = zoo.logits(PeftModel.from_pretrained(theirs, path).eval(), inputs)
    tolerance = 3 * ROUNDED if name == "dora" else ROUNDED
    model = load(base, form)
    bare = zoo.logits(model, inputs)
    assert_visible(expected, bare)
    # not state_dict(): after a pass on a CPU, bitsandbytes' own damages the model
    tree, traces = tree_of(model), traces_of(model)
    adapters = regraft.attach(model, path)
    assert distance(zoo.logits(model, inputs), expected) <= tolerance
    with adapters.rows([None, "default"]):
        mixed = zoo.logits(model, inputs)
    assert distance(mixed[0], bare[0]) <= ROUNDED
    assert distance(mixed[1], expected[1]) <= tolerance
    adapters.detach()
    assert (tree_of(model), traces_of(model)) == (tree, traces)
    assert np.array_equal(zoo.logits(model, inputs), bare)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "int8"])
def test_weights_are_read_right_whatever_a_pass_and_a_state_dict_left(
    form: str, base: Path, tmp_path: Path
) -> None:
    """On some CPUs a pass packs codes and scales anew, and ``state_dict()`` unpacks the codes."""
    model = load(base, form)
    layer = model.model.layers[0].mlp.down_proj
    path = adapter(base, "dora")
    before, mark = plain_weight(layer, "weight").float(), fingerprint(model)
    for leave in (lambda: zoo.logits(model, zoo.example_inputs("llama")), model.state_dict):
        leave()
        now = plain_weight(layer, "weight").float()
        assert (now - before).norm() <= 0.01 * before.norm()
        assert compare(mark, LiveBase(model)) != "another"
    regraft.save(regraft.attach(model, path), tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def fingerprint(model: Any) -> str:
    base = LiveBase(model)
    found = fingerprint_of(parameters_of(base, base.quantized))
    assert found is not None
    return found


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantized_base_is_trained_around(form: str, base: Path) -> None:
    model = load(base, form)
    codes = copy.deepcopy(
        {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    )
    handle = regraft.attach(model, regraft.LoraConfig(r=4, target_modules="all-linear"))
    losses = losses_of(model, handle, steps=4)
    assert losses[-1] < losses[0]
    assert codes
    for name, parameter in model.named_parameters():
        if name in codes:
            assert torch.equal(parameter, codes[name]), name


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_dequantized_after_attaching_the_adapter_is_merged_and_saved(
    name: str, form: str, base: Path, tmp_path: Path
) -> None:
    path, inputs = adapter(base, name), zoo.example_inputs("llama")
    model = load(base, form)
    adapters = regraft.attach(model, path)
    zoo.logits(model, inputs)
    plain = model.dequantize().float()
    found = zoo.logits(plain, inputs)
    with adapters.disable_adapter():
        assert_visible(found, zoo.logits(plain, inputs))
    merged = adapters.merge_and_unload()
    assert distance(zoo.logits(merged, inputs), found) <= 1e-4
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(zoo.logits(again, inputs), found) <= 1e-4


def test_dequantized_after_a_merge_stays_merged(base: Path) -> None:
    path, inputs = adapter(base, "lora"), zoo.example_inputs("llama")
    model = load(base, "nf4")
    for module in model.modules():
        # On processors with AVX512_BF16 a forward pass packs the codes anew, and transformers'
        # dequantize does not know of it: what it makes of them are other weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    adapters = regraft.attach(model, path)
    adapters.merge_adapter()
    expected = zoo.logits(model, inputs)
    model.dequantize()
    assert distance(zoo.logits(model, inputs), expected) <= ROUNDED
    with pytest.raises(regraft.UsageError, match="not kept"):
        adapters.unmerge_adapter()
    adapters.merge_and_unload()
    assert distance(zoo.logits(model, inputs), expected) <= ROUNDED
