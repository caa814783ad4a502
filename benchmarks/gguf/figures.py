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

`make bench-gguf` measures what is left of an adapter when a GGUF file keeps its types ([how
to](how-to-quantized.md#one-gguf-file)), and how long the merge takes. The model is
SmolLM2-135M-Instruct, put into Q4_0 and Q4_K_M by `llama-quantize`. (Rows of 576 are no whole
number of K-quants' blocks, so in Q4_K_M most matrices are Q5_0, some Q8_0, and those of 1536 Q4_K
and Q6_K.) The adapters are LoRA of rank 8, alpha 16, on all linear layers, trained for 40 steps
of 4 sentences of [the demo's task](../src/regraft/demo/steps/data.py), learning rate 1e-3. They
are trained on the values that the codes stand for (`regraft dequantize`), in float32.

- **Everything is evaluated in llama.cpp**, on the CPU, by a [small
  program](../benchmarks/gguf/logits.cpp) on its library. A matrix in codes is multiplied there by
  activations that are rounded to 8 bits. What this alone does to the predictions of the base,
  which are less sure than those of a trained model, is said above each table.
- **Merged, F16** is `regraft merge BASE.gguf ADAPTER -o OUT.gguf --dtype f16`, which the others
  should be like; the same in F32 shows what F16 costs.
- **Quantized again**: that file, put into the base's type by `llama-quantize`. It is what one
  does without regraft.
- **Kept** is `regraft merge BASE.gguf ADAPTER -o OUT.gguf`: scales stay, codes are rounded
  stochastically.
- **Task loss** is the mean cross entropy of the answers' tokens to held-out sentences, which
  share no name, city or job with those of the training. **KL** is KL(merged, F16 || model), the
  mean over tokens, in nats, on those same tokens (task) and on [English
  prose](../benchmarks/qlora/general_text.txt) that has nothing to do with the task.
- **Kept of the delta** and **noise** are the receipt's `survived` and `noise`.
- **Speed**: `regraft merge` against `llama-export-lora` (into F16) and then `llama-quantize`,
  both with 2 threads, in turns; whole processes, inputs in memory. The larger model has the shape
  of SmolLM2-1.7B with half of its layers, random weights and a random adapter of rank 16.

llama.cpp is built from source by `python -m benchmarks.gguf.build FOLDER`: its library with
cmake, and `quantize.cpp` and `export-lora.cpp` as they are, but for the command line, whose
parser is [a short one](../benchmarks/gguf/command_line.cpp).

{BEGIN}
{END}
"""
