"""Models that accelerate has spread over devices, parts of them on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import regraft
from faithful.cases import lora
from faithful.harness import Workshop
from regraft.testing import zoo
from runtime.live import no_trace

PLACES = {
    "all-in-memory": {"": "cpu"},
    "half-on-disk": {
        "model.layers.0": "cpu", "model.layers.1": "disk", "model.embed_tokens": "cpu",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    },
    "all-on-disk": {"model": "disk", "lm_head": "disk"},
}  # fmt: skip

ADAPTERS = {
    "lora": lora(),
    "dora": lora(r=7, use_dora=True),
    "replaced-head": lora(["q_proj", "down_proj"], modules_to_save=["lm_head"]),
}


def load(base: Path, places: dict[str, str], folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map=places, offload_folder=folder
    ).eval()


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_answers_are_those_of_a_model_in_memory(
    adapter: str, places: str, workshop: Workshop, tmp_path: Path
) -> None:
    base, inputs = workshop.base("llama"), zoo.example_inputs("llama")
    path = workshop.adapter(base, ADAPTERS[adapter])
    plain = zoo.load_base(base)
    regraft.attach(plain, path)
    model = load(base, PLACES[places], tmp_path)
    before = zoo.logits(model, inputs)
    with no_trace(model):
        adapters = regraft.attach(model, path)
        assert np.array_equal(zoo.logits(model, inputs), zoo.logits(plain, inputs))
        adapters.detach()
    assert np.array_equal(zoo.logits(model, inputs), before)


def test_weights_on_the_disk_are_not_merged_and_all_stays(
    workshop: Workshop, tmp_path: Path
) -> None:
    base, inputs = workshop.base("llama"), zoo.example_inputs("llama")
    model = load(base, PLACES["half-on-disk"], tmp_path)
    adapters = regraft.attach(model, workshop.adapter(base, lora()))
    before = zoo.logits(model, inputs)
    with pytest.raises(regraft.UnsupportedError, match=r"layers\.1\..*offloaded"):
        adapters.merge_adapter()
    assert np.array_equal(zoo.logits(model, inputs), before)
