"""What comparing the answers to prompts comes to: figures, limits, a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Reference = Literal["peft", "float32 merge"]
"""What answered as base + adapter; see :class:`PromptReport`."""

PromptVerdict = Literal["same", "different", "unjudged"]
"""The answer as a whole; see :class:`PromptReport`."""

KL_LIMIT = 1e-3
"""Mean KL in nats up to which two models answer the same: some times what rounding a merge to
bfloat16 comes to on ordinary text."""

KL_SHARE = 0.005
"""The limit as a share of what the adapter does, KL(base + adapter || base), where that is more.

Sharp answers are moved more by rounding too: to about a thousandth of what the adapter does. An
adapter merged at nine tenths of its scale is a hundredth off."""

DISAGREEING = 0.05
"""Share of the positions that may have another token first: where two are about as likely."""

TELLING = 10
"""How many times the limit the base alone has to be off, for the prompts to show anything."""


@dataclass(frozen=True)
class PromptAgreement:
    """How the merged model agrees with base + adapter on one prompt.

    Attributes:
        line: its line in the file.
        prompt: its beginning.
        tokens: positions compared.
        top1_agreement: share of them where both rank the same token first.
        kl_mean, kl_max: KL(base + adapter || merged) over them, in nats.
    """

    line: int
    prompt: str
    tokens: int
    top1_agreement: float
    kl_mean: float
    kl_max: float


@dataclass(frozen=True)
class PromptReport:
    """How the merged model's next-token probabilities agree with those of base + adapter.

    Every position of every prompt counts once. KL is KL(base + adapter || other), in nats.

    Attributes:
        file: the file of prompts.
        ok: whether the answers are the same and the prompts are such that this says something.
        verdict: ``"same"``; ``"different"``; ``"unjudged"``: the same, but the base without an
            adapter answers the same too, so these prompts do not show whether it is merged.
        tokens: positions compared.
        top1_agreement: share of them where both models rank the same token first.
        kl_mean, kl_max: over all positions.
        base_top1_agreement, base_kl_mean: the same of the base without adapter; None where its
            vocabulary lacks a prompt's tokens.
        prompts: one entry per prompt, in the order of the file.
        truncated: prompts of which only the first tokens were taken.
        reference: what answered as base + adapter: ``"peft"``, the base with the adapters live on
            it; ``"float32 merge"``, a merge by regraft that is not rounded.
        dtype: what both models computed in.
        device: where.
        notes: what else is to be known, one sentence each.
    """

    file: str
    ok: bool
    verdict: PromptVerdict
    tokens: int
    top1_agreement: float
    kl_mean: float
    kl_max: float
    base_top1_agreement: float | None
    base_kl_mean: float | None
    prompts: tuple[PromptAgreement, ...]
    truncated: int
    reference: Reference
    dtype: str
    device: str
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> PromptAgreement:
        """The prompt with the largest mean KL."""
        return max(self.prompts, key=lambda each: each.kl_mean)

    def conclusion(self) -> str:
        """Return the verdict on the answers, as one sentence."""
        figures = (
            f"the same token first at {self.top1_agreement:.1%} of {self.tokens} positions, "
            f"KL {self.kl_mean:.2g} nats"
        )
        if self.verdict == "different":
            return f"its answers to the prompts are not those of base + adapter: {figures}"
        if self.verdict == "unjudged":
            return (
                "the prompts do not show whether an adapter is merged: the base alone answers "
                f"them about the same (KL {self.base_kl_mean or 0:.2g} nats)"
            )
        return f"its answers to the prompts are those of base + adapter: {figures}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return asdict(self) | {"worst": asdict(self.worst)}


@dataclass(frozen=True)
class Tally:
    """How two models agree on one prompt.

    Attributes:
        tokens: positions compared.
        same: how many of them have the same token first.
        kl: sum of the KL over them.
        kl_max: the largest.
    """

    tokens: int
    same: int
    kl: float
    kl_max: float

    @property
    def top1(self) -> float:
        """Share of the positions that have the same token first."""
        return self.same / self.tokens

    @property
    def kl_mean(self) -> float:
        """The mean KL."""
        return self.kl / self.tokens

    @classmethod
    def sum(cls, tallies: Sequence[Tally]) -> Tally:
        """Return the tally over all prompts."""
        return cls(
            sum(each.tokens for each in tallies),
            sum(each.same for each in tallies),
            math.fsum(each.kl for each in tallies),
            max(each.kl_max for each in tallies),
        )


def judged(merged: Tally, base: Tally | None) -> PromptVerdict:
    """Return the verdict on a merged model.

    Args:
        merged: how it agrees with base + adapter, over all prompts.
        base: how the base alone does; None if that is not known.
    """
    effect = base.kl_mean if base is not None and math.isfinite(base.kl_mean) else None
    limit = max(KL_LIMIT, KL_SHARE * (effect or 0.0))
    others = merged.tokens - merged.same
    if not merged.kl_mean <= limit or others > max(1, DISAGREEING * merged.tokens):
        return "different"
    if effect is not None and effect < TELLING * limit:
        return "unjudged"
    return "same"
