"""What ``check`` answers: would it merge, and if not, everything that stands in the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regraft.errors import Problem


@dataclass(frozen=True)
class CheckReport:
    """The answer of :func:`regraft.check`.

    Attributes:
        ok: whether the merge would go through, as far as headers can tell.
        problems: everything that stands in the way.
        warnings: what the user should know although it merges.
        summary: counts of the plan (tensors by action, bytes, memory); empty when not ok.
    """

    ok: bool
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return {
            "ok": self.ok,
            "problems": [problem.to_json() for problem in self.problems],
            "warnings": list(self.warnings),
            "summary": self.summary,
        }
