"""Adding a fixed low-rank delta to outputs where they lie, in as few operations as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 8
"""Tokens up to which float32 is quicker on a CPU than 16 bits: a matter of calls, not of bytes."""


def quick_dtype(x: Tensor, out: Tensor) -> torch.dtype:
    """Return the dtype in which a delta is computed where no gradient is needed.

    That of the layer's output. What 16 bits lose of a delta is less than what the output loses by
    its own rounding, because deltas are small against it.
    """
    few = x.device.type == "cpu" and x.numel() <= FEW * x.shape[-1]
    return torch.float32 if few else out.dtype


class Quick:
    """A pair of factors laid out for :meth:`add`.

    Factors in float32 on a model in 16 bits get a copy in 16 bits when they first meet more than a
    few tokens: to convert them each time would take as long as the products.

    Args:
        a: (r, in).
        b: (out, r).
        scale: on their product.
        rows: the output channels the delta is for; None for all.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, rows: tuple[int, int] | None) -> None:
        self.device = a.device
        self._a, self._b, self._scale, self._rows = a.t(), b.t(), scale, rows
        self._scaled: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add scale * x Aᵀ Bᵀ to an output.

        Args:
            x: (..., in).
            out: (..., out); changed.
        """
        x = x.reshape(-1, x.shape[-1])
        flat = out.view(-1, out.shape[-1]) if out.is_contiguous() else None
        if quick_dtype(x, out) == torch.float32 and out.dtype != torch.float32:
            delta = torch.mm(torch.mm(x.float(), self._a.float()), self._b.float())
            self._part(out if flat is None else flat).add_(
                delta if flat is not None else delta.view(*out.shape[:-1], -1), alpha=self._scale
            )
            return
        a, b = self._in(out.dtype)
        h = torch.mm(x.to(out.dtype), a)
        if flat is not None:
            self._part(flat).addmm_(h, b)
        else:
            self._part(out).add_(torch.mm(h, b).view(*out.shape[:-1], -1))

    def _part(self, out: Tensor) -> Tensor:
        return out if self._rows is None else out[..., self._rows[0] : self._rows[1]]

    def _in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factors in a dtype, the scale in A: rounded once with it."""
        found = self._scaled.get(dtype)
        if found is None:
            b = self._b if self._b.dtype == dtype else self._b.to(dtype)
            found = self._scaled[dtype] = ((self._a.float() * self._scale).to(dtype), b)
        return found
