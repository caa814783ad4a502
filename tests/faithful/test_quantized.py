"""A merge into a quantized base is PEFT's live model on what the base stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import regraft
from faithful.cases import ATTENTION, lora
from faithful.harness import Workshop, assert_close, assert_visible, merge_and_load
from regraft.testing import zoo
from regraft.testing.adapters import live_logits

Configs = tuple[Mapping[str, Any], ...]
CASES: dict[str, tuple[str, str, Configs]] = {
    "lora": ("llama", "nf4", (lora(),)),
    "dora and rslora": ("llama", "nf4", (lora(use_dora=True, use_rslora=True),)),
    "several": ("llama", "int8", (lora(), lora(["q_proj", "up_proj"], r=3))),
    "head": ("llama", "nf4", (lora(ATTENTION, modules_to_save=["lm_head", "embed_tokens"]),)),
    "token rows": ("llama", "fp4", (lora(ATTENTION, trainable_token_indices=[5, 33]),)),
    "biases": ("qwen2_tied", "int8", (lora(["q_proj", "v_proj"], lora_bias=True),)),
    "tied": ("llama_tied", "nf4", (lora(["q_proj", "embed_tokens"]),)),
    "experts beside": ("mixtral", "nf4", (lora(ATTENTION),)),
    "two stacks": ("t5", "nf4", (lora(),)),
    "classes": ("bert_seqcls", "int8", (lora(["query", "dense"], task_type="SEQ_CLS"),)),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_out_is_the_live_model_on_the_dequantized_base(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    architecture, to, configs = CASES[name]
    base, quantized, plain = workshop.base(architecture), tmp_path / to, tmp_path / "plain"
    regraft.quantize(base, quantized, to)
    regraft.dequantize(quantized, plain, dtype="float32")
    adapters = [workshop.adapter(base, config, seed=n) for n, config in enumerate(configs, 1)]
    weights = (0.5, 1.5) if len(adapters) > 1 else (1.0,)
    inputs = zoo.example_inputs(architecture)
    expected = live_logits(plain, adapters, inputs, weights)
    assert_visible(expected, zoo.logits(zoo.load_base(plain), inputs))
    argument = list(zip(adapters, weights, strict=True))
    merged = merge_and_load(quantized, argument, tmp_path / "merged", architecture)
    assert_close(zoo.logits(merged, inputs), expected)
