"""Quantized linear layers that have codes and no weight take adapters on their output."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import regraft
from regraft.runtime.saving.files import write_adapter

RANK, ALPHA = 2, 6


class Codes(nn.Module):
    """A linear layer as GPTQ's and AWQ's are: its weight is made of codes at each call."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.randint(-8, 8, (in_features, out_features)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, out) of (n, in)."""
        return x @ (self.qweight.to(x.dtype) / 8)


class Model(nn.Module):
    """A plain layer before one of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 6)
        self.coded = Codes(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, 5) of (n, 4)."""
        return self.coded(self.plain(x))


def test_an_adapter_adds_its_product_to_what_comes_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 4)
    a, b = torch.randn(RANK, 6), torch.randn(5, RANK)
    key = "base_model.model.coded"
    folder = write_adapter(
        tmp_path / "a",
        {"peft_type": "LORA", "target_modules": ["coded"], "r": RANK, "lora_alpha": ALPHA},
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
    )
    with torch.no_grad():
        hidden, plain = model.plain(x), model(x)
        adapters = regraft.attach(model, folder, "a")
        torch.testing.assert_close(model(x), plain + ALPHA / RANK * hidden @ a.T @ b.T)
        adapters.detach()
        assert torch.equal(model(x), plain)
