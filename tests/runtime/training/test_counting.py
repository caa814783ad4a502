"""How many parameters are trained: the figures, and the line, that PEFT gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import regraft
from faithful.cases import lora
from faithful.harness import Workshop
from regraft.testing.zoo import make_model
from runtime.toys import TOYS

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"target_modules": ["v_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                    "ensure_weight_tying": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_line_is_pefts(
    name: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(name)
    get_peft_model(copy.deepcopy(model), PeftConfig(**settings)).print_trainable_parameters()
    expected = capsys.readouterr().out
    regraft.attach(model, PeftConfig(**settings)).print_trainable_parameters()
    assert capsys.readouterr().out == expected
    assert not expected.startswith("trainable params: 0 ")


def test_adapters_that_are_loaded_count_and_are_not_trained(workshop: Workshop) -> None:
    base = workshop.base("llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    own = sum(parameter.numel() for parameter in model.parameters())
    adapters = regraft.attach(model, workshop.adapter(base, lora()), "a")
    loaded = sum(tensor.numel() for tensor in adapters.adapter("a").tensors.values())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert adapters.get_nb_trainable_parameters() == (0, own + loaded)


def test_a_model_without_adapters_is_trained_whole() -> None:
    model = TOYS["mlp"].model()
    own = sum(parameter.numel() for parameter in model.parameters())
    assert regraft.attach(model).get_nb_trainable_parameters() == (own, own)
