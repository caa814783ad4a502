"""The steps that adapters add to a layer: to its output, or to its weight where that is needed.

The order of steps is that of the deltas in a merge (docs/arithmetic.md), so that a live model
answers as the merged one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.runtime.forward.layers.kinds import Kind, looked_up
from regraft.runtime.forward.layers.quick import Quick

Pair = tuple[Tensor, Tensor]
"""A and B of a delta, as the layer's kind takes them."""


class LayerFactors:
    """A pair that does not change, or one made anew from tensors in training."""

    def __init__(self, make: Callable[[], Pair], *, trained: bool) -> None:
        self.trained = trained
        self._make = make
        self._pair: Pair | None = None if trained else _detached(make())

    @property
    def fixed(self) -> Pair | None:
        """The pair where it does not change."""
        return self._pair

    def on(self, device: torch.device) -> Pair:
        """Return the pair, on the device where the layer computes."""
        if self._pair is None:
            a, b = self._make()
            return (a, b) if a.device == device else (a.to(device), b.to(device))
        if self._pair[0].device != device:
            self._pair = (self._pair[0].to(device), self._pair[1].to(device))
        return self._pair


def _detached(pair: Pair) -> Pair:
    return pair[0].detach(), pair[1].detach()


def can_be_changed(out: Tensor, *others: Tensor) -> bool:
    """Whether an output may be changed where it lies: nothing will ask for a gradient."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, *others)):
        return False
    return bool(out.is_floating_point())


def usable(x: Tensor, a: Tensor) -> Tensor:
    """Return an input in the dtype of A; token ids stay what they are."""
    return x.to(a.dtype) if x.dtype != a.dtype and x.is_floating_point() else x


@dataclass(eq=False)
class LowRank:
    """Adds scale * B A x to an output, or to a range of its channels.

    Attributes:
        kind: the layer's.
        factors: A and B.
        scale: on their product.
        rows: the output channels it is for; None for all.
        dropout: on the input, in training.
    """

    kind: Kind
    factors: LayerFactors
    scale: float
    rows: tuple[int, int] | None = None
    dropout: float = 0.0
    _quick: Quick | None = None

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the delta added."""
        drops, quick = self.dropout and module.training, self._quick
        is_ready = quick is not None and not drops and quick.device == out.device
        if quick is not None and is_ready and can_be_changed(out, x):
            quick.add(x, out)
            return out
        a, b = self.factors.on(out.device)
        if drops:
            x = functional.dropout(usable(x, a), self.dropout)
        if self.kind.in_place and can_be_changed(out, x, a, b):
            self._quickly(a, b).add(x, out)
            return out
        h = self.kind.down(module, usable(x, a), a)
        return self._added(module, out, h, b)

    def _quickly(self, a: Tensor, b: Tensor) -> Quick:
        """Return what adds a pair in place: kept, unless the pair is being trained."""
        if self.factors.trained:
            return Quick(a, b, self.scale, self.rows, is_kept=False)
        if self._quick is None or self._quick.device != a.device:
            self._quick = Quick(a, b, self.scale, self.rows)
        return self._quick

    def _added(self, module: nn.Module, out: Tensor, h: Tensor, b: Tensor) -> Tensor:
        delta = self.kind.up(module, h, b) * self.scale
        if self.rows is not None:
            delta = functional.pad(delta, (self.rows[0], out.shape[-1] - self.rows[1]))
        return (out + delta).to(out.dtype)


@dataclass(eq=False)
class Dora:
    """Scales an output's channels by m / |W'| after a delta (Liu et al. 2024, arXiv:2402.09353).

    Attributes:
        delta: the delta.
        factor: gives m / |W'|, one value per output channel of the delta's range.
        weight: gives the plain weight; asked for with dropout alone, where PEFT's DoRA computes
            the layer's own output once more, from the input as it was dropped out.
    """

    delta: LowRank
    factor: Callable[[torch.device], Tensor]
    weight: Callable[[], Tensor]

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the delta added and its channels scaled."""
        kind, rows = self.delta.kind, self.delta.rows
        factor = kind.channels(module, self.factor(out.device))
        a, b = self.delta.factors.on(out.device)
        x = usable(x, a)
        if self.delta.dropout and module.training:
            x = functional.dropout(x, self.delta.dropout)
            dropped = kind.base(module, x, self.weight().to(x.dtype))
            added = kind.up(module, kind.down(module, x, a), b) * self.delta.scale
            return (out + (factor - 1) * dropped + factor * added).to(out.dtype)
        added = kind.up(module, kind.down(module, x, a), b) * self.delta.scale
        if rows is not None:
            added = functional.pad(added, (rows[0], out.shape[-1] - rows[1]))
            ones = factor.new_ones(out.shape[-1])
            factor = torch.cat((ones[: rows[0]], factor, ones[rows[1] :]))
        return scaled(module, kind, out + added, factor).to(out.dtype)


def scaled(module: nn.Module, kind: Kind, out: Tensor, factor: Tensor) -> Tensor:
    """Return an output with its channels multiplied; a layer's bias is not."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return factor * out
    bias = kind.channels(module, bias)
    return factor * (out - bias) + bias


@dataclass(eq=False)
class Shift:
    """Adds a vector to every output: scale times ``lora_bias``.

    Attributes:
        kind: the layer's.
        vector: gives one value per output channel.
    """

    kind: Kind
    vector: Callable[[], Tensor]

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the vector added."""
        del x
        vector = self.kind.channels(module, self.vector().to(out.device))
        return (out + vector).to(out.dtype)


@dataclass(eq=False)
class TokenRows:
    """Puts other rows in the place of an embedding's, on the side where ids are looked up.

    Attributes:
        indices: which rows.
        values: gives them, (n, dim).
    """

    indices: Tensor
    values: Callable[[], Tensor]

    def __post_init__(self) -> None:
        self._places = {index: place for place, index in enumerate(self.indices.tolist())}

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the new rows where their ids were asked for."""
        indices, values = self.indices.to(x.device), self.values().to(out.device)
        hits = x.unsqueeze(-1) == indices  # (..., n)
        hit, places = hits.any(-1), hits.long().argmax(-1)
        if module.scale_grad_by_freq:  # ids that are not asked for must not be counted
            values = torch.cat((values, values.new_zeros(1, values.shape[1])))
            places = torch.where(hit, places, len(indices))
        rows = looked_up(module, places, values, self._places.get(module.padding_idx))
        return torch.where(hit.unsqueeze(-1), rows.to(out.dtype), out)


@dataclass(eq=False)
class TokenLogits:
    """The same on the side of the output: other logits for some tokens.

    Attributes:
        indices: which tokens.
        values: gives their rows, (n, in).
    """

    indices: Tensor
    values: Callable[[], Tensor]

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the new logits."""
        indices = self.indices.to(out.device)
        values = self.values().to(out.device)
        logits = functional.linear(x.to(values.dtype), values)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            logits = logits + bias[indices]
        return out.index_copy(-1, indices, logits.to(out.dtype))


Step = LowRank | Dora | Shift | TokenRows | TokenLogits
