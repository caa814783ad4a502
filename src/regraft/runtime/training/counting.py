"""How many parameters there are, and how many of them are trained: PEFT's figures."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from regraft.runtime.model.quantized_parameters import plain_form


def counts(model: nn.Module, adapters: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Return how many numbers are trained, and how many model and adapters have together.

    A quantized weight counts with the numbers that its codes stand for; what is shared counts once.

    Args:
        model: the base.
        adapters: all tensors of the adapters.
    """
    both = {id(tensor): tensor for tensor in (*model.parameters(), *adapters)}
    sizes = [(_count(tensor), tensor.requires_grad) for tensor in both.values()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _count(tensor: torch.Tensor) -> int:
    form = plain_form(tensor)
    return tensor.numel() if form is None else math.prod(form[0])


def sentence(trained: int, everything: int) -> str:
    """Return PEFT's line on the two counts."""
    share = 100 * trained / everything if everything else 0.0
    return (
        f"trainable params: {trained:,d} || all params: {everything:,d} || trainable%: {share:.4f}"
    )
