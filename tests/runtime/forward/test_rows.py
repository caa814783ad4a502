"""A batch whose rows have different adapters answers, row by row, as each adapter does alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import regraft
from faithful.cases import ATTENTION, MIXTRAL_EXPERTS, TOY_CONVS, lora
from faithful.embedding_cases import TOKENS
from faithful.harness import Workshop
from regraft import Adapters, attach
from regraft.testing import zoo
from runtime.live import distance

TOLERANCE = 1e-5

Config = Mapping[str, Any]

KINDS: dict[str, tuple[str, Config, Config]] = {
    "linear": ("llama", lora(), lora(["q_proj", "up_proj"], r=7)),
    "linear-lora-and-dora": ("llama", lora(use_dora=True), lora(["q_proj", "up_proj"], r=3)),
    "fused": ("phi3", lora(), lora(["qkv_proj"], r=2, use_rslora=True)),
    "conv1d-of-gpt2": ("gpt2", lora(), lora(["c_attn"], r=3)),
    "conv1d-of-gpt2-dora": ("gpt2", lora(["c_fc"], use_dora=True), lora(["c_attn"], r=3)),
    "convolutions": ("toynet", lora(TOY_CONVS), lora(["conv2d", "head"], r=2)),
    "convolutions-dora": ("toynet", lora(TOY_CONVS, use_dora=True), lora(["conv3d"], r=2)),
    "patches": ("vit_conv", lora(["projection", "q_proj"]), lora(["projection"], r=2)),
    "attention": ("toynet", lora(["attention"]), lora(["attention", "head"], r=2)),
    "embedding": ("toynet", lora(["embed"]), lora(["embed"], r=2)),
    "embedding-dora": ("llama", lora(["embed_tokens"], use_dora=True), lora(["embed_tokens"])),
    "head": ("llama", lora(["lm_head"]), lora(["lm_head", "embed_tokens"], r=2)),
    "tied-embedding": ("llama_tied", lora(["embed_tokens"]), lora(["lm_head"], r=2)),
    "positions": ("gpt2", lora(["wpe"]), lora(["wte", "wpe"], r=2)),
    "token-rows": (
        "llama",
        lora(["q_proj"], trainable_token_indices=TOKENS),
        lora(["v_proj"], trainable_token_indices=TOKENS[1:3]),
    ),
    "token-rows-of-a-tie": (
        "llama_tied",
        lora(["q_proj"], trainable_token_indices=TOKENS),
        lora(["v_proj"], trainable_token_indices=TOKENS[1:3]),
    ),
    "norms": ("llama", lora(["q_proj"], modules_to_save=["norm"]), lora(["v_proj"], r=2)),
    "whole-mlp": ("llama", lora(["q_proj"], modules_to_save=["layers.1.mlp"]), lora(r=2)),
    "whole-embedding": (
        "llama",
        lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        lora(["embed_tokens"]),
    ),
    "biases": ("bert_seqcls", lora(["query"], bias="all"), lora(["dense"], bias="lora_only")),
    "lora-bias": ("opt", lora(lora_bias=True), lora(["q_proj"], lora_bias=True)),
    "experts": (
        "mixtral",
        lora([], target_parameters=MIXTRAL_EXPERTS),
        lora(["q_proj"], r=2, target_parameters=MIXTRAL_EXPERTS[:1]),
    ),
    "experts-qwen": (
        "qwen3_moe",
        lora(ATTENTION, target_parameters=MIXTRAL_EXPERTS),
        lora([], target_parameters=MIXTRAL_EXPERTS[1:]),
    ),
    "experts-gpt-oss": (
        "gpt_oss",
        lora([], target_parameters=MIXTRAL_EXPERTS),
        lora([], target_parameters=["experts.gate_up_proj_bias"]),
    ),
    "router": ("mixtral", lora([], lora_alpha=40, target_parameters=["gate.weight"]), lora()),
    "router-whole": ("mixtral", lora(["q_proj"], modules_to_save=["gate"]), lora()),
    "encoder-and-decoder": ("t5", lora(), lora(["q", "wo"], r=2)),
    "image-and-text": ("llava", lora(), lora(["linear_1", "q_proj"], r=2)),
    "multi-query": ("bloom", lora(), lora(["query_key_value"], r=2)),
    "pissa": ("llama", lora(init_lora_weights="pissa"), lora(["v_proj"])),
}


def attached(name: str, workshop: Workshop) -> tuple[Any, Adapters, dict[str, Any]]:
    """Return a kind's model with two adapters, and inputs of four rows."""
    architecture, *configs = KINDS[name]
    base = workshop.base(architecture)
    model = zoo.load_base(base)
    adapters = attach(model)
    for number, config in enumerate(configs):
        adapters.load_adapter(workshop.adapter(base, config, seed=number + 1), "ab"[number])
    inputs = zoo.example_inputs(architecture)
    if "token" in name:
        inputs["input_ids"][:, 3:7] = torch.tensor(TOKENS)
    return model, adapters, {key: torch.cat((v, v.flip(0))) for key, v in inputs.items()}


