"""Targets that can be served live and not merged: no weight of the layer stands for them.

PEFT gives a grouped convolution an A that reads all channels, (r, channels, *kernel), and a grouped
B, (out, r / groups, 1, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from regraft.adapters.model import Adapter, LoraTarget
from regraft.errors import Problem, UnsupportedError
from regraft.runtime.forward.layers.kinds import GROUPED_CONVOLUTION
from regraft.runtime.forward.layers.steps import LayerFactors, LowRank
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter

Served = list[tuple[str, LoraTarget]]
"""Module paths and what an adapter has for them."""


def split(base: LiveBase, adapter: Adapter) -> tuple[Adapter, Served]:
    """Return an adapter without what can only be served, and that."""
    served = [(t.module, t) for t in adapter.targets if _is_served(base, adapter, t)]
    if not served:
        return adapter, []
    gone = {path for path, _ in served}
    rest = tuple(target for target in adapter.targets if target.module not in gone)
    return replace(adapter, targets=rest), served


def _is_served(base: LiveBase, adapter: Adapter, target: LoraTarget) -> bool:
    module = base.modules.get(target.module)
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1 or module.transposed:
        return False
    rank, groups = adapter.settings.rank_of(target.module), module.groups
    a = (rank, module.in_channels, *module.kernel_size)
    b = (module.out_channels, rank // groups, *(1,) * len(module.kernel_size))
    plain = target.b_bias is None and target.magnitude is None and module.padding_mode == "zeros"
    fits = (target.a.shape, target.b.shape) == (a, b) and rank % groups == 0
    return plain and fits and adapter.settings.targets(target.module)


def check_mergeable(base: LiveBase, adapters: Sequence[Adapter]) -> None:
    """Refuse to merge what can only be served.

    Raises:
        UnsupportedError: an adapter has a grouped convolution; every one is listed.
    """
    problems = [
        Problem(
            "the adapter of a grouped convolution can be served and saved, not merged",
            f"{adapter.source}: {path}", "a delta that a weight can stand for",
            f"a convolution in {groups_of(base, path)} groups, whose A reads all input channels",
            "Leave it unmerged, or train without this layer",
        )
        for adapter in adapters for path, _ in split(base, adapter)[1]
    ]  # fmt: skip
    if problems:
        raise UnsupportedError(problems)


def groups_of(base: LiveBase, path: str) -> int:
    """Return in how many groups a convolution is."""
    module: Any = base.modules[path]
    return int(module.groups)


def grouped_step(adapter: LiveAdapter, weight: float, target: LoraTarget) -> LowRank:
    """Return the step of a grouped convolution."""
    scale = adapter.adapter.settings.scale_of(target.module, weight)
    factors = LayerFactors(
        lambda: (adapter.tensors[target.a.name], adapter.tensors[target.b.name]),
        trained=adapter.is_trainable,
    )
    kind, exact = GROUPED_CONVOLUTION, float(np.float32(scale))
    return LowRank(kind, factors, exact, None, adapter.dropout)
