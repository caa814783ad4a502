"""What a merge leaves of a tie between embeddings and head: the tensors, and the config's word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import regraft
from faithful.cases import lora
from faithful.harness import Workshop

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

UNTIED: dict[str, Mapping[str, Any]] = {
    "embed": lora(["embed_tokens"]),
    "head": lora(["lm_head"]),
    "both-apart": lora(["embed_tokens", "lm_head"]),
    "embed-whole": lora(["q_proj"], modules_to_save=["embed_tokens"]),
    "head-whole": lora(["q_proj"], modules_to_save=["lm_head"]),
    "other-rows": lora(
        ["q_proj"], trainable_token_indices={"embed_tokens": [4, 5], "lm_head": [5, 6]}
    ),
}
"""Adapters that leave the two sides different."""

TIED: dict[str, Mapping[str, Any]] = {
    "neither": lora(["q_proj"]),
    "ensured": lora(["embed_tokens"], ensure_weight_tying=True),
    "ensured-whole": lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "rows": lora(["q_proj"], trainable_token_indices=[4, 5]),
}
"""Adapters that leave them the same."""


def merged(config: Mapping[str, Any], workshop: Workshop) -> tuple[dict[str, Any], set[str]]:
    """Merge into the tied llama; return the output's config and the names of its tensors."""
    from safetensors import safe_open

    base = workshop.base("llama_tied")
    out: Path = workshop.fresh("tie")
    regraft.merge(base, workshop.adapter(base, config), out)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    return json.loads((out / "config.json").read_text()), names


@pytest.mark.parametrize("name", UNTIED)
def test_different_sides_are_both_written(name: str, workshop: Workshop) -> None:
    config, names = merged(UNTIED[name], workshop)
    assert config["tie_word_embeddings"] is False
    assert {EMBED, HEAD} <= names


@pytest.mark.parametrize("name", TIED)
def test_equal_sides_stay_one_tensor(name: str, workshop: Workshop) -> None:
    config, names = merged(TIED[name], workshop)
    assert config["tie_word_embeddings"] is True
    assert EMBED in names
    assert HEAD not in names