def alone(model: Any, adapters: Adapters, inputs: dict[str, Any], choice: Any) -> np.ndarray:
    """Return the logits of all rows with one choice of adapters."""
    with adapters.using(choice):
        return zoo.logits(model, inputs)


ALONE: list[Any] = ["a", "b", None, "a"]
MIXED: list[Any] = [{"a": 0.5, "b": -1.5}, "b", "b", ["a", "b"]]


UNMIXED = (
    "token-rows", "token-rows-of-a-tie", "norms", "whole-mlp", "whole-embedding", "biases",
    "router-whole", "pissa",
)  # fmt: skip
"""Kinds with tensors that take the place of others: such an adapter goes by itself."""


@pytest.mark.parametrize("name", KINDS)
def test_each_row_answers_as_its_adapter_alone(name: str, workshop: Workshop) -> None:
    model, adapters, inputs = attached(name, workshop)
    for rows in [ALONE] if name in UNMIXED else [ALONE, MIXED]:
        with adapters.rows(rows):
            found = zoo.logits(model, inputs)
        answers = {str(row): alone(model, adapters, inputs, row) for row in rows}
        for place, row in enumerate(rows):
            expected = answers[str(row)]
            assert distance(found[place], expected[place]) <= TOLERANCE, (row, place)
        assert all(
            np.abs(answers[str(one)] - answers[str(other)]).max() > 1e-3 * np.ptp(answers[str(one)])
            for one in rows for other in rows if str(one) != str(other)
        )  # fmt: skip


def test_rows_of_nobody_are_the_bases_bits(workshop: Workshop) -> None:
    model, adapters, inputs = attached("linear", workshop)
    expected = alone(model, adapters, inputs, None)
    with adapters.rows([None] * 4):
        assert np.array_equal(zoo.logits(model, inputs), expected)


@pytest.mark.parametrize("rows", [["a"], ["a", "b"], ["a"] * 8, ["a", "b", None]])
def test_a_batch_of_another_length_is_refused(rows: list[Any], workshop: Workshop) -> None:
    model, adapters, inputs = attached("linear", workshop)
    with (
        adapters.rows(rows),
        pytest.raises(regraft.UsageError, match=f"batch of 4|{len(rows)} rows"),
    ):
        model(**inputs)


def test_an_unknown_name_is_refused_before_the_block(workshop: Workshop) -> None:
    _model, adapters, _inputs = attached("linear", workshop)
    with pytest.raises(regraft.UsageError, match="'c'"), adapters.rows(["a", "c"]):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_return_sequences": 3}], ids=str)
def test_generate_goes_on_row_by_row(settings: dict[str, int], workshop: Workshop) -> None:
    model, adapters, inputs = attached("linear", workshop)
    copies = max(settings.values(), default=1)
    do_sample = "num_return_sequences" in settings
    arguments = {"max_new_tokens": 6, "do_sample": do_sample, "top_k": 1, **settings}
    arguments["eos_token_id"] = None
    rows = ["a", "b", None, "b"]
    with adapters.rows(rows, repeats=copies):
        found = model.generate(**inputs, **arguments)
    returned = settings.get("num_return_sequences", 1)
    for place, row in enumerate(rows):
        with adapters.using(row):
            expected = model.generate(**inputs, **arguments)
        mine = slice(place * returned, (place + 1) * returned)
        assert torch.equal(found[mine], expected[mine])


@pytest.mark.parametrize("name", ["linear", "conv1d-of-gpt2-dora", "convolutions", "embedding"])
def test_gradients_of_mixed_rows_are_those_of_each_alone(name: str, workshop: Workshop) -> None:
    architecture, *configs = KINDS[name]
    base = workshop.base(architecture)
    model = zoo.load_base(base)
    adapters = attach(model)
    for number, config in enumerate(configs):
        folder = workshop.adapter(base, config, seed=number + 1)
        adapters.load_adapter(folder, "ab"[number], is_trainable=True)
    inputs = {k: torch.cat((v, v)) for k, v in zoo.example_inputs(architecture).items()}
    rows = ["a", "b", "b", None]

    def gradients(mixed: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for parameter in adapters.parameters():
            parameter.grad = None
        for place, row in [(None, rows)] if mixed else list(enumerate(rows)):
            scope = adapters.rows(row) if place is None else adapters.using(row)
            with scope:
                output = model(**inputs)
            logits = output if isinstance(output, torch.Tensor) else output.logits
            chosen = logits if place is None else logits[place : place + 1]
            if chosen.requires_grad:
                chosen.square().sum().backward()
        return {key: p.grad.clone() for key, p in adapters.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert {key.split(".")[0] for key in expected} == {"a", "b"}
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max())
        )
