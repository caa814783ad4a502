"""What ``extract`` answers: what became of every tensor, and how far off the adapter is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ExtractedModule:
    """A weight that the adapter has factors for. Norms are Frobenius norms.

    Attributes:
        name: the module's, or the parameter's of a stack of experts.
        kind: what kind of layer it is.
        rank: r.
        norm: of the difference between the fine-tuned weight and the base's.
        error_norm: of what the factors are off by of that, their rounding included.
        uncertain_norm: of what the fine-tuned weight's own rounding leaves uncertain of it.
    """

    name: str
    kind: str
    rank: int
    norm: float
    error_norm: float
    uncertain_norm: float

    @property
    def error(self) -> float:
        """What the factors are off by, relative to the difference."""
        return self.error_norm / self.norm if self.norm else 0.0

    @property
    def uncertain(self) -> float:
        """What rounding leaves uncertain, relative to the difference."""
        return self.uncertain_norm / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the module as JSON-ready objects."""
        return asdict(self) | {"error": self.error, "uncertain": self.uncertain}


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did.

    Attributes:
        base: the base, as the user named it.
        tuned: the fine-tuned model, as the user named it.
        output: the folder.
        exact: whether the adapter is the one that was merged, kept beside the model.
        dtype: what the factors are stored in.
        rank: the rank that was asked for, or None.
        energy: the share of the squared norm that was asked for, or None.
        max_error: the largest relative error that was asked for, or None.
        modules: one record per weight with factors.
        whole: the parameters that travel whole.
        left_out: changed tensors that were not asked for.
        unchanged: number of tensors that are the base's.
        error: what all factors together are off by, relative to all differences.
        uncertain: what rounding leaves uncertain of all differences.
        bytes: size of the weights file.
        warnings: sentences on what the adapter does not have.
        seconds: wall time.
        peak_memory: peak resident memory of the process in bytes.
    """

    base: str
    tuned: str
    output: str
    exact: bool
    dtype: str
    rank: int | None
    energy: float | None
    max_error: float | None
    modules: tuple[ExtractedModule, ...]
    whole: tuple[str, ...]
    left_out: tuple[str, ...]
    unchanged: int
    error: float
    uncertain: float
    bytes: int
    warnings: tuple[str, ...]
    seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return asdict(self) | {"modules": [module.to_json() for module in self.modules]}


def overall(modules: Sequence[ExtractedModule], norms: Sequence[float]) -> float:
    """Return the norm of all errors (or uncertain parts) relative to that of all differences."""
    whole = math.hypot(*(module.norm for module in modules))
    return math.hypot(*norms) / whole if whole else 0.0


LOUD = 0.3
"""A relative error from which on a fine-tune is said to be of no low rank."""


def warnings_of(
    modules: Sequence[ExtractedModule], left_out: Sequence[str], rank: int | None
) -> tuple[str, ...]:
    """Return what to say of an adapter that lacks much of what the fine-tune did."""
    found = []
    error = overall(modules, [module.error_norm for module in modules])
    uncertain = overall(modules, [module.uncertain_norm for module in modules])
    if error > max(LOUD, 2 * uncertain):
        found.append(
            f"the fine-tune is not of low rank: at rank {rank or 'as chosen'} the adapter lacks "
            f"{error:.0%} of what was learnt, by the norm. Give a higher --rank, or --max-error; "
            "or keep the fine-tuned model"
        )
    if not modules:
        found.append(
            "the adapter has no factors, and PEFT loads none without: `regraft merge` takes it"
        )
    if uncertain > 0.01:
        found.append(
            f"the fine-tuned weights were rounded to their dtype, which leaves {uncertain:.1%} of "
            "the difference uncertain: no adapter can be nearer to what was learnt"
        )
    if left_out:
        shown = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
        found.append(f"{len(left_out)} changed tensors are left out, as --modules says ({shown})")
    return tuple(found)
