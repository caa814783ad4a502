"""A plan as text: every tensor, or tensors that differ only in their numbers as one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from regraft.cli.text import count, memory, pairs, plural, ranges, size, table
from regraft.cli.texts.receipt import actions

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A whole number between dots: a layer or an expert."""

Step = Mapping[str, Any]


def render(plan: Mapping[str, Any], *, verbose: bool) -> str:
    """Return the plan, as :meth:`Plan.to_json` gives it, as text.

    Args:
        plan: the JSON form of the plan.
        verbose: one line per tensor, not one per pattern.
    """
    parts = [_steps(plan["steps"], verbose=verbose), _shards(plan["shards"]), _overview(plan)]
    return "\n\n".join(part for part in parts if part)


def _steps(steps: list[Step], *, verbose: bool) -> str:
    rows = [("tensor", "action", "with x scale", "dtype", "shape", "bytes in all", "")]
    groups = [[step] for step in steps] if verbose else group(steps)
    return table(rows + [_row(members) for members in groups], "lllllrl")


def group(steps: Iterable[Step]) -> list[list[Step]]:
    """Return steps that differ only in the numbers of their names together, in first-seen order."""
    groups: dict[tuple[object, ...], list[Step]] = {}
    for step in steps:
        groups.setdefault(_likeness(step), []).append(step)
    return list(groups.values())


def _likeness(step: Step) -> tuple[object, ...]:
    name = _NUMBER.sub("#", step["name"])
    same = [tuple(step[key]) for key in ("features", "scales", "shape")]
    return (name, step["action"], step["dtype"], *same)


def _row(members: list[Step]) -> tuple[str, ...]:
    first = members[0]
    nbytes = sum(step["bytes"] for step in members)
    name, times = pattern([step["name"] for step in members])
    shape = "x".join(map(str, first["shape"])) or "scalar"
    return (name, first["action"], _applied(first), first["dtype"], shape, size(nbytes), times)


def _applied(step: Step) -> str:
    """Return what is applied: ``"lora x 2"``, or nothing for a copy."""
    scales = " ".join(f"x {scale:.4g}" for scale in step["scales"])
    return " ".join(filter(None, [", ".join(step["features"]), scales]))


def pattern(names: list[str]) -> tuple[str, str]:
    """Return names that differ only in numbers as one, and how many there are.

    ``["h.0.w", "h.1.w"]`` gives ``("h.{0..1}.w", "x2")``. Where not every combination of the
    numbers occurs, the count says out of how many: ``"x3 of 4"``.
    """
    if len(names) == 1:
        return names[0], ""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    seen = [sorted(set(column)) for column in columns]
    shown = iter(str(s[0]) if len(s) == 1 else f"{{{ranges(s)}}}" for s in seen)
    combinations = math.prod(map(len, seen))
    times = f"x{len(names)}" + ("" if combinations == len(names) else f" of {combinations}")
    return _NUMBER.sub(lambda _: next(shown), names[0]), times


def _shards(shards: list[Mapping[str, Any]]) -> str:
    rows = [("file", "tensors", "bytes")]
    rows += [(str(s["name"]), str(_number(s["tensors"])), size(s["bytes"])) for s in shards]
    return table(rows, "lrr")


def _number(tensors: Any) -> int:
    return tensors if isinstance(tensors, int) else len(tensors)


def _overview(plan: Mapping[str, Any]) -> str:
    totals, disk = plan["totals"], plan["disk"]
    written = f"{size(totals['bytes_written'])} in {plural(len(plan['shards']), 'file')}"
    rows = [
        ("quantized", ", ".join(plan["quantized"])),
        ("tensors", actions(totals)),
        ("size", f"{count(totals['parameters'])} parameters, {written}"),
        ("read", size(totals["bytes_read"])),
        ("memory", f"{memory(plan['memory'])} at most"),
        ("disk", f"{size(disk['needed'])} needed, {size(disk['free'])} free" if disk else ""),
        ("out", str(plan.get("out") or "")),
    ]
    return pairs(rows) + "\n\nNothing was written: this is a dry run."
