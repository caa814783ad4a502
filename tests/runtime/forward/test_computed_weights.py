"""Layers that use their weight and bias in a way of their own are run on changed ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import (
    MoonshineStreamingCausalConv1d,
)

import regraft
from regraft.deltas.views import Delta
from regraft.runtime.forward.layers.computed import ComputedWeight
from regraft.runtime.forward.layers.kinds import runs_otherwise
from regraft.runtime.saving.files import write_adapter

RANK, ALPHA = 2, 6


class Sound(nn.Module):
    """A convolution that sees only what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = MoonshineStreamingCausalConv1d(3, 5, kernel_size=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 5, n) of (batch, 3, n)."""
        return self.conv(x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bias_of_an_adapter_is_added_to_that_of_a_causal_convolution_and_rounded_once(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, x = Sound().to(dtype).eval(), torch.randn(2, 3, 9, dtype=dtype)
    a, b, bias = (torch.randn(size, dtype=dtype) for size in ((RANK, 3, 4), (5, RANK, 1), (5,)))
    key, config = "base_model.model.conv", {"peft_type": "LORA", "target_modules": ["conv"]}
    folder = write_adapter(
        tmp_path / "a",
        config | {"r": RANK, "lora_alpha": ALPHA, "lora_bias": True},
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.lora_B.bias": bias},
    )
    expected = Sound().eval()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain = model(x)
        product = b[..., 0].float() @ a.reshape(RANK, -1).float()
        expected.conv.weight += ALPHA / RANK * product.reshape(5, 3, 4)
        expected.conv.bias += ALPHA / RANK * bias.float()
        adapters = regraft.attach(model, folder, "a")
        assert torch.equal(model(x), expected.to(dtype)(x))
        adapters.detach()
        assert torch.equal(model(x), plain)


PLAIN: dict[str, nn.Module] = {
    "linear": nn.Linear(2, 3),
    "conv": nn.Conv1d(2, 3, 1),
    "falcon": FalconLinear(2, 3),  # adds its bias apart
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_layer_that_is_linear_in_its_weight_is_not_run_on_changed_ones(name: str) -> None:
    assert not runs_otherwise(PLAIN[name])


def test_a_layer_whose_class_makes_more_of_its_weight_is() -> None:
    assert runs_otherwise(MoonshineStreamingCausalConv1d(2, 3, 2))


def test_a_delta_without_magnitudes_has_no_factor() -> None:
    none: Any = SimpleNamespace(deltas=())
    delta = Delta(0, "lora", (0, 4), 2, 1.0, None, None)
    weight = ComputedWeight(nn.Linear(4, 4), "weight", "layer.weight", none, none)
    with pytest.raises(ValueError, match="only DoRA"):
        weight.dora_factor(delta)
