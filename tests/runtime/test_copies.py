"""Copies of a model with adapters: in memory, and pickled."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from faithful.cases import MIXTRAL_EXPERTS, TOY_CONVS, lora
from faithful.harness import Workshop
from regraft import Adapters, attach
from regraft.testing import zoo
from runtime.live import assert_same_state, distance, state_of, tree_of

KINDS = {
    "linear": ("llama", lora()),
    "layers-of-all-kinds": ("toynet", lora([*TOY_CONVS, "embed", "attention", "head"])),
    "experts": ("mixtral", lora(["q_proj"], target_parameters=MIXTRAL_EXPERTS)),
    "whole": ("llama_tied", lora(["q_proj"], modules_to_save=["norm", "lm_head"])),
}


def attached(kind: str, workshop: Workshop) -> tuple[Any, Adapters, dict[str, Any]]:
    """Return a model with an adapter, and inputs."""
    architecture, config = KINDS[kind]
    base = workshop.base(architecture)
    model = zoo.load_base(base)
    adapters = attach(model, workshop.adapter(base, config), "a")
    return model, adapters, zoo.example_inputs(architecture)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_answers_as_the_original(kind: str, workshop: Workshop) -> None:
    model, adapters, inputs = attached(kind, workshop)
    expected = zoo.logits(model, inputs)
    twin = copy.deepcopy(model)
    assert np.array_equal(zoo.logits(twin, inputs), expected)
    with adapters.disable_adapter():
        plain = zoo.logits(model, inputs)
        assert np.array_equal(zoo.logits(twin, inputs), plain)
    adapters.detach()
    assert np.array_equal(zoo.logits(model, inputs), plain)
    assert np.array_equal(zoo.logits(twin, inputs), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_has_weights_of_its_own(kind: str, workshop: Workshop) -> None:
    model, _adapters, inputs = attached(kind, workshop)
    expected = zoo.logits(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert distance(zoo.logits(twin, inputs), expected) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_model_is_the_plain_one(kind: str, workshop: Workshop) -> None:
    model, adapters, inputs = attached(kind, workshop)
    state, tree = state_of(model), tree_of(model)
    with adapters.disable_adapter():
        plain = zoo.logits(model, inputs)
    adapted = zoo.logits(model, inputs)
    made = pickle.loads(pickle.dumps(model))
    assert tree_of(made) == tree
    assert_same_state(made, state)
    assert np.array_equal(zoo.logits(made, inputs), plain)
    assert np.array_equal(zoo.logits(model, inputs), adapted)


def test_torch_saves_and_loads_an_attached_model(workshop: Workshop) -> None:
    model, adapters, inputs = attached("linear", workshop)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    made = torch.load(file, weights_only=False)
    with adapters.disable_adapter():
        assert np.array_equal(zoo.logits(made, inputs), zoo.logits(model, inputs))


def test_a_pickled_model_can_be_attached_to(workshop: Workshop) -> None:
    model, _adapters, inputs = attached("experts", workshop)
    made = pickle.loads(pickle.dumps(model))
    architecture, config = KINDS["experts"]
    attach(made, workshop.adapter(workshop.base(architecture), config))
    assert np.array_equal(zoo.logits(made, inputs), zoo.logits(model, inputs))
