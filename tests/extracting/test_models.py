"""Adapters out of fine-tuned models of several families: in PEFT they answer as the models do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import regraft

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
TOKENS = torch.arange(3, 20)[None]
Build = Callable[[], Any]


def small(name: str, **more: Any) -> Build:
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    return lambda: model(config(**SMALL | more))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


FAMILIES: dict[str, Build] = {
    "llama": small("Llama"),
    "llama, tied": small("Llama", tie_word_embeddings=True),
    "qwen2, with biases": small("Qwen2"),
    "phi3, fused": small("Phi3", pad_token_id=0),
    "gpt2, transposed": gpt2,
    "mixtral, with experts": small("Mixtral", num_local_experts=3),
}


def fine_tune(model: Any, pattern: str) -> None:
    """Add a matrix of rank 4 to each matrix, and a little to every vector."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not re.search(pattern, name):
                continue
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) / 50
                continue
            stack = parameter.reshape(-1, *parameter.shape[-2:])
            for matrix in stack:
                left, right = torch.randn(len(matrix), 4), torch.randn(4, matrix.shape[1])
                matrix += left @ right / 100


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [".", "embed|wte|norm|ln_|q_proj|c_attn"], ids=["all", "some"])
def test_base_and_adapter_answer_as_the_fine_tuned_model(
    family: str, pattern: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.save_pretrained(tmp_path / "base")
    before = model(TOKENS).logits
    fine_tune(model, pattern)
    model.save_pretrained(tmp_path / "tuned")
    wanted = model(TOKENS).logits
    regraft.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=4, dtype="float32"
    )
    regraft.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    kind = type(model)
    merged = kind.from_pretrained(tmp_path / "merged")(TOKENS).logits
    assert (merged - wanted).abs().max() < 1e-4 * (before - wanted).abs().max()
    if family == "mixtral, with experts":
        return  # PEFT has no names for experts one by one
    live = PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    assert (live(TOKENS).logits - wanted).abs().max() < 1e-4 * (before - wanted).abs().max()


def test_a_vocabulary_that_grew_travels_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    fine_tune(model, "q_proj|embed|head")
    model.save_pretrained(tmp_path / "tuned")
    report = regraft.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", dtype="float32"
    )
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(report.whole)
    regraft.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    new = torch.tensor([[66, 3, 69, 12]])
    assert torch.allclose(merged(new).logits, model(new).logits, atol=1e-4)
