"""The figures of what survives in a GGUF file, and the page around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.gguf.models import AGAIN, KEPT, Family
from benchmarks.qlora.figures import Measured, every, grouped, over
from benchmarks.qlora.measure import Texts
from benchmarks.shared import page
from benchmarks.shared.figures import Figure, mib, spread
from benchmarks.shared.page import BEGIN, END

KL_LIMIT, SPEED_LIMIT, PEAK_LIMIT = 1 / 20, 10.0, 512 * 2**20


@dataclass(frozen=True)
class Found:
    """Everything that was measured.

    Attributes:
        tables: what became of each base and adapter, a row for each model.
        floors: by type, KL(F16 || type) on the task of the base itself, whose values are the same.
        speeds: as :mod:`benchmarks.gguf.speed` writes them.
        asked: the texts.
    """

    tables: Sequence[tuple[Family, list[Measured]]]
    floors: Mapping[str, float]
    speeds: Sequence[Mapping[str, Any]]
    asked: Texts


def title(family: Family) -> str:
    """Return what a table is headed by."""
    return f"{family.base.type}, {family.training.steps} steps of training"


def table(rows: Sequence[Measured]) -> str:
    """Return a line for each setting: the mean over seeds, and from where to where they reach."""
    lines = [
        "| model | task loss | KL, task | KL, prose | same likeliest token | kept | noise |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, runs in grouped(rows).items():
        name = group + (f", {len(runs)} seeds" if len(runs) > 1 else "")
        cells = [
            over(runs, lambda r: r.loss, "{:.4f}"),
            over(runs, lambda r: r.kl_task, "{:.2g}"),
            over(runs, lambda r: r.kl_prose, "{:.2g}"),
            over(runs, lambda r: r.top, "{:.1%}"),
            over(runs, lambda r: r.survived, "{:.1%}"),
            over(runs, lambda r: r.noise, "{:.2%}"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def divergence_figure(family: Family, rows: Sequence[Measured]) -> Figure:
    """Return the KL of what is kept against that of quantizing again; each seed has to hold."""
    groups = grouped(rows)
    (again,) = groups[AGAIN]
    shares = [row.kl_task / again.kl_task for row in groups[KEPT]]
    name = f"KL on the task's tokens, of that of quantizing again: {title(family)}"
    return every(name, shares, "{:.2g} x", "at most 0.05 x", lambda value: value <= KL_LIMIT)


def speed_figures(found: Mapping[str, Any]) -> list[Figure]:
    """Return how many times as fast as llama.cpp's two programs a merge is, and its memory."""
    mine, peers = found["regraft"], found["llama.cpp"]
    ours = [run["seconds"] for run in mine]
    theirs = [sum(part["seconds"] for part in run) for run in peers]
    value = median(b / a for a, b in zip(ours, theirs, strict=True))
    cpu = median(run["cpu_seconds"] for run in mine)
    their_cpu = median(sum(part["cpu_seconds"] for part in run) for run in peers)
    peak = max(run["peak_bytes"] for run in mine)
    other = max(part["peak_bytes"] for run in peers for part in run)
    what = f"{found['model']}, {found['type']}"
    return [
        Figure(
            f"merge against export-lora and quantize, times faster: {what}", value,
            f"{value:.1f} x", "at least 10 x", value >= SPEED_LIMIT,
            f"{spread(theirs)} against {spread(ours)}; CPU time {their_cpu:.1f} s against "
            f"{cpu:.1f} s; median of the ratios of {len(ours)} pairs",
        ),
        Figure(
            f"peak memory of a merge: {what}", peak, f"{mib(peak)} MiB", "at most 512 MiB",
            peak <= PEAK_LIMIT, f"the largest of {len(mine)} runs; llama.cpp {mib(other)} MiB",
        ),
    ]  # fmt: skip


def section(found: Found, machine: Mapping[str, str], command: str) -> str:
    """Return what goes between the markers of the page."""
    lines, figures = [], []
    for family, rows in found.tables:
        training = family.training
        said = (
            f"Loss {training.first_loss:.3f} to {training.last_loss:.3f}; |delta|/|W| "
            f"{family.relative_delta:.2%}. The base itself, computed from its codes and from the "
            f"same values in F16: a KL of {found.floors[family.base.type]:.2g}."
        )
        lines += [f"## {title(family)}", "", said, "", table(rows), ""]
        figures.append(divergence_figure(family, rows))
    figures += [figure for each in found.speeds for figure in speed_figures(each)]
    task, prose = (sum(len(ids) - at for ids, at in rows) for rows in
                   (found.asked.task, found.asked.prose))  # fmt: skip
    facts = {
        "tokens": f"{task} of {len(found.asked.task)} answers, {prose} of prose in "
        f"{len(found.asked.prose)} passages"
    }
    lines += ["## Targets", "", ""]
    return "\n".join(lines) + page.section(figures, {**facts, **machine}, command)


INTRODUCTION = f"""# What survives in a GGUF file

`make bench-gguf` measures what is left of an adapter when a GGUF file keeps its types.

{BEGIN}
{END}
"""
