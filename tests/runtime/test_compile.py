"""Compiled models follow their adapters: after a switch, in scopes, for rows."""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.guards
from peft import LoraConfig, get_peft_model

from faithful.cases import lora
from faithful.harness import Workshop
from regraft import Adapters, attach
from regraft.testing import zoo
from regraft.testing.adapters import perturb
from runtime.live import distance
from runtime.toys import TOYS

TOLERANCE = 1e-5

KINDS: dict[str, tuple[str, list[Any]]] = {
    "linear": ("mlp", [lora(["lin0"]), lora(["lin0", "lin1"], r=2, use_dora=True)]),
    "embedding": ("embedded", [lora(["emb", "conv1d"]), lora(["emb", "lin0"], use_dora=True)]),
    "token-rows": ("embedded", [lora(["lin0"], trainable_token_indices={"emb": [3, 9]}),
                                lora(["conv1d"], modules_to_save=["emb"])]),
    "convolution": ("conv2d", [lora(["conv", "same"]), lora(["conv"], use_dora=True)]),
    "biases": ("mlp", [lora(["lin0"], bias="all"), lora(["lin1"], lora_bias=True)]),
}  # fmt: skip
"""Traced in one graph."""

BROKEN_UP: dict[str, tuple[str, list[Any]]] = {
    "attention": ("attention", [lora(["mha"]), lora(["lin0"])]),
    "experts": ("mixture", [lora([], target_parameters=["experts.weight"]), lora(["lin0"])]),
}
"""Layers that run on other weights."""

CHOICES: list[Any] = ["a", "b", None, "a"]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # After each compilation torch empties the processor's cache to time its guards, for a log.
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def attached(kind: str, folder: Path) -> tuple[Any, Adapters, dict[str, Any]]:
    """Return a toy with two adapters, and its inputs."""
    toy, configs = (KINDS | BROKEN_UP)[kind]
    model = TOYS[toy].model()
    adapters = attach(model)
    for name, config in zip("ab", configs, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            live = get_peft_model(copy.deepcopy(TOYS[toy].model()), LoraConfig(**config))
            perturb(live, ord(name))
            live.save_pretrained(folder / name)
        adapters.load_adapter(folder / name, name)
    return model, adapters, {"x": TOYS[toy].inputs(2)}


def compiled(kind: str, model: Any) -> Any:
    """Return a model compiled, in one graph where that is promised."""
    return torch.compile(model, backend="eager", fullgraph=kind in KINDS)


def answer(model: Any, adapters: Adapters, inputs: Any, choice: Any) -> np.ndarray:
    """Return a model's answer with a choice of adapters."""
    with adapters.using(choice):
        return zoo.logits(model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS | BROKEN_UP)
def test_a_compiled_model_follows_switches_and_scopes(kind: str, tmp_path: Path) -> None:
    model, adapters, inputs = attached(kind, tmp_path)
    expected = {choice: answer(model, adapters, inputs, choice) for choice in CHOICES}
    fast = compiled(kind, model)
    for choice in CHOICES:
        adapters.set_adapter(choice)
        assert distance(zoo.logits(fast, inputs), expected[choice]) <= TOLERANCE, choice
    for choice in ("b", None, "a", "b"):
        found = answer(fast, adapters, inputs, choice)
        assert distance(found, expected[choice]) <= TOLERANCE, choice
        assert distance(zoo.logits(fast, inputs), expected["a"]) <= TOLERANCE, choice
    adapters.detach()
    assert distance(zoo.logits(fast, inputs), expected[None]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "embedding", "experts"])
def test_a_compiled_model_answers_row_by_row(kind: str, tmp_path: Path) -> None:
    model, adapters, inputs = attached(kind, tmp_path)
    expected = {choice: answer(model, adapters, inputs, choice) for choice in CHOICES}
    fast = torch.compile(model, backend="eager")
    for rows in (["a", "b"], ["b", None]):
        with adapters.rows(rows):
            zoo.logits(fast, inputs)
            found = zoo.logits(fast, inputs)
        for place, row in enumerate(rows):
            assert distance(found[place], expected[row][place]) <= TOLERANCE, (rows, place)


@pytest.mark.slow
@pytest.mark.parametrize("by_scope", [False, True])
def test_a_switch_back_compiles_nothing_anew(by_scope: bool, tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    fast = compiled("linear", model)

    def answer_with(choice: str) -> None:
        if by_scope:
            answer(fast, adapters, inputs, choice)
        else:
            adapters.set_adapter(choice)
            zoo.logits(fast, inputs)

    for choice in "ab":
        answer_with(choice)
    with torch.compiler.set_stance("fail_on_recompile"):
        for choice in "aba":
            answer_with(choice)


@pytest.mark.slow
def test_a_compiled_model_in_tasks_that_take_turns(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    expected = {choice: answer(model, adapters, inputs, choice) for choice in CHOICES}
    fast = torch.compile(model, backend="eager")

    async def work(choice: Any) -> float:
        worst = 0.0
        for _ in range(4):
            with adapters.using(choice):
                await asyncio.sleep(0)
                worst = max(worst, distance(zoo.logits(fast, inputs), expected[choice]))
        return worst

    async def together() -> list[float]:
        return await asyncio.gather(*(work(choice) for choice in CHOICES))

    assert max(asyncio.run(together())) <= TOLERANCE


@pytest.mark.slow
def test_a_model_compiled_before_it_has_adapters_follows_them(tmp_path: Path) -> None:
    other, others, inputs = attached("linear", tmp_path)
    expected = answer(other, others, inputs, "a")
    model = TOYS["mlp"].model()
    fast = compiled("linear", model)
    plain = zoo.logits(fast, inputs)
    adapters = attach(model, tmp_path / "a")
    assert distance(zoo.logits(fast, inputs), expected) <= TOLERANCE
    adapters.detach()
    assert np.array_equal(zoo.logits(fast, inputs), plain)


def test_gradients_of_a_compiled_model_are_those_of_the_plain_one(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    adapters.load_adapter(tmp_path / "a", "trained", is_trainable=True)

    def gradients(of: Any) -> list[torch.Tensor]:
        with adapters.using("trained"):
            return list(torch.autograd.grad(of(**inputs).square().mean(), adapters.parameters()))

    fast = compiled("linear", model)
    for expected, found in zip(gradients(model), gradients(fast), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_language_model_is_one_graph(workshop: Workshop) -> None:
    base = workshop.base("llama")
    model, inputs = zoo.load_base(base), zoo.example_inputs("llama")
    adapters = attach(model, workshop.adapter(base, lora()), "a")
    expected = answer(model, adapters, inputs, "a")
    fast = torch.compile(model, backend="eager", fullgraph=True)
    assert distance(zoo.logits(fast, inputs), expected) <= TOLERANCE
