"""What ``verify`` answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from regraft.verifying.prompting.report import PromptReport

Verdict = Literal["exact", "rounding", "different", "unjudged"]
"""The answer as a whole; see :class:`VerifyReport`."""

Kind = Literal[
    "exact", "rounding", "missing", "adapter-missing", "twice", "scale", "elements", "swapped",
    "changed", "another-base", "another-adapter", "other", "shape", "absent", "extra", "unjudged",
]  # fmt: skip
"""The answer for one tensor.

``exact`` bit for bit the merge; ``rounding`` the merge, rounded differently; ``missing`` no delta;
``adapter-missing`` the delta of one of several adapters; ``twice`` the delta twice; ``scale`` the
delta at another scale; ``elements`` right but for a few elements; ``swapped`` what belongs to
another tensor; ``changed`` no adapter touches it, and it is not the base's; ``another-base``,
``another-adapter`` something else was merged; ``other`` none of these; ``shape`` another shape;
``absent`` not there; ``extra`` there although the merge has none; ``unjudged`` cannot be compared.
"""

FINE = frozenset(("exact", "rounding"))
"""Kinds that are no difference."""


@dataclass(frozen=True)
class Difference:
    """Something about the files that is not as the receipt says.

    Attributes:
        file: path in the folder, with ``/`` between its parts.
        tensor: the tensor, or ``""`` where it is not about one.
        what: what is different, without a full stop.
    """

    file: str
    tensor: str
    what: str

    def __str__(self) -> str:
        where = f"{self.file}, tensor {self.tensor}" if self.tensor else self.file
        return f"{where}: {self.what}"


@dataclass(frozen=True)
class TensorVerdict:
    """How one tensor agrees with the merge done again.

    Attributes:
        name: its name as the base (or the adapter that brings it) has it.
        verdict: see :data:`Kind`.
        ulps: the largest distance from the merge, in units in the last place of the larger of
            base and merged weight, in the dtype it is stored in; None where that makes no sense.
        coefficient: how many times it holds the delta; None where that cannot be measured.
        note: what is wrong with it, for a person.
    """

    name: str
    verdict: Kind
    ulps: float | None = None
    coefficient: float | None = None
    note: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """The answer of :func:`regraft.verify`.

    Attributes:
        source: what was verified, as named.
        ok: whether it is what it should be, exactly or within rounding.
        verdict: ``"exact"``: the files are those of the receipt and, if base and adapters were
            given, every tensor is the merge, bit for bit; ``"rounding"``: the merge, but for
            rounding; ``"different"``, also if only the answers to prompts differ; ``"unjudged"``:
            nothing differs, but some tensors cannot be compared, or the receipt does not speak of
            all files.
        conclusions: what to make of it, one sentence each.
        differences: what is not as the receipt says.
        tensors: one verdict per tensor of the merge done again; empty without base and adapters.
        checked: what was looked at: ``files``, ``headers``, ``tensors`` and ``bytes`` against the
            receipt, ``judged`` tensors against the merge.
        warnings: what the user should know, one sentence each.
        prompts: how answers to prompts agree; None where there were none to compare.
    """

    source: str
    ok: bool
    verdict: Verdict
    conclusions: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    tensors: tuple[TensorVerdict, ...] = ()
    checked: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    prompts: PromptReport | None = None

    def counts(self) -> dict[str, int]:
        """Return how many tensors got each verdict."""
        return dict(Counter(tensor.verdict for tensor in self.tensors))

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        prompts = self.prompts.to_json() if self.prompts is not None else None
        return asdict(self) | {"counts": self.counts(), "prompts": prompts}


def overall(
    differences: tuple[Difference, ...],
    tensors: tuple[TensorVerdict, ...],
    prompts: PromptReport | None = None,
    *,
    complete: bool = True,
) -> Verdict:
    """Return the answer as a whole.

    Args:
        differences: what is not as the receipt says.
        tensors: the verdicts of the merge done again.
        prompts: how answers agree.
        complete: whether there was something to hold every file against.
    """
    kinds = {tensor.verdict for tensor in tensors}
    if differences or kinds - FINE - {"unjudged"}:
        return "different"
    if prompts is not None and prompts.verdict == "different":
        return "different"
    if "unjudged" in kinds or not complete:
        return "unjudged"
    return "rounding" if "rounding" in kinds else "exact"
