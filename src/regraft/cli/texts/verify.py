"""The answer of ``verify`` as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from regraft.cli.text import pairs, plural, size, table
from regraft.verifying.prompting.report import PromptAgreement, PromptReport
from regraft.verifying.report import FINE, Difference, TensorVerdict, Verdict, VerifyReport

_FAR = 1e6
"""So many units in the last place are another value, and the number says no more."""

SHOWN = 20
"""Differences and tensors listed before the rest is counted."""

_ANSWERS: dict[Verdict, str] = {
    "exact": "ok: exact",
    "rounding": "ok: within rounding",
    "different": "no: it differs",
    "unjudged": "some of it cannot be judged",
}


def render(report: VerifyReport, *, verbose: bool = False) -> str:
    """Return the report as text.

    Args:
        report: what ``verify`` returned.
        verbose: whether every tensor gets a line.
    """
    parts = [
        "\n".join([_ANSWERS[report.verdict], *(f"  {said}" for said in report.conclusions)]),
        _differences(report.differences, verbose=verbose),
        _tensors(report.tensors, verbose=verbose),
        _prompts(report.prompts, verbose=verbose),
        _checked(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _differences(differences: Sequence[Difference], *, verbose: bool) -> str:
    return "\n".join(_cut([f"  - {difference}" for difference in differences], verbose=verbose))


def _tensors(tensors: Sequence[TensorVerdict], *, verbose: bool) -> str:
    """Return a table of the tensors that are not the merge, or of all."""
    listed = [t for t in tensors if verbose or t.verdict not in FINE]
    if not listed:
        return ""
    rows = [(t.name, t.verdict, _ulps(t.ulps), t.note) for t in listed]
    kept = rows if verbose else rows[:SHOWN]
    lines = table([("tensor", "verdict", "ulps", ""), *kept], "llrl").splitlines()
    return "\n".join([*lines, *_more(len(rows) - len(kept))])


def _prompts(report: PromptReport | None, *, verbose: bool) -> str:
    """Return a table of the answers to prompts: of all of them, and of each or the worst."""
    if report is None:
        return ""
    rows: list[Sequence[str]] = [("answers to", "tokens", "same first", "KL mean", "KL max")]
    listed = report.prompts if verbose else (report.worst,)
    worst = "" if verbose or len(report.prompts) == 1 else "worst, "
    rows += [_agreement(f"{worst}line {p.line}: {p.prompt}", p) for p in listed]
    rows.append(_agreement("all prompts", report))
    if report.base_kl_mean is not None and report.base_top1_agreement is not None:
        first = f"{report.base_top1_agreement:.1%}"
        rows.append(("  by the base alone", "", first, f"{report.base_kl_mean:.3g}", ""))
    reference = "PEFT" if report.reference == "peft" else "regraft, not rounded"
    how = f"base + adapter by {reference}; {report.dtype} on {report.device}; KL in nats"
    return f"{table(rows, 'lrrrr')}\n  {how}"


def _agreement(name: str, of: PromptAgreement | PromptReport) -> tuple[str, ...]:
    share = f"{of.top1_agreement:.1%}"
    return name, str(of.tokens), share, f"{of.kl_mean:.3g}", f"{of.kl_max:.3g}"


def _ulps(ulps: float | None) -> str:
    if ulps is None:
        return "-"
    return f"{ulps:.3g}" if ulps < _FAR else f"> {_FAR:.0e}"


def _cut(lines: Iterable[str], *, verbose: bool) -> list[str]:
    lines = list(lines)
    kept = lines if verbose else lines[:SHOWN]
    return [*kept, *_more(len(lines) - len(kept))]


def _more(count: int) -> list[str]:
    return [f"  and {count} more; --verbose lists them"] if count > 0 else []


def _checked(report: VerifyReport) -> str:
    checked = report.checked
    rows = []
    if "tensors" in checked:
        files = plural(checked["headers"], "header")
        others = plural(checked["files"], "other file")
        read = size(checked["bytes"])
        tensors = plural(checked["tensors"], "tensor")
        rows.append(("by the receipt", f"{tensors}, {files}, {others}, {read}"))
    if "judged" in checked:
        counts = ", ".join(f"{count} {kind}" for kind, count in report.counts().items())
        rows.append(("by the merge", f"{plural(len(report.tensors), 'tensor')}: {counts}"))
    return pairs(rows)
