"""Cases about embeddings, heads, whole modules, token rows, and what happens to a tie."""

from __future__ import annotations

from typing import Any

from faithful.cases import ULP_FLIPS, lora, one
from faithful.harness import Case

TOKENS = [4, 17, 33, 50]
GROWN = 67
"""Rows after training added six tokens to the zoo's vocabulary of 61."""


def grow(model: Any) -> None:
    """Add six rows to the embeddings, with values that no random draw has to repeat."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model.resize_token_embeddings(GROWN, mean_resizing=False)


def with_new_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """Use two of the added tokens."""
    ids = inputs["input_ids"].clone()
    ids[0, 3], ids[1, 5] = GROWN - 1, GROWN - 5
    return inputs | {"input_ids": ids}


def with_trained_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """Use some of the tokens whose rows are trained."""
    ids = inputs["input_ids"].clone()
    ids[0, 3], ids[1, 5], ids[1, 6] = TOKENS[0], TOKENS[1], TOKENS[2]
    return inputs | {"input_ids": ids}


def grown(architecture: str, feature: str, config: Any) -> Case:
    """Return a case whose training grew the vocabulary."""
    return one(architecture, f"grown-{feature}", config, prepare=grow, inputs=with_new_tokens)


def tokens(architecture: str, feature: str, config: Any) -> Case:
    """Return a case of trained token rows."""
    return one(architecture, f"tokens-{feature}", config, inputs=with_trained_tokens)


EMBEDDINGS = [
    one("llama", "embed", lora(["embed_tokens"])),
    one("llama", "embed-rslora", lora(["embed_tokens", "q_proj"], use_rslora=True)),
    one("llama", "embed-dora", lora(["embed_tokens"], use_dora=True)),
    one("llama", "lm-head", lora(["lm_head"])),
    one("llama", "lm-head-dora", lora(["lm_head", "q_proj"], use_dora=True)),
    one("llama", "embed-and-lm-head", lora(["embed_tokens", "lm_head"])),
    one(
        "llama",
        "embed-pissa",
        lora(["embed_tokens", "q_proj"], init_lora_weights="pissa"),
        tolerance=ULP_FLIPS,
    ),
    one("llama", "lm-head-sharded", lora(["lm_head", "embed_tokens"]), sharded=True),
    one("gpt_neox", "embed", lora(["embed_in"])),
    one("gpt_neox", "lm-head", lora(["lm_head"])),
    one("gpt2", "positions", lora(["wpe"])),
    one("bert_seqcls", "embeddings", lora(["word_embeddings", "position_embeddings"])),
    one("bert_seqcls", "embedding-dora", lora(["word_embeddings"], use_dora=True)),
    one("toynet", "embed", lora(["embed"])),
    one("toynet", "embed-dora", lora(["embed"], use_dora=True)),
    one("mixtral", "lm-head", lora(["lm_head"])),
    one("llava", "lm-head", lora(["lm_head"])),
    one("llava", "embed", lora(["embed_tokens"])),
]

# One side of a tie adapted: the output has to be untied. ensure_weight_tying: it has to stay tied.

INPUT_SIDE = {
    "llama_tied": "embed_tokens",
    "qwen2_tied": "embed_tokens",
    "gemma3": "embed_tokens",
    "gpt2": "wte",
    "opt": "embed_tokens",
    "bloom": "word_embeddings",
}

TIED = [
    *(one(name, "tied-embed", lora([side])) for name, side in INPUT_SIDE.items()),
    *(one(name, "tied-lm-head", lora(["lm_head"])) for name in INPUT_SIDE),
    *(one(name, "tied-both", lora([side, "lm_head"])) for name, side in INPUT_SIDE.items()),
    *(
        one(name, "tied-embed-dora", lora([side], use_dora=True))
        for name, side in INPUT_SIDE.items()
    ),
    *(
        one(
            name,
            "tied-embed-whole",
            lora(["fc1", "q_proj", "c_attn", "query_key_value"], modules_to_save=[side]),
        )
        for name, side in INPUT_SIDE.items()
    ),
    *(
        one(name, "tied-ensured", lora([side], ensure_weight_tying=True))
        for name, side in INPUT_SIDE.items()
    ),
    one("llama_tied", "tied-lm-head-dora", lora(["lm_head"], use_dora=True)),
    one("llama_tied", "tied-embed-sharded", lora(["embed_tokens"]), sharded=True),
    one("llama_tied", "tied-lm-head-whole", lora(["q_proj"], modules_to_save=["lm_head"])),
    one(
        "llama_tied",
        "tied-both-whole",
        lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    one(
        "llama_tied",
        "tied-ensured-whole",
        lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    one(
        "llama_tied",
        "tied-ensured-both",
        lora(["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True),
    ),
]

WHOLE_MODULES = [
    one("llama", "embed-and-head-whole", lora(modules_to_save=["embed_tokens", "lm_head"])),
    one("llama", "norm-whole", lora(["q_proj"], modules_to_save=["norm", "input_layernorm"])),
    one("llama", "linear-whole", lora(["q_proj"], modules_to_save=["layers.1.mlp.up_proj"])),
    one("llama", "mlp-whole", lora(["q_proj"], modules_to_save=["layers.1.mlp"])),
    one("gpt2", "ln-f-whole", lora(["c_attn"], modules_to_save=["ln_f"])),
    one("bert_seqcls", "classifier", lora(["query"], modules_to_save=["classifier", "pooler"])),
    one("vit_conv", "classifier", lora(["q_proj"], modules_to_save=["classifier"])),
    one("llava", "projector-whole", lora(["q_proj"], modules_to_save=["multi_modal_projector"])),
    one("toynet", "attention-whole", lora(["head"], modules_to_save=["attention", "norm"])),
    one("mixtral", "router-whole", lora(["q_proj"], modules_to_save=["gate"])),
    one("mixtral", "experts-whole", lora(["q_proj"], modules_to_save=["layers.1.mlp.experts"])),
    one("t5", "norm-whole", lora(["q"], modules_to_save=["final_layer_norm"])),
]

TOKEN_ROWS = [
    tokens("llama", "list", lora(["q_proj"], trainable_token_indices=TOKENS)),
    tokens("llama", "dict", lora(["q_proj"], trainable_token_indices={"embed_tokens": TOKENS})),
    tokens("llama", "unsorted", lora(trainable_token_indices=TOKENS[::-1])),
    tokens(
        "llama",
        "both-sides",
        lora(["q_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS[:2]}),
    ),
    tokens("llama_tied", "list", lora(["q_proj"], trainable_token_indices=TOKENS)),
    tokens(
        "llama_tied",
        "same-on-both-sides",
        lora(["q_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS}),
    ),
    tokens(
        "llama_tied",
        "different-sides",
        lora(["q_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [6, 17]}),
    ),
    tokens(
        "llama_tied",
        "ensured",
        lora(["q_proj"], trainable_token_indices=TOKENS, ensure_weight_tying=True),
    ),
    tokens("gemma3", "list", lora(["q_proj"], trainable_token_indices=TOKENS)),
    tokens("gpt2", "dict", lora(["c_attn"], trainable_token_indices={"wte": TOKENS})),
    tokens("opt", "list", lora(["q_proj"], trainable_token_indices=TOKENS)),
    tokens("toynet", "dict", lora(["head"], trainable_token_indices={"embed": [4, 17]})),
]

GROWN_VOCABULARIES = [
    grown("llama", "whole", lora(modules_to_save=["embed_tokens", "lm_head"])),
    grown("llama_tied", "whole", lora(modules_to_save=["embed_tokens", "lm_head"])),
    grown("llama_tied", "embed-whole", lora(modules_to_save=["embed_tokens"])),
    grown(
        "llama_tied",
        "ensured-whole",
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    grown("gemma3", "whole", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    grown("llama", "tokens", lora(trainable_token_indices=[61, 62, 63, 64, 65, 66])),
    grown("llama_tied", "tokens", lora(trainable_token_indices=[61, 62, 63, 64, 65, 66])),
    grown("llama", "embed-and-lm-head", lora(["embed_tokens", "lm_head", "q_proj"])),
    grown("llama", "linear-only", lora()),
    grown("llama_tied", "linear-only", lora()),
    grown("gpt2", "linear-only", lora()),
]
