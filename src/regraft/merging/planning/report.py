"""Reports of two verbs: ``check`` (would it merge?) and ``unmerge`` (which base came back)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.errors import Problem

if TYPE_CHECKING:
    from regraft.engines.report import EngineReport


@dataclass(frozen=True)
class CheckReport:
    """The answer of :func:`regraft.check`.

    Attributes:
        ok: whether the merge would go through, as far as headers can tell, and the engine that was
            asked about would answer with the adapter as it was trained.
        problems: everything that stands in the way.
        warnings: what the user should know although it merges.
        summary: counts of the plan (tensors by action, bytes, memory); empty when it would not
            merge.
        engine: what the engine that was asked about would do; None where none was.
    """

    ok: bool
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    engine: EngineReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects; ``engine`` is there if one was asked about."""
        told = {
            "ok": self.ok,
            "problems": [problem.to_json() for problem in self.problems],
            "warnings": list(self.warnings),
            "summary": self.summary,
        }
        return told if self.engine is None else told | {"engine": self.engine.to_json()}


@dataclass(frozen=True)
class UnmergeReport:
    """What an un-merge did.

    Attributes:
        merged: the merged model, as the user named it.
        base: the base, as it was named at the merge.
        output: the folder, or the GGUF file.
        files: the base's files, now in the output.
        left_out: files of the base's folder that a merge does not keep, such as weights in other
            formats.
        tensors: tensors restored, each with the digest that the base's had.
        bytes_written: their bytes.
        seconds: wall time, from the call to the renamed folder.
        peak_memory: peak resident memory of the process in bytes, as the system reports it.
        threads: worker threads used.
    """

    merged: str
    base: str
    output: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    tensors: int
    bytes_written: int
    seconds: float
    peak_memory: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return asdict(self)
