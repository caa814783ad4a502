"""A tiny model that speaks, with a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.testing.adapters import make_adapter
from regraft.testing.zoo import VOCAB, make_base

TEMPLATE = (
    "{% for m in messages %}{{ 'w4 ' if m.role == 'system' else 'w5 ' }}{{ m.content }} "
    "{% endfor %}w6"
)
"""A chat template of the words that :func:`write_tokenizer` knows."""


def write_tokenizer(folder: Path, template: str | None = None) -> None:
    """Write a tokenizer of as many words, ``w0`` and so on, as the models of the zoo know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w2")
    fast.chat_template = template
    fast.save_pretrained(folder)


def write_speaker(folder: Path, template: str | None = None) -> Path:
    """Write a model with its tokenizer; it does not stop by itself."""
    make_base("llama", folder, dtype="float32")
    write_tokenizer(folder, template)
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))
    return folder


def write_square(folder: Path) -> Path:
    """Write a model whose sizes bitsandbytes' kernels like."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int = 1, **fields: Any) -> Path:
    """Write an adapter of the model that changes what it says."""
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", **fields}
    return make_adapter(base, folder, LoraConfig(**settings), seed)
