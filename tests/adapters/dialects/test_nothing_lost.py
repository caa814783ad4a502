"""Conversions lose nothing: what two names claim is refused, and PEFT reads what there was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import regraft
from merging import toys
from regraft.errors import AdapterError, FormatError, UnsupportedError

TOKENS = torch.arange(3, 15)[None]


def base_of(folder: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, targets: list[str], **more: Any) -> Path:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=targets, **more)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, str(adapter)).eval()(TOKENS).logits


@pytest.mark.parametrize("named", [True, False], ids=["with base", "without"])
def test_factors_of_embeddings_outlive_the_copies_that_peft_saves(
    named: bool, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", tied=False)
    adapter = adapter_of(base, tmp_path / "a", ["q_proj", "embed_tokens", "lm_head"])
    given = {"base": base} if named else {}
    regraft.convert(adapter, tmp_path / "u", uniform=True, **given)  # type: ignore[call-overload]
    config = toys.read_json(tmp_path / "u" / "adapter_config.json")
    assert not config["modules_to_save"]
    assert torch.allclose(logits(base, tmp_path / "u"), logits(base, adapter), atol=1e-6)
    assert regraft.check(base, tmp_path / "u").ok


def test_a_combined_adapter_keeps_factors_of_embeddings(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tied=False)
    adapter = adapter_of(base, tmp_path / "a", ["q_proj", "embed_tokens", "lm_head"])
    regraft.combine([adapter], tmp_path / "c")
    assert torch.allclose(logits(base, tmp_path / "c"), logits(base, adapter), atol=1e-5)


@pytest.mark.parametrize("to", ["mlx", "tinker"])
def test_both_sides_of_a_tie_stay_one_in_the_uniform_form(to: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tied=True)
    targets = ["q_proj", "embed_tokens"]
    adapter = adapter_of(base, tmp_path / "a", targets, ensure_weight_tying=True)
    regraft.convert(adapter, tmp_path / "there", to=to, base=base, uniform=True)
    regraft.merge(base, adapter, tmp_path / "one")
    regraft.merge(base, tmp_path / "there", tmp_path / "other")
    one, other = toys.load(tmp_path / "one"), toys.load(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(np.allclose(values, other[name], atol=1e-6) for name, values in one.items())


def factors(name: str, seed: int, prefix: str = "") -> dict[str, np.ndarray]:
    drawn = toys.lora(name, 64, 32, 2, seed)
    return {prefix + key.removeprefix(toys.PREFIX): value for key, value in drawn.items()}


@pytest.mark.parametrize(
    "other",
    [
        factors("model.unembed_tokens", 2),
        factors("unembed_tokens", 2, toys.PREFIX),
        factors("lm_head", 2, toys.PREFIX),
        factors("model._orig_mod.unembed_tokens", 2, toys.PREFIX),
    ],
    ids=["another prefix", "another owner", "the head", "a wrapper"],
)
def test_two_names_of_tinkers_head_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tied=False)
    held = factors("model.unembed_tokens", 1, toys.PREFIX) | other
    adapter = toys.write_adapter(tmp_path / "a", held, r=2, lora_alpha=2)
    with pytest.raises(AdapterError, match="unembed_tokens"):
        regraft.merge(base, adapter, tmp_path / "out")
    with pytest.raises(AdapterError, match="unembed_tokens"):
        regraft.convert(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_two_names_of_one_module_of_kohyas_are_refused(tmp_path: Path) -> None:
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    base = toys.write_base(
        tmp_path / "text_encoder", {f"{module}.weight": toys.draw(16, 16)},
        {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    )  # fmt: skip
    held = {}
    for number, part in enumerate(("te", "te1")):
        name = f"lora_{part}_{module.replace('.', '_')}"
        held[f"{name}.lora_down.weight"] = toys.draw(2, 16, seed=number)
        held[f"{name}.lora_up.weight"] = toys.draw(16, 2, seed=number)
    save_file(held, tmp_path / "k.safetensors")
    with pytest.raises(AdapterError, match=r"lora_te1?_.* and .*lora_te1?_"):
        regraft.merge(base, tmp_path / "k.safetensors", tmp_path / "out")


def test_a_config_nested_without_end_is_a_typed_error(tmp_path: Path) -> None:
    name = "unet.down_blocks.0.attentions.0.to_q"
    held = {f"{name}.lora_A.weight": toys.draw(2, 8), f"{name}.lora_B.weight": toys.draw(8, 2)}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(held, file, {"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(FormatError):
        regraft.inspect(file)


@pytest.mark.parametrize("alpha", [1e-44, 1e-200])
def test_scales_that_would_leave_nothing_are_refused(alpha: float, tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a", toys.attention(), lora_alpha=alpha)
    with pytest.raises(UnsupportedError, match="below what float32 holds"):
        regraft.convert(adapter, tmp_path / "out", uniform=True)
