"""Weights that are computed for a forward pass, where a delta cannot be added to the output.

nn.MultiheadAttention, experts and layers of unknown kinds use their weights in ways of their own.
They are run on a shadow of the module that has other weights; what the module itself has stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from regraft.deltas.views import Delta
from regraft.merging.planning.match import Work
from regraft.runtime.forward.layers.kinds import shadow
from regraft.runtime.forward.layers.plain import plain_weight
from regraft.runtime.forward.layers.residuals import residual_pair
from regraft.runtime.model.matching import Tensors

READS_ITS_CHILDREN = (nn.MultiheadAttention,)
"""Modules that use the weights of their submodules without calling them."""


@dataclass(eq=False)
class ComputedWeight:
    """A parameter with an adapter's work done to it.

    Attributes:
        module, leaf, name: whose parameter it is, and its names.
        work: what is done.
        tensors: the adapters' tensors.
    """

    module: nn.Module
    leaf: str
    name: str
    work: Work
    tensors: Tensors
    _residuals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Not in the call: torch.compile does not trace groupby.
        self._stacks = [list(group) for _, group in groupby(self.work.deltas, _stack_key)]

    def __call__(self, module: nn.Module | None = None) -> Tensor:
        """Return the weight; of ``module`` if it is given, a copy of the one it was made for."""
        weight = plain_weight(module or self.module, self.leaf, self.name)
        found = self._replaced(weight)
        if found is not None:
            if not (self.work.deltas or self.work.patches):
                return found
            weight = found
        value = weight.detach() if not weight.requires_grad else weight
        for deltas in self._stacks:
            value = self._with(value, deltas)
        return self._patched(value).reshape(weight.shape).to(weight.dtype)

    def _replaced(self, weight: Tensor) -> Tensor | None:
        origin = self.work.replaced or self.work.carried
        if origin is None:
            return None
        tensor = self.tensors.whole(origin[0], origin[1].name)
        return tensor.to(device=weight.device, dtype=weight.dtype)

    def _with(self, value: Tensor, deltas: Sequence[Delta]) -> Tensor:
        first = deltas[0]
        if len(deltas) == 1:
            return self._with_one(value, first)
        pairs = [self.pair(delta, value.device) for delta in deltas]
        left = torch.stack([pair[0] for pair in pairs])
        right = torch.stack([pair[1] for pair in pairs])
        blocks = value.reshape(len(deltas), left.shape[1], right.shape[2])
        if value.dtype == left.dtype == right.dtype:
            return torch.baddbmm(blocks, left, right, alpha=first.scale)
        return (blocks + torch.bmm(left, right) * first.scale).to(value.dtype)

    def _with_one(self, value: Tensor, delta: Delta) -> Tensor:
        left, right = self.pair(delta, value.device)
        rows = value.reshape(-1, right.shape[1]) if value.dim() != 2 else value
        low, high = delta.rows
        part = rows[low:high].float() + (left.float() @ right.float()) * delta.scale
        if delta.is_residual:
            part = part.to(value.dtype).float()
        if delta.magnitude is not None:
            part = part * self.dora_factor(delta).float().unsqueeze(0 if delta.by_column else 1)
        if (low, high) != (0, rows.shape[0]):
            part = torch.cat((rows[:low].float(), part, rows[high:].float()))
        return part if value.dtype == torch.float32 else part.to(value.dtype)

    def dora_factor(self, delta: Delta, module: nn.Module | None = None) -> Tensor:
        """Return m / |W + s B A|, one value per output channel (Liu et al. 2024, equation 5).

        W is the base's own. The norm is a constant to gradients (the paper's section 4.3).
        """
        if delta.magnitude is None:
            raise ValueError("only DoRA has a factor")
        plain = plain_weight(module or self.module, self.leaf, self.name)
        magnitude = self.tensors.matrix(delta.adapter, delta.magnitude).reshape(-1)
        with torch.no_grad():
            left, right = self.pair(delta, plain.device)
            rows = plain.reshape(-1, right.shape[1])[slice(*delta.rows)].float()
            grown = torch.addmm(rows, left.float(), right.float(), alpha=delta.scale)
            norm = grown.norm(dim=0 if delta.by_column else 1)
        return magnitude.to(norm.device) / norm.to(magnitude.dtype)

    def pair(self, delta: Delta, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a delta's factors as the stored weight has them."""
        if delta.left is None or delta.right is None:
            if id(delta) not in self._residuals:
                weight = plain_weight(self.module, self.leaf, self.name)
                self._residuals[id(delta)] = residual_pair(weight, delta)
            return self._residuals[id(delta)]
        left = self.tensors.matrix(delta.adapter, delta.left)
        right = self.tensors.matrix(delta.adapter, delta.right)
        return left.to(device), right.to(device)

    def _patched(self, value: Tensor) -> Tensor:
        for patch in self.work.patches:
            rows = self.tensors.matrix(patch.adapter, patch.values)
            index = torch.tensor(patch.indices, device=value.device)
            value = value.index_copy(0, index, rows.to(value))
        return value


def _stack_key(delta: Delta) -> tuple[Any, ...]:
    """Return a key that is equal for the deltas of experts that are computed as one stack."""
    left = delta.left
    if delta.is_residual or delta.magnitude is not None or left is None or left.spec is None:
        return (id(delta),)
    rows = delta.rows[1] - delta.rows[0]
    return (delta.adapter, delta.scale, rows, left.spec, left.shape)


@dataclass(eq=False)
class Replacement:
    """A module's forward pass with other weights.

    Attributes:
        weights: by their path below the module; each a tensor, or computed for every pass.
    """

    weights: dict[str, Tensor | ComputedWeight]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module on the other weights."""
        return shadow(module, self._values(module)).forward(*args, **kwargs)

    def _values(self, module: nn.Module) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for path, weight in self.weights.items():
            if isinstance(weight, ComputedWeight):
                owner, _, _ = path.rpartition(".")
                values[path] = weight(module.get_submodule(owner))
            else:
                values[path] = self._static(module, path, weight)
        return values

    def _static(self, module: nn.Module, path: str, weight: Tensor) -> Tensor:
        own = module.get_parameter(path)
        if own.device.type != "meta" and (weight.device, weight.dtype) != (own.device, own.dtype):
            moved = weight.to(device=own.device, dtype=own.dtype)
            if not weight.requires_grad:
                self.weights[path] = moved
            return moved
        return weight
