"""What PiSSA and OLoRA took out of a live weight when training began."""

from __future__ import annotations

import numpy as np
import torch

from regraft.deltas.ranks.initial_factors import FACTORIZATIONS
from regraft.deltas.views import Delta


def residual_pair(weight: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left and right of a residual, found again from the weight, as that is stored.

    Args:
        weight: the plain weight, (out, in) or, where the delta says so, (in, out).
        delta: the residual; its scale is negative.
    """
    matrix = weight.detach().float().cpu().numpy().reshape(weight.shape[0], -1)
    matrix = matrix.T if delta.by_column else matrix
    b, a = FACTORIZATIONS[delta.feature](matrix, delta.rank, -delta.scale)
    left, right = (a.T, b.T) if delta.by_column else (b, a)
    on = weight.device
    return (
        torch.from_numpy(np.ascontiguousarray(left)).to(on),
        torch.from_numpy(np.ascontiguousarray(right)).to(on),
    )
