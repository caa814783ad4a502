"""Tiny models with tokenizers, in folders as transformers saves them."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from regraft.names.gguf import FAMILIES

ROWS = 640

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>")

CORPUS = (
    "the quick brown fox doesn't jump over the lazy dog's 12345 tails, they'll say; WE'RE DONE!",
    'for (int i = 0; i < 1000; ++i) {\n\t\tprint("x", i);\n    }\n\n\nreturn   None',
    "Зачем ты пришёл сюда? Это не твоё дело, 2024 год. Привет мир",
    "你好，世界。我想在苹果工作，今天是2024年12月31日。",
    "नमस्ते दुनिया, आप कैसे हैं? मैं ठीक हूँ।",
    "こんにちは世界、カタカナとひらがな。",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "Ünïcödé naïve café, Straße, ÅÄÖ åäö, i̇stanbul",
    "🚀🚀 emoji 👩‍👩‍👧 🇩🇪 ✅ (normal) 🦙🦙",
    "mixed CaseWords camelCaseThing SCREAMING_CASE 3.14 1,000,000 x=y+z a/b\\c",
    "  leading and trailing   \t tabs\r\nwindows\r\nlines  ",
)


@cache
def trained() -> str:
    """Return merges that reach over every border that a pre-tokenizer could draw."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=ROWS - 10, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL[:1]), show_progress=False,
    )  # fmt: skip
    pieces = [text[at : at + 6] for text in CORPUS * 3 for at in range(0, len(text), 3)]
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer.to_str()


def byte_level(
    pre: Any = None, normalizer: Any = None, *, ignore_merges: bool = False, bos: bool = False
) -> Tokenizer:
    """Return a byte-level BPE tokenizer with other rules."""
    content = json.loads(trained())
    content["model"]["ignore_merges"] = ignore_merges
    # No merge makes this token: only who ignores merges where a word is a token makes it.
    content["model"]["vocab"]["Zug"] = len(content["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL[1:3]))
    tokenizer.add_tokens([AddedToken(SPECIAL[3], normalized=False)])
    if bos:
        row = tokenizer.token_to_id("<|im_start|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", row)]
        )
    return tokenizer


def split(pattern: str) -> Any:
    """Return the pre-tokenizer of newer models: their own expression, then bytes."""
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def digits() -> Any:
    """Return the pre-tokenizer of SmolLM2 and StarCoder2."""
    return pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """Save a tokenizer as transformers does."""
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    special["pad_token"] = "<|endoftext|>" if "bos_token" not in settings else "<unk>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special | settings)
    fast.save_pretrained(folder)


SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "gemma3": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32,
               "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {"tie_word_embeddings": True, "sliding_window": None},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {"head_dim": 16},
}  # fmt: skip


def save_model(
    folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a small model with random values in every parameter, and a tokenizer; return it."""
    family = FAMILIES[architecture]
    settings = {"model_type": family.model_type} | SIZES | OWN[architecture] | deepcopy(changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        shift = 1.0 if name.endswith("norm.weight") and not family.centered else 0.0
        torch.nn.init.normal_(parameter, mean=shift, std=0.2)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder, byte_level())
    return folder


def own_logs(folder: Path, prompts: list[list[int]]) -> list[list[float]]:
    """Return transformers' log-probabilities after prompts, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
    return [torch.log_softmax(each, -1).tolist() for each in logits]
