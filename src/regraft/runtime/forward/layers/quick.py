"""Adding a fixed low-rank delta to outputs where they lie, in as few operations as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 8
"""Tokens up to which float32 is quicker on a CPU than 16 bits: a matter of calls, not of bytes."""

_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""What tells whether oneDNN multiplies matrices of a dtype on this processor."""


def _without_products() -> tuple[torch.dtype, ...]:
    operations = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    asked = {dtype: getattr(operations, name, None) for dtype, name in _ASKED.items()}
    return tuple(dtype for dtype, ask in asked.items() if ask is None or not ask())


WITHOUT_PRODUCTS = _without_products()
"""Dtypes whose matrices this CPU multiplies in plain loops, thirty times as slow as in float32.

Of a matrix and a vector the products are quick all the same. A tuple, for torch.compile to trace.
"""


def quick_dtype(x: Tensor, out: Tensor) -> torch.dtype:
    """Return the dtype in which a delta is computed where no gradient is needed.

    That of the layer's output, or float32 where a CPU is quicker with that. What 16 bits lose of a
    delta is less than what the output loses by its own rounding, because deltas are small against
    it.
    """
    if x.device.type != "cpu":
        return out.dtype
    wide = out.dtype in WITHOUT_PRODUCTS or x.numel() <= FEW * x.shape[-1]
    return torch.float32 if wide else out.dtype


class Quick:
    """A pair of factors laid out for :meth:`add`.

    Factors that are kept get a copy in the dtype of the output, where products are computed in it
    and the factors have another: to convert them each time would take as long as the products.

    Args:
        a: (r, in).
        b: (out, r).
        scale: on their product.
        rows: the output channels the delta is for; None for all.
        is_kept: whether the pair serves more calls than one.
    """

    def __init__(
        self, a: Tensor, b: Tensor, scale: float, rows: tuple[int, int] | None, *,
        is_kept: bool = True,
    ) -> None:  # fmt: skip
        self.device = a.device
        self._a, self._b, self._scale, self._rows = a, b, scale, rows
        by_vector = is_kept and rows is None and a.device.type == "cpu"
        self._one_token = b.shape[0] if by_vector else -1
        self._ready: dict[torch.dtype, tuple[Tensor, Tensor, float]] = {}

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add scale * x Aᵀ Bᵀ to an output.

        Each layer of a model streams its weights through the processor's caches, so that all else
        is read from memory again: with one token, the fewest calls are the fewest seconds.

        Args:
            x: (..., in).
            out: (..., out); changed.
        """
        dtype = out.dtype
        if out.numel() == self._one_token and (dtype in WITHOUT_PRODUCTS or dtype == torch.float32):
            a, b, scale = self._ready.get(dtype) or self._in(dtype)
            h = torch.mv(a, x.view(-1) if x.dtype == dtype else x.view(-1).to(dtype))
            h = h if h.dtype == dtype else h.to(dtype)  # autocast has made it another one
            out.view(-1).addmv_(b, h, alpha=scale)
            return
        flat = out.view(-1, out.shape[-1]) if out.is_contiguous() else None
        x = x.reshape(-1, x.shape[-1])
        if dtype != torch.float32 and quick_dtype(x, out) == torch.float32:
            self._add_wide(x, out, flat)
        else:
            self._add(x, out, flat)

    def _add_wide(self, x: Tensor, out: Tensor, flat: Tensor | None) -> None:
        """Add to an output in 16 bits what is computed in float32."""
        delta = torch.mm(torch.mm(x.float(), self._a.t().float()), self._b.t().float())
        self._part(out if flat is None else flat).add_(
            delta if flat is not None else delta.view(*out.shape[:-1], -1), alpha=self._scale
        )

    def _add(self, x: Tensor, out: Tensor, flat: Tensor | None) -> None:
        a, b, scale = self._in(out.dtype)
        h = torch.mm(x.to(out.dtype), a.t())
        if flat is not None:
            self._part(flat).addmm_(h, b.t(), alpha=scale)
        else:
            delta = torch.mm(h, b.t()).view(*out.shape[:-1], -1)
            self._part(out).add_(delta, alpha=scale)

    def _part(self, out: Tensor) -> Tensor:
        return out if self._rows is None else out[..., self._rows[0] : self._rows[1]]

    def _in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """Return the factors in a dtype, and what is left of the scale.

        In 16 bits A has all of it, and is rounded once with it; in float32 it needs no copy.
        """
        found = self._ready.get(dtype)
        if found is None:
            a, b, scale = self._a.float(), self._b.to(dtype), self._scale
            if dtype != torch.float32:
                a, scale = (a * scale).to(dtype), 1.0
            if dtype in WITHOUT_PRODUCTS and self._one_token >= 0:
                b = b.t().contiguous().t()  # so that the product goes along the output
            found = self._ready[dtype] = a, b, scale
        return found
