"""Gradient checkpointing runs parts of the forward pass again: with the adapters that it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from faithful.cases import MIXTRAL_EXPERTS, lora
from faithful.harness import Workshop
from regraft import Adapters, attach
from regraft.runtime.forward import scopes
from regraft.runtime.forward.hooks import GradientHook
from regraft.testing import zoo

KINDS: dict[str, tuple[str, Any, Any]] = {
    "linear": ("llama", lora(), lora(["q_proj", "up_proj"], r=3)),
    "dora": ("llama", lora(use_dora=True), lora(["q_proj"], r=3)),
    "conv1d-of-gpt2": ("gpt2", lora(), lora(["c_attn"], r=2)),
    "experts": (
        "mixtral",
        lora(["q_proj"], target_parameters=MIXTRAL_EXPERTS),
        lora([], target_parameters=MIXTRAL_EXPERTS[:1]),
    ),
    "whole-mlp": ("llama", lora(["q_proj"], modules_to_save=["layers.1.mlp"]), lora(["v_proj"])),
}

Gradients = dict[str, torch.Tensor]


def attached(kind: str, workshop: Workshop) -> tuple[Any, Adapters, dict[str, Any]]:
    """Return a model with two adapters in training, and inputs."""
    architecture, *configs = KINDS[kind]
    base = workshop.base(architecture)
    model = zoo.load_base(base)
    adapters = attach(model)
    for name, config in zip("ab", configs, strict=True):
        adapters.load_adapter(workshop.adapter(base, config), name, is_trainable=True)
    model.train()
    return model, adapters, zoo.example_inputs(architecture)


def gradients(adapters: Adapters, backward: Callable[[], None]) -> Gradients:
    """Return the gradients that a backward pass leaves, by the adapters' keys."""
    for parameter in adapters.parameters():
        parameter.grad = None
    torch.manual_seed(1)  # of the model's own dropout
    backward()
    return {k: p.grad.clone() for k, p in adapters.named_parameters() if p.grad is not None}


def checkpointed(model: Any, use_reentrant: bool) -> None:
    """Turn checkpointing on, as a trainer does."""
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def assert_same(found: Gradients, expected: Gradients) -> None:
    """Fail unless gradients are the same to rounding, and some."""
    assert found.keys() == expected.keys()
    assert found
    for key, value in expected.items():
        limit = 1e-5 * max(float(value.abs().max()), 1e-6)
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=limit, msg=key)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scope_that_ended_is_remembered(
    kind: str, use_reentrant: bool, workshop: Workshop
) -> None:
    model, adapters, inputs = attached(kind, workshop)
    adapters.set_adapter("b")

    def step() -> None:
        with adapters.using("a"):
            loss = model(**inputs).logits.square().mean()
        loss.backward()

    expected = gradients(adapters, step)
    assert {key.split(".")[0] for key in expected} == {"a"}
    checkpointed(model, use_reentrant)
    assert_same(gradients(adapters, step), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_forward_passes_before_one_backward_pass(
    use_reentrant: bool, workshop: Workshop
) -> None:
    model, adapters, inputs = attached("linear", workshop)

    def one_by_one() -> None:
        for name in "ab":
            with adapters.using(name):
                loss = model(**inputs).logits.square().mean()
            loss.backward()

    def crossed() -> None:
        losses = []
        for name in "ab":
            with adapters.using(name):
                losses.append(model(**inputs).logits.square().mean())
        adapters.set_adapter(None)
        for loss in reversed(losses):
            loss.backward()

    expected = gradients(adapters, one_by_one)
    assert {key.split(".")[0] for key in expected} == {"a", "b"}
    checkpointed(model, use_reentrant)
    assert_same(gradients(adapters, crossed), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_one_backward_pass_for_two_adapters(use_reentrant: bool, workshop: Workshop) -> None:
    """A loss of two forward passes, as preference training has it: each part has its own scope."""
    model, adapters, inputs = attached("linear", workshop)

    def step() -> None:
        losses = []
        for name in "ab":
            with adapters.using(name):
                losses.append(model(**inputs).logits.square().mean())
        (losses[0] + 2 * losses[1]).backward()

    expected = gradients(adapters, step)
    assert {key.split(".")[0] for key in expected} == {"a", "b"}
    checkpointed(model, use_reentrant)
    assert_same(gradients(adapters, step), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rows_are_remembered(use_reentrant: bool, workshop: Workshop) -> None:
    model, adapters, inputs = attached("linear", workshop)

    def step() -> None:
        with adapters.rows(["a", "b"]):
            loss = model(**inputs).logits.square().mean()
        loss.backward()

    expected = gradients(adapters, step)
    assert {key.split(".")[0] for key in expected} == {"a", "b"}
    checkpointed(model, use_reentrant)
    assert_same(gradients(adapters, step), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_switch_before_the_backward_pass_changes_nothing(
    use_reentrant: bool, workshop: Workshop
) -> None:
    model, adapters, inputs = attached("linear", workshop)

    def step() -> None:
        adapters.set_adapter("a")
        loss = model(**inputs).logits.square().mean()
        adapters.set_adapter("b")
        loss.backward()

    expected = gradients(adapters, step)
    checkpointed(model, use_reentrant)
    assert_same(gradients(adapters, step), expected)


def test_nothing_is_left_of_backward_passes(workshop: Workshop) -> None:
    scopes._of_backward.clear()  # of tests that failed
    model, adapters, inputs = attached("linear", workshop)
    checkpointed(model, use_reentrant=False)
    for _ in range(3):
        with adapters.using("a"):
            loss = model(**inputs).logits.square().mean()
        loss.backward()
    assert not scopes._of_backward


@pytest.mark.parametrize("checkpointing", [True, False])
def test_embeddings_ask_for_gradients_in_training_alone(checkpointing: bool) -> None:
    model = torch.nn.ModuleList([torch.nn.Embedding(5, 3)]).requires_grad_(False)
    model.is_gradient_checkpointing = checkpointing
    table, ids = model[0], torch.arange(4)
    table.register_forward_hook(GradientHook(model))
    assert table(ids).requires_grad == checkpointing
    with torch.no_grad():
        assert not table(ids).requires_grad
    model.eval()
    assert not table(ids).requires_grad
