"""A comparison as text: totals first, then what differs, then the answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from regraft.cli.text import count, pairs, percent, plural, size, table
from regraft.verifying.diffing.report import (
    ConfigChange,
    DeltaChange,
    DiffReport,
    DiffSide,
    TensorChange,
)

_NOUNS = {"checkpoint": "full model", "adapter": "adapter"}
_CONFIGS = {"checkpoint": "config.json", "adapter": "adapter_config.json"}
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}
_LONGEST_VALUE = 60

_FEW = 1e-4
"""Share of elements below which their number says more than a percentage."""


def render(report: DiffReport, *, limit: int | None) -> str:
    """Return what :func:`regraft.diff` found, as text.

    Args:
        report: what it returned.
        limit: most lines of each list; None for all.
    """
    parts = [
        _overview(report),
        "\n".join(f"note: {note}" for note in report.notes),
        _deltas(report.deltas, limit),
        _tensors(report.changed, limit),
        *_lists(report, limit),
        _answer(report),
    ]
    return "\n\n".join(part for part in parts if part)


# ---- totals


def _overview(report: DiffReport) -> str:
    rows = [
        ("X", _side(report.x, report.kind)),
        ("Y", _side(report.y, report.kind)),
        ("deltas", _delta_counts(report)),
        ("tensors", _tensor_counts(report)),
        ("moved", _moved(report)),
        ("config", "" if _with_config(report) else "not compared: a single file was given"),
        ("layout", "" if report.same_layout else "the tensors are divided among files differently"),
    ]
    return pairs(rows)


def _with_config(report: DiffReport) -> bool:
    return not (report.x.single_file or report.y.single_file)


def _side(side: DiffSide, kind: str) -> str:
    revision = f" at {side.revision}" if side.revision else ""
    held = f"{plural(side.tensors, 'tensor')}, {size(side.bytes)} in {plural(side.files, 'file')}"
    return f"{side.source}{revision}: {_NOUNS[kind]}, {held}"


def _tensor_counts(report: DiffReport) -> str:
    counts = {
        "changed": len(report.changed),
        "only in X": len(report.removed),
        "only in Y": len(report.added),
        "same": report.unchanged,
    }
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "none"


def _delta_counts(report: DiffReport) -> str:
    """Return how many deltas differ, and how far they are apart, taken together."""
    if not (report.deltas or report.same_deltas):
        return ""
    counts = {"changed": len(report.deltas), "same": report.same_deltas}
    told = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    if report.relative_delta is None:
        return told
    return f"{told}; |Y-X|/|X| {_relative(report.relative_delta)}, over the changed deltas"


def _moved(report: DiffReport) -> str:
    """Return how far the changed tensors moved, taken together."""
    measured = [t for t in report.changed if t.delta_norm is not None]
    if not measured:
        return ""
    elements = sum(tensor.elements for tensor in measured)
    changed = sum(tensor.changed or 0 for tensor in measured)
    differ = f"{_share(changed, elements)} of {count(elements)} elements differ"
    return f"|Y-X|/|X| {_relative(report.relative)}, {differ}, over the changed tensors"


def _share(changed: int, elements: int) -> str:
    """Return a percentage, or the number itself of very few elements."""
    share = changed / elements if elements else 0.0
    return str(changed) if 0 < share < _FEW else percent(share)


# ---- deltas


def _deltas(changed: Sequence[DeltaChange], limit: int | None) -> str:
    """Return a table of the modules whose deltas differ, those farthest apart first."""
    if not changed:
        return ""
    rows: list[tuple[str, ...]] = [("deltas", "|Y-X|/|X|", "cosine", "rank", "scale", "")]
    rows += [
        (
            delta.name,
            _relative(delta.relative),
            "-" if delta.cosine is None else f"{delta.cosine:.4f}",
            _both(delta.ranks),
            _both(delta.scales),
            _delta_notes(delta),
        )
        for delta in changed[:limit]
    ]
    return _with_rest(table(rows, "lrrrrl").splitlines(), len(changed), limit)


def _both(values: tuple[float | str | None, float | str | None]) -> str:
    """Return what a field is in X and in Y, once if it is the same."""
    shown = [f"{v:g}" if isinstance(v, int | float) else v or "-" for v in values]
    return shown[0] if shown[0] == shown[1] else " -> ".join(shown)


def _delta_notes(delta: DeltaChange) -> str:
    if None in delta.ranks:
        return "only in Y" if delta.ranks[0] is None else "only in X"
    notes = [_both(delta.dtypes)] if delta.dtypes[0] != delta.dtypes[1] else []
    if delta.sizes[0] != delta.sizes[1]:
        notes.append(" -> ".join(_shape(sizes or ()) for sizes in delta.sizes))
    elif delta.delta_norm is None:
        notes.append("NaN, infinite or too large")
    return ", ".join(notes)


# ---- tensors


def _tensors(changed: Sequence[TensorChange], limit: int | None) -> str:
    """Return a table of the changed tensors, those that moved most first."""
    if not changed:
        return ""
    ordered = sorted(changed, key=_distance, reverse=True)
    rows: list[tuple[str, ...]] = [("changed", "|Y-X|/|X|", "elements", "largest", "ulps", "")]
    rows += [_row(tensor) for tensor in ordered[:limit]]
    return _with_rest(table(rows, "lrrrrl").splitlines(), len(ordered), limit)


def _distance(tensor: TensorChange) -> float:
    """Return what to sort by: tensors that could not be measured come first."""
    return math.inf if tensor.relative is None else tensor.relative


def _row(tensor: TensorChange) -> tuple[str, ...]:
    return (
        tensor.name,
        _relative(tensor.relative),
        "-" if tensor.changed is None else _share(tensor.changed, tensor.elements),
        "-" if tensor.largest is None else f"{tensor.largest:.3g}",
        "-" if tensor.ulps is None else str(tensor.ulps),
        _notes(tensor),
    )


def _relative(value: float | None) -> str:
    return "inf" if value == math.inf else percent(value)


def _notes(tensor: TensorChange) -> str:
    """Return what is to be said beside the figures."""
    notes = []
    if tensor.dtypes[0] != tensor.dtypes[1]:
        notes.append(" -> ".join(tensor.dtypes))
    if tensor.shapes[0] != tensor.shapes[1]:
        notes.append(" -> ".join(map(_shape, tensor.shapes)))
    if tensor.not_finite:
        notes.append(f"{tensor.not_finite} NaN or infinite")
    return ", ".join(notes)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


# ---- lists


def _lists(report: DiffReport, limit: int | None) -> list[str]:
    """Return a block for each kind of thing that is on one side only, or differs as a whole."""
    blocks = [
        ("only in X", [f"{t.name}  {t.dtype}  {_shape(t.shape)}" for t in report.removed]),
        ("only in Y", [f"{t.name}  {t.dtype}  {_shape(t.shape)}" for t in report.added]),
        (_CONFIGS[report.kind], [_config_line(change) for change in report.config]),
        ("other files", [f"{_SIGNS[f.change]} {f.name}" for f in report.files]),
    ]
    return [
        _with_rest([title, *(f"  {line}" for line in lines[:limit])], len(lines), limit)
        for title, lines in blocks
        if lines
    ]


def _config_line(change: ConfigChange) -> str:
    values = {
        "added": [change.y],
        "removed": [change.x],
        "changed": [change.x, change.y],
    }
    shown = " -> ".join(map(_value, values[change.change]))
    return f"{_SIGNS[change.change]} {change.key}: {shown}"


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _with_rest(lines: list[str], total: int, limit: int | None) -> str:
    """Return lines, and one more that counts what ``limit`` left out."""
    rest = 0 if limit is None else max(0, total - limit)
    return "\n".join([*lines, f"  ... and {rest} more, --all for all"] if rest else lines)


# ---- the answer


def _answer(report: DiffReport) -> str:
    files = _some(len(report.files), "other file differs", "other files differ")
    told = f"; {files}" if files else ""
    if report.same:
        config = ", and the config" if _with_config(report) else ""
        deltas = f"{plural(report.same_deltas, 'delta')}, " if report.same_deltas else ""
        return f"same: {deltas}{plural(report.unchanged, 'tensor')}{config}{told}"
    found = [
        _some(len(report.deltas), "delta differs", "deltas differ"),
        _some(len(report.changed), "tensor changed", "tensors changed"),
        _some(len(report.removed), "tensor only in X", "tensors only in X"),
        _some(len(report.added), "tensor only in Y", "tensors only in Y"),
        _some(len(report.config), "config key differs", "config keys differ"),
    ]
    return f"different: {', '.join(filter(None, found))}{told}"


def _some(number: int, one: str, several: str) -> str:
    """Return ``"1 tensor changed"`` or ``"2 tensors changed"``; nothing for none."""
    return f"{number} {one if number == 1 else several}" if number else ""
