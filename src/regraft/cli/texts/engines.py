"""What an engine would do with an adapter, as text: parts with one cause together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from regraft.cli.text import plural
from regraft.cli.texts.plan import pattern
from regraft.engines.registry import ENGINES
from regraft.engines.report import EngineReport, Finding

Key = Callable[[Finding], tuple[object, ...]]

MOST = 10
"""Names, and causes, that are shown; the JSON has all of them."""


def render(report: EngineReport) -> str:
    """Return the findings, grouped by what the engine does and why, with the notes below."""
    shown = f"{ENGINES[report.engine].shown} {report.version}"
    notes = [f"  note: {note}" for note in report.notes]
    if report.ok:
        first = "" if report.converts_to is None else "once it is converted, "
        return "\n".join([f"{shown}: ok, {first}it would answer with all of the adapter", *notes])
    count = plural(len(report.findings), "part")
    told = [f"{shown}: no, it would not answer with {count} as trained"]
    causes = list(_by(report.findings, lambda f: (f.effect, f.because, f.way_out)))
    told += [line for cause in causes[:MOST] for line in _cause(cause)]
    return "\n".join([*told, *_more(len(causes), "  "), *notes])


def _cause(findings: list[Finding]) -> Iterator[str]:
    """Yield what is done and why, the parts that it is done to, and the way out."""
    first = findings[0]
    yield f"  - {first.effect}, because {first.because}"
    alike = list(_by(findings, lambda f: (f.scale, f.applied, _numberless(f.where))))
    yield from (f"      {_parts(group)}" for group in alike[:MOST])
    yield from _more(len(alike), "      ")
    yield f"    way out: {first.way_out}"


def _parts(findings: list[Finding]) -> str:
    first = findings[0]
    name, times = pattern([finding.where for finding in findings])
    shown = f"{name} ({times})" if times else name
    if first.scale is None or first.applied is None:
        return shown
    return f"{shown}: {first.applied:.6g} instead of {first.scale:.6g}"


def _more(count: int, indent: str) -> list[str]:
    return [f"{indent}and {count - MOST} more (--json has all)"] if count > MOST else []


def _by(findings: Iterable[Finding], key: Key) -> Iterable[list[Finding]]:
    """Return findings of one key together, in the order in which they came."""
    found: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        found.setdefault(key(finding), []).append(finding)
    return found.values()


def _numberless(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))
