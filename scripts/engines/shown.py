"""What an engine did with a fixture, beside what was foretold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import regraft


@dataclass(frozen=True)
class Shown:
    """What an engine did with a fixture.

    Attributes:
        fixture, engine: their names.
        did: ``as trained``, ``as the base``, ``refused`` or ``otherwise``.
        off: the largest difference from what the live model answers; None if refused.
        said: what the engine said when it refused.
        foretold: what ``check --for`` says that it does, None for nothing.
    """

    fixture: str
    engine: str
    did: str
    off: float | None
    said: str
    foretold: str | None

    @property
    def is_right(self) -> bool:
        """Whether it is what was foretold."""
        if self.foretold is None:
            return self.did == "as trained"
        if self.foretold == "refuses":
            return self.did == "refused"
        return self.did in ("as the base", "otherwise")


def foretold_by(base: Path, adapter: Path, engine: str, options: Mapping[str, str]) -> str | None:
    """Return the worst that is foretold: a refusal before all else; None where all is well."""
    report = regraft.check(base, adapter, engine=engine, engine_options=options).engine
    effects = {finding.effect for finding in report.findings} if report is not None else set()
    worst = ("refuses", "leaves out", "misapplies", "other scale")
    return next((effect for effect in worst if effect in effects), None)


def cell(shown: Shown | None) -> str:
    """Return a cell of a table; an empty one where nothing was shown."""
    if shown is None:
        return ""
    off = "" if shown.off is None else f" ({shown.off:.1g})"
    return f"{shown.did}{off}" + ("" if shown.is_right else ", **not foretold**")
