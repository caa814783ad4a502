"""The values that a new adapter begins with, drawn as PEFT draws them.

The same seed gives the adapter that PEFT's ``get_peft_model`` makes, so that runs agree from their
first step. PEFT makes two new layers of torch for each that it adapts, and torch draws their
weights; then it draws A anew, and sets B to zero. All of that is drawn here too, in that order:
what is drawn and not used still decides what the next layer gets.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

Drawn = tuple[Tensor, Tensor, Tensor | None]
"""A, B, and B's bias where it has one."""


class FirstValues:
    """Draws the first values of one adapter, layer after layer.

    Attributes:
        start: ``init_lora_weights``.
        generator: of the random values; torch's own if None.
    """

    def __init__(self, start: str | bool, generator: torch.Generator | None) -> None:
        self.start, self.generator = start, generator

    def pair(self, a: tuple[int, ...], b: tuple[int, ...], *, has_bias: bool, rank: int) -> Drawn:
        """Return the factors of a linear layer, a convolution or a stack of experts.

        Args:
            a: the shape of A, (r, in, ...).
            b: the shape of B, (out, r, ...).
            has_bias: whether B has a bias.
            rank: of one expert.
        """
        first, second, bias = self.new_layers(a, b, has_bias=has_bias)
        if self.start == "orthogonal":
            first, second = self._orthogonal(rank, a[1], b[0])
        elif self.start in (True, "gaussian"):
            self.begin(first, rank)
            second.zero_()
            if bias is not None:
                bias.zero_()
        return first, second, bias

    def new_layers(self, a: tuple[int, ...], b: tuple[int, ...], *, has_bias: bool) -> Drawn:
        """Return what two new layers of torch begin with: A's without a bias, then B's."""
        first, second = self.new_layer(a), self.new_layer(b)
        if not has_bias:
            return first, second, None
        bias, bound = torch.empty(b[0]), 1 / math.sqrt(math.prod(b[1:]))
        return first, second, nn.init.uniform_(bias, -bound, bound, generator=self.generator)

    def new_layer(self, shape: tuple[int, ...]) -> Tensor:
        """Return what torch draws for the weight of a new linear layer or convolution."""
        weight = torch.empty(shape)
        self._uniform(weight)
        return weight

    def begin(self, a: Tensor, rank: int) -> None:
        """Fill A as an adapter begins that changes nothing yet."""
        if self.start == "gaussian":
            nn.init.normal_(a, std=1 / rank, generator=self.generator)
        else:
            self._uniform(a)

    def embedding(self, rank: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Return A (r, rows) and B (width, r) of an embedding."""
        a = torch.randn(rank, rows, generator=self.generator)
        b = torch.randn(width, rank, generator=self.generator)
        if self.start is not False:
            a.zero_()
            nn.init.normal_(b, generator=self.generator)
        return a, b

    def device_beside(self, tensor: Tensor) -> torch.device:
        """Return where to draw what PEFT draws on a tensor's device."""
        return tensor.device if self.generator is None else self.generator.device

    def _uniform(self, tensor: Tensor) -> None:
        """Fill a weight as torch fills that of a new linear layer or convolution."""
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=self.generator)

    def _orthogonal(self, rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """Return A and B from the odd and the even rows of one orthogonal matrix: B A is zero."""
        q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=self.generator))
        a = torch.randn(inputs, rank // 2, generator=self.generator).mm(q[0::2]).T / 10.0
        b = torch.randn(rank // 2, outputs, generator=self.generator).T.mm(q[1::2]) / 10.0
        return a.contiguous(), b.contiguous()


def dtype_of_factors(module: Any, leaf: str = "weight") -> torch.dtype | None:
    """Return the dtype to which PEFT rounds an adapter's first values, before they are float32.

    It is that of the layer's weight, or the one that bitsandbytes' 4-bit layer computes in; codes
    have none.
    """
    module = getattr(module, "out_proj", module) if _is_attention(module) else module
    weight = next((w for name in (leaf, "qweight") if (w := getattr(module, name, None)) is not None
                   ), None)  # fmt: skip
    dtype = getattr(module, "compute_dtype", getattr(weight, "dtype", None))
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)
