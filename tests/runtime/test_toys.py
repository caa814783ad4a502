"""Adapters on models that no library knows answer as PEFT's live model does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from faithful.cases import lora
from faithful.harness import assert_visible
from regraft import attach
from regraft.testing import zoo
from regraft.testing.adapters import perturb
from runtime.live import distance, no_trace
from runtime.toys import TOYS

TOLERANCE = 1e-5

CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("mlp", lora(["lin0"])),
    "both": ("mlp", lora(["lin0", "lin1"])),
    "regex": ("mlp", lora(r"lin[01]", r=3)),
    "sequences": ("mlp-of-sequences", lora(["lin0", "lin1"])),
    "all-but-one": ("mlp", lora(r"lin.*", exclude_modules=["lin1"])),
    "rslora": ("mlp", lora(["lin0", "lin1"], use_rslora=True)),
    "dora": ("mlp", lora(["lin0", "lin1"], use_dora=True)),
    "dora-without-bias": ("mlp-without-bias", lora(["lin0", "lin1"], use_dora=True)),
    "patterns": (
        "mlp",
        lora(["lin0", "lin1"], rank_pattern={"lin0": 2}, alpha_pattern={"lin1": 11}),
    ),
    "bias-all": ("mlp", lora(["lin0"], bias="all")),
    "bias-lora-only": ("mlp", lora(["lin0"], bias="lora_only")),
    "lora-bias": ("mlp", lora(["lin0", "lin1"], lora_bias=True)),
    "whole": ("mlp", lora(["lin0"], modules_to_save=["lin1"])),
    "dropout": ("mlp", lora(["lin0"], lora_dropout=0.4)),
    "layers": (
        "deep",
        lora(["up", "down"], layers_to_transform=[0, 2], layers_pattern="layers"),
    ),
    "layers-one": ("deep", lora(["up"], layers_to_transform=1, layers_pattern="layers")),
    "exclude": ("deep", lora(["up", "down"], exclude_modules=r".*\.1\..*")),
    "norm-whole": ("deep", lora(["up"], modules_to_save=["norm", "head"])),
    "deep-dora-rslora": ("deep", lora(["up", "down", "head"], use_dora=True, use_rslora=True)),
    "embedding": ("embedded", lora(["emb"])),
    "embedding-dora": ("embedded", lora(["emb"], use_dora=True)),
    "embedding-rows": ("embedded", lora(["lin0"], trainable_token_indices={"emb": [3, 9, 20]})),
    "embedding-whole": ("embedded", lora(["lin0"], modules_to_save=["emb"])),
    "conv1d-of-gpt2": ("embedded", lora(["conv1d"])),
    "conv1d-of-gpt2-dora": ("embedded", lora(["conv1d"], use_dora=True)),
    "conv1d-of-gpt2-lora-bias": ("embedded", lora(["conv1d"], lora_bias=True)),
    "conv1d-of-gpt2-bias": ("embedded", lora(["conv1d", "lin0"], bias="all")),
    "everything": ("embedded", lora(["emb", "conv1d", "lin0"])),
    **{
        f"{toy}{name}": (toy, lora(["conv", "same"], **fields))
        for toy in ("conv1d", "conv2d", "conv3d")
        for name, fields in {
            "": {},
            "-dora": {"use_dora": True},
            "-patterns": {"rank_pattern": {"conv": 2}, "use_rslora": True},
        }.items()
    },
    "conv2d-lora-bias": ("conv2d", lora(["conv"], lora_bias=True)),
    "conv2d-bias": ("conv2d", lora(["conv"], bias="lora_only")),
    "conv2d-whole": ("conv2d", lora(["lin0"], modules_to_save=["conv"])),
    "attention": ("attention", lora(["mha"])),
    "attention-rslora": ("attention-batch-first", lora(["mha"], use_rslora=True)),
    "attention-beside-linear": ("attention-batch-first", lora(["mha", "lin0"])),
    "attention-whole": ("attention", lora(["lin0"], modules_to_save=["mha"])),
    "experts": ("mixture", lora([], target_parameters=["experts.weight"])),
    "experts-beside-linear": ("mixture", lora(["lin0"], target_parameters=["experts.weight"])),
    "parameter-of-two-axes": ("mixture", lora([], target_parameters=["experts.bias"])),
    "parameter-of-a-linear": ("mixture", lora([], target_parameters=["lin0.weight"])),
}


def trained(name: str, folder: Path) -> tuple[Any, dict[str, Any], np.ndarray]:
    """Return a case's base, its input and PEFT's answer; save the adapter into a folder."""
    toy, config = CASES[name]
    model, inputs = TOYS[toy].model(), {"x": TOYS[toy].inputs()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(copy.deepcopy(model), replace(LoraConfig(**config)))
        perturb(live, 5)
        for key, parameter in live.named_parameters():
            if "out_proj.lora_B" in key:  # PEFT adds the delta of this projection twice
                parameter.data.zero_()
        live.save_pretrained(folder)
    return model, inputs, zoo.logits(live.eval(), inputs)


@pytest.mark.parametrize("name", CASES)
def test_a_toy_answers_as_the_live_one(name: str, tmp_path: Path) -> None:
    model, inputs, expected = trained(name, tmp_path)
    plain = zoo.logits(model, inputs)
    assert_visible(expected, plain)
    with no_trace(model):
        adapters = attach(model, tmp_path, "it")
        found = zoo.logits(model, inputs)
        with adapters.disable_adapter():
            assert np.array_equal(zoo.logits(model, inputs), plain)
        with adapters.rows(["it", None, None, "it"]):
            mixed = zoo.logits(model, inputs)
        adapters.detach()
    assert np.array_equal(zoo.logits(model, inputs), plain)
    assert distance(found, expected) <= TOLERANCE
    assert distance(mixed, np.stack([expected[0], plain[1], plain[2], expected[3]])) <= TOLERANCE
