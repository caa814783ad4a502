"""Where PEFT's live model is wrong or cannot be called, and what can be attached but not merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import regraft
from faithful.cases import lora
from faithful.harness import Workshop, assert_visible
from faithful.test_exceptions import IMPOSSIBLE
from regraft import attach
from regraft.testing import zoo
from regraft.testing.adapters import live_logits, perturb
from runtime.live import distance, no_trace
from runtime.toys import TOYS

SERVED = (
    *("t5-tied-lm-head", "t5-tied-encoder-side"),
    *("grouped-convolution", "lora-bias-without-a-bias", "lora-bias-on-the-head"),
)
"""What no checkpoint could say, a running model can: the two sides of a tie differ, a layer has a
bias that the architecture does not know, a grouped convolution reads all channels."""


@pytest.mark.parametrize("name", SERVED)
def test_what_cannot_be_merged_into_files_can_be_served(name: str, workshop: Workshop) -> None:
    architecture, config, _ = IMPOSSIBLE[name]
    base = workshop.base(architecture)
    adapter, inputs = workshop.adapter(base, config), zoo.example_inputs(architecture)
    expected = live_logits(base, adapter, inputs)
    model = zoo.load_base(base)
    assert_visible(expected, zoo.logits(model, inputs))
    with no_trace(model):
        adapters = attach(model, adapter)
        assert distance(zoo.logits(model, inputs), expected) <= 1e-5
        adapters.detach()


@pytest.mark.parametrize("name", ["grouped-convolution", "lora-bias-without-a-bias"])
def test_what_can_only_be_served_is_not_merged(name: str, workshop: Workshop) -> None:
    architecture, config, module = IMPOSSIBLE[name]
    base = workshop.base(architecture)
    model, inputs = zoo.load_base(base), zoo.example_inputs(architecture)
    adapters = attach(model, workshop.adapter(base, config))
    before = zoo.logits(model, inputs)
    refused = (regraft.MismatchError, regraft.UnsupportedError)
    with pytest.raises(refused, match=module):
        adapters.merge_adapter()
    assert (zoo.logits(model, inputs) == before).all()


@pytest.mark.parametrize("name", ["pissa-with-dora"])
def test_what_cannot_be_served_is_refused_by_name(name: str, workshop: Workshop) -> None:
    architecture, config, module = IMPOSSIBLE[name]
    base = workshop.base(architecture)
    model = zoo.load_base(base)
    with no_trace(model), pytest.raises(regraft.InputError, match=module):
        attach(model, workshop.adapter(base, config))
    attach(model).detach()


def test_an_adapter_that_does_not_fit_leaves_the_others(workshop: Workshop) -> None:
    base = workshop.base("llama")
    inputs = zoo.example_inputs("llama")
    model = zoo.load_base(base)
    adapters = attach(model, workshop.adapter(base, lora()), "good")
    found = zoo.logits(model, inputs)
    with no_trace(model):
        foreign = workshop.adapter(workshop.base("gpt2"), lora(["c_attn"]))
        with pytest.raises(regraft.MismatchError, match="c_attn"):
            adapters.load_adapter(foreign, "foreign")
        assert adapters.names == ("good",)
    assert (zoo.logits(model, inputs) == found).all()


def saved(model: nn.Module, folder: Path, **fields: Any) -> Any:
    """Train an adapter on a copy of a model, save it, and return PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(model, LoraConfig(**fields))
        perturb(live, 5)
        live.save_pretrained(folder)
    return live.eval()


def test_a_circular_convolution_answers_as_the_merged_one(tmp_path: Path) -> None:
    """PEFT's A pads with zeros whatever the layer does: its live and merged models differ."""
    toy = TOYS["circular"]
    inputs = {"x": toy.inputs()}
    merged = saved(toy.model(), tmp_path, **lora(["same"])).merge_and_unload()
    model = toy.model()
    attach(model, tmp_path)
    assert distance(zoo.logits(model, inputs), zoo.logits(merged, inputs)) <= 1e-5


class ByKeyword(nn.Module):
    """Calls its layers by keyword, which PEFT's layers do not understand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv1d(5, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 4, n - 2) of (batch, n, 6)."""
        return self.conv(input=torch.tanh(self.linear(input=x)).transpose(1, 2))


def test_layers_may_be_called_by_keyword(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, inputs = ByKeyword().eval(), {"x": torch.randn(2, 7, 6)}
    live = saved(ByKeyword(), tmp_path, **lora(["linear", "conv"]))
    live.base_model.model.linear.base_layer.load_state_dict(model.linear.state_dict())
    live.base_model.model.conv.base_layer.load_state_dict(model.conv.state_dict())
    merged = live.merge_and_unload()
    adapters = attach(model, tmp_path)
    expected = zoo.logits(merged, inputs)
    assert distance(zoo.logits(model, inputs), expected) <= 1e-5
    with adapters.rows(["default", None]):
        mixed = zoo.logits(model, inputs)
    assert distance(mixed[0], expected[0]) <= 1e-5
