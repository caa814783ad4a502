"""Base drift: how far the base that is merged into lies from the one of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from regraft.errors import MismatchError, Problem
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.problems import capped
from regraft.merging.inputs.dequantized_view import Quantization
from regraft.merging.inputs.published import published
from regraft.names import NameMap
from regraft.numerics.arrays import Floats
from regraft.tensors import WORKING_DTYPES, TensorSpec

if TYPE_CHECKING:
    from regraft.merging.planning.plan import Step


@dataclass(frozen=True)
class TrainedOn:
    """The base that adapters were trained on.

    Attributes:
        base: its weights as plain ones.
        quantization: how it is quantized, if it is.
    """

    base: Checkpoint
    quantization: Quantization | None

    @property
    def stored(self) -> Checkpoint:
        """The base as it is on disk."""
        return self.base if self.quantization is None else self.quantization.stored

    def spec(self, step: Step) -> TensorSpec | None:
        """Return the tensor that a step's source is to be compared with; None for none.

        A weight that is seen as its codes lie, transposed, is compared with none.
        """
        spec = self.base.tensors.get(step.source.name)
        turned = step.coded is not None and step.coded.as_stored
        compared = bool(step.segments) and step.source_adapter is None and not turned
        return spec if compared and spec is not None and spec.shape == step.source.shape else None

    def published(self, names: NameMap) -> TrainedOn:
        """Return the same with single experts as the stacks that its class reads.

        Raises:
            MismatchError: they do not make them up.
        """
        if self.quantization is None:
            return self
        return TrainedOn(*published(self.base, self.quantization, names))

    def check(self, steps: Sequence[Step]) -> None:
        """Refuse a base that lacks a tensor that is merged into, or has it in another shape.

        Raises:
            MismatchError: it does; lists every tensor.
        """
        problems = []
        for step in steps:
            if not step.segments or step.source_adapter is not None:
                continue
            source, found = step.source, self.base.tensors.get(step.source.name)
            shapes = (source.shape, source.shape[::-1] if step.coded else source.shape)
            if found is None or found.shape not in shapes or found.dtype not in WORKING_DTYPES:
                what = "the base that adapters were trained on does not have this tensor"
                has = f"{found.dtype} {list(found.shape)}" if found is not None else "nothing"
                where = f"{self.base.source}: {source.name}"
                problems.append(Problem(what, where, f"{list(source.shape)}", has))
        if problems:
            raise MismatchError(capped(problems, self.base.root))


def warning(gaps: Sequence[tuple[str, float, float]]) -> str:
    """Return what to say where the two bases are further apart than the adapter moves; "" for none.

    Args:
        gaps: of each merged tensor its name, the norm of what lies between, and that of the delta.
    """
    further = [(gap / delta, name) for name, gap, delta in gaps if gap > delta > 0]
    if not further:
        return ""
    worst, name = max(further)
    return (
        f"on {len(further)} of {len(gaps)} merged tensors this base is further from the one that "
        f"the adapter was trained on than the adapter moves it (at most {worst:.3g} x, on {name}): "
        "the merged model may answer unlike the adapter did in training; merge into that base to "
        "have its answers"
    )


def gap_square(one: Floats, other: Floats) -> float:
    """Return the sum of squares of what lies between two arrays of float32, in float64."""
    difference = np.subtract(one, other, dtype=np.float64)
    return float(np.dot(difference, difference))
