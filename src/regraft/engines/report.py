"""What is found where an adapter is held against an engine's facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Effect = Literal["refuses", "leaves out", "other scale", "misapplies"]
"""What an engine does with a part of an adapter that it does not take as it was trained.

``refuses``: it says so and loads nothing; ``leaves out``: it answers without that part and says
nothing; ``other scale``: it multiplies the delta by another number; ``misapplies``: it adds the
delta somewhere else, or turned round.
"""


@dataclass(frozen=True)
class Finding:
    """A part of an adapter that an engine would not answer with as it was trained.

    Attributes:
        effect: what the engine does.
        where: the module or tensor, by the adapter's name for it.
        because: why.
        way_out: what to do about it.
        scale: what its delta is to be multiplied by, where the effect is another scale.
        applied: what the engine multiplies it by.
    """

    effect: Effect
    where: str
    because: str
    way_out: str
    scale: float | None = None
    applied: float | None = None


@dataclass(frozen=True)
class EngineReport:
    """An adapter held against one engine's facts.

    Attributes:
        engine: the engine's name.
        version: the version that its facts were read from.
        asked: the version that was asked about or is installed, None where neither is known.
        findings: everything that it would leave out, refuse or apply otherwise.
        notes: what to know beside them.
        converts_to: the dialect that the adapter has to be written in first; None where the engine
            reads it as it is.
    """

    engine: str
    version: str
    asked: str | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    converts_to: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self) | {"ok": self.ok}
