"""Small models without a config, one for each kind of layer, as anyone might write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 3) of (batch, 10)."""
        return self.lin1(torch.tanh(self.lin0(x)))


class DeepMlp(nn.Module):
    """Blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(10, 14), "down": nn.Linear(14, 10, bias=False)})
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 4) of (batch, 10)."""
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(self.norm(x))


class Embedded(nn.Module):
    """An embedding, and GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 6)
        self.conv1d = Conv1D(8, 6)
        self.lin0 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, n, 3) of (batch, n) ids."""
        return self.lin0(torch.tanh(self.conv1d(self.emb(x))))


class Convolutions(nn.Module):
    """A convolution over one, two or three axes, then a linear layer."""

    def __init__(self, axes: int, groups: int = 1, padding_mode: str = "zeros") -> None:
        super().__init__()
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.conv = kinds[axes - 1](4, 6, 3, stride=2, padding=1, groups=groups)
        self.same = kinds[axes - 1](6, 6, 3, padding=1, padding_mode=padding_mode, bias=False)
        self.lin0 = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 3) of (batch, 4, ...)."""
        x = torch.tanh(self.same(torch.tanh(self.conv(x))))
        return self.lin0(x.flatten(2).mean(2))


class Attention(nn.Module):
    """torch's attention, called the way torch's own layers do."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.lin0 = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, n, 3) of (batch, n, 12)."""
        x = x if self.mha.batch_first else x.transpose(0, 1)
        length = x.shape[1 if self.mha.batch_first else 0]
        mask = torch.triu(torch.full((length, length), -9.0), diagonal=1)
        y, weights = self.mha(x, x, x, need_weights=True, attn_mask=mask)
        y = y if self.mha.batch_first else y.transpose(0, 1)
        return self.lin0(y) + weights.sum(-1, keepdim=True)


class Experts(nn.Module):
    """Weights of three experts in one parameter; all of them answer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 10, 12) / 3)
        self.bias = nn.Parameter(torch.randn(3, 12) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 12) of (batch, 10)."""
        return torch.tanh(torch.einsum("bi,eio->beo", x, self.weight) + self.bias).sum(1)


class Mixture(nn.Module):
    """Experts, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.lin0 = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 3) of (batch, 10)."""
        return self.lin0(self.experts(x))


@dataclass(frozen=True)
class Toy:
    """How to make a model and its input.

    Attributes:
        build: returns the model.
        shape: of the input, without the batch.
        ids: how many ids there are, where the input is ids.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ids: int = 0

    def model(self) -> nn.Module:
        """Return the model in evaluation mode; always the same values."""
        torch.manual_seed(3)
        return self.build().eval()

    def inputs(self, rows: int = 4) -> torch.Tensor:
        """Return an input of some rows."""
        generator = torch.Generator().manual_seed(4)
        if self.ids:
            return torch.randint(0, self.ids, (rows, *self.shape), generator=generator)
        return torch.randn(rows, *self.shape, generator=generator)


TOYS = {
    "mlp": Toy(Mlp, (10,)),
    "mlp-without-bias": Toy(lambda: Mlp(bias=False), (10,)),
    "mlp-of-sequences": Toy(Mlp, (5, 10)),
    "deep": Toy(DeepMlp, (10,)),
    "embedded": Toy(Embedded, (7,), ids=30),
    "conv1d": Toy(lambda: Convolutions(1), (4, 9)),
    "conv2d": Toy(lambda: Convolutions(2), (4, 8, 9)),
    "conv3d": Toy(lambda: Convolutions(3), (4, 5, 6, 7)),
    "circular": Toy(lambda: Convolutions(2, padding_mode="circular"), (4, 8, 9)),
    "grouped": Toy(lambda: Convolutions(2, groups=2), (4, 8, 9)),
    "attention": Toy(lambda: Attention(batch_first=False), (5, 12)),
    "attention-batch-first": Toy(lambda: Attention(batch_first=True), (5, 12)),
    "mixture": Toy(Mixture, (10,)),
}
"""Models by name."""
