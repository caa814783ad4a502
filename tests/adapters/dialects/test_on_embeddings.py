"""Conversions and combinations of adapters on embeddings answer as before, in PEFT and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import regraft
from merging import toys

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
