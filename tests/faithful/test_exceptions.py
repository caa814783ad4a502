"""Adapters whose truth is not PEFT's live model, and adapters that no merge can be faithful to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from faithful.cases import lora, one
from faithful.embedding_cases import GROWN, grow
from faithful.harness import Workshop, assert_faithful
from regraft.testing import zoo
from regraft.testing.adapters import WEIGHTS_FILE, rewrite_adapter

SCALE = 6 / 4


def stored(adapter: Path) -> dict[str, Any]:
    """Return an adapter's tensors by key, without PEFT's prefix."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / WEIGHTS_FILE)
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


def delta(tensors: Mapping[str, Any], module: str) -> Any:
    """Return s B A of a linear module."""
    return SCALE * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def attention_by_hand(base: Path, adapters: Sequence[Path], inputs: dict[str, Any]) -> np.ndarray:
    """Add each delta once.

    PEFT's ``MultiheadAttention`` adds the output projection's delta by hand and then merges it
    again, in its forward too, so that its live model answers with W + 2 s B A there. The file says
    W + s B A, and that is what is expected here.
    """
    tensors = stored(adapters[0])
    model = zoo.load_base(base)
    model.attention.in_proj_weight.data += delta(tensors, "attention")
    model.attention.out_proj.weight.data += delta(tensors, "attention.base_layer.out_proj")
    return zoo.logits(model, inputs)


def tied_by_hand(base: Path, adapters: Sequence[Path], inputs: dict[str, Any]) -> np.ndarray:
    """Add the embedding's delta to the tied weight.

    With ``ensure_weight_tying`` on ``wte`` and ``lm_head`` PEFT trains and saves one delta for the
    two, but saves ``target_modules`` without the head, and on loading knows only embeddings named
    ``embed_tokens``: it then leaves the head's tensors in the file unread, without a word.
    """
    tensors = stored(adapters[0])
    model = zoo.load_base(base)
    name = "transformer.wte.lora_embedding_"
    model.transformer.wte.weight.data += SCALE * (tensors[f"{name}B"] @ tensors[f"{name}A"]).T
    return zoo.logits(model, inputs)


BY_HAND = [
    one("toynet", "attention", lora(["attention"]), expect=attention_by_hand),
    one(
        "gpt2",
        "tied-ensured-both",
        lora(["wte", "lm_head"], ensure_weight_tying=True),
        expect=tied_by_hand,
    ),
]


@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.id)
def test_merge_is_right_where_the_live_model_is_not(case: Any, workshop: Workshop) -> None:
    assert_faithful(case, workshop)


IMPOSSIBLE = {
    # PEFT's A of a grouped convolution reads all channels: the live layer is not a grouped one.
    "grouped-convolution": ("toynet", lora(["grouped"]), "grouped"),
    # The live layer adds a bias; the architecture has no tensor to put it in.
    "lora-bias-without-a-bias": ("llama", lora(["q_proj"], lora_bias=True), "q_proj"),
    "lora-bias-on-the-head": ("gpt2", lora(["lm_head"], lora_bias=True), "lm_head"),
    # DoRA's norms would have to be taken over the residual, which nobody saves.
    "pissa-with-dora": ("llama", lora(init_lora_weights="pissa", use_dora=True), "pissa"),
    # Said to be untied, T5 no longer scales its output: no config keeps the function.
    "t5-tied-lm-head": ("t5", lora(["lm_head"]), "lm_head"),
    "t5-tied-encoder-side": ("t5", lora(["encoder.embed_tokens"]), "encoder.embed_tokens"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_merged_is_refused_by_name(name: str, workshop: Workshop) -> None:
    architecture, config, module = IMPOSSIBLE[name]
    base = workshop.base(architecture)
    out = workshop.fresh("refused")
    with pytest.raises(regraft.InputError, match=module):
        regraft.merge(base, workshop.adapter(base, config), out)
    assert not out.exists()


def test_a_vocabulary_that_grew_unsaid_is_refused_with_both_sizes(workshop: Workshop) -> None:
    base = workshop.base("llama")
    adapter = rewrite_adapter(
        workshop.adapter(base, lora(["lm_head"]), prepare=grow),
        workshop.fresh("grown"),
        lambda key, tensor: None if "base_layer" in key else (key, tensor),
    )
    out = workshop.fresh("refused")
    with pytest.raises(regraft.MismatchError, match=str(GROWN)) as caught:
        regraft.merge(base, adapter, out)
    assert str(zoo.VOCAB) in str(caught.value)
    assert not out.exists()
