"""The figures of what survives of an adapter, and the page around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from benchmarks.qlora.measure import Seen, Texts, divergence
from benchmarks.qlora.models import FRESH, KEEP, Family
from benchmarks.shared import page
from benchmarks.shared.figures import Figure
from benchmarks.shared.page import BEGIN, END

KL_LIMIT = 0.01
LOSS_LIMIT = 0.01
AGREEMENT_LIMIT = 2.0


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        group: the setting that it is a run of.
        loss: held-out task loss, nats per token of the answers.
        kl_task, kl_prose: KL(exact || model), nats per token.
        top: share of the task's tokens whose likeliest token is that of the exact merge.
        survived, noise: as a receipt has them; None for models in plain values.
        undo_bytes: size of the undo patch; None without one.
        undo_share: of the bytes of the model's weight files.
    """

    group: str
    loss: float
    kl_task: float
    kl_prose: float
    top: float
    survived: float | None = None
    noise: float | None = None
    undo_bytes: int | None = None
    undo_share: float | None = None

    def with_receipt(
        self, survived: float | None, noise: float | None, undo_bytes: int | None,
        undo_share: float | None,
    ) -> Measured:  # fmt: skip
        """Return it with what a receipt tells."""
        return replace(
            self, survived=survived, noise=noise, undo_bytes=undo_bytes, undo_share=undo_share
        )


@dataclass(frozen=True)
class Agreement:
    """How far logits are from those of the same values in float32, over their standard deviation.

    Attributes:
        theirs: computed by bitsandbytes from codes, in bfloat16.
        plain: computed from plain weights, in bfloat16.
    """

    theirs: float
    plain: float


@dataclass(frozen=True)
class Found:
    """Everything that was measured."""

    tables: Sequence[tuple[Family, list[Measured]]]
    agreement: Agreement
    asked: Texts


def measured(group: str, seen: Seen, exact: Seen) -> Measured:
    """Compare a model with the exact merge."""
    same = seen.task.logits.argmax(-1) == exact.task.logits.argmax(-1)
    return Measured(
        group, seen.task.loss, divergence(exact.task, seen.task),
        divergence(exact.prose, seen.prose), float(same.double().mean()),
    )  # fmt: skip


def agreement(exact: Seen, plain: Seen, theirs: Seen) -> Agreement:
    """Return how far the same model computed in two ways in bfloat16 is from float32."""

    def away(other: Seen) -> float:
        wanted = exact.task.logits
        return float((other.task.logits - wanted).square().mean().sqrt() / wanted.std())

    return Agreement(away(theirs), away(plain))


def grouped(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def table(rows: Sequence[Measured]) -> str:
    """Return a line for each setting: the mean over seeds, and from where to where they reach."""
    exact = rows[0].loss
    lines = [
        (
            "| model | task loss | against the exact merge's | KL, task | KL, prose "
            "| same likeliest token | kept of the delta | noise | undo patch |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group, runs in grouped(rows).items():
        name = group + (f", {len(runs)} seeds" if len(runs) > 1 else "")
        cells = [
            over(runs, lambda r: r.loss, "{:.4f}"),
            over(runs, lambda r: r.loss - exact, "{:+.4f}"),
            over(runs, lambda r: r.kl_task, "{:.2g}"),
            over(runs, lambda r: r.kl_prose, "{:.2g}"),
            over(runs, lambda r: r.top, "{:.1%}"),
            over(runs, lambda r: r.survived, "{:.1%}"),
            over(runs, lambda r: r.noise, "{:.2%}"),
            _patch(runs),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over(runs: Sequence[Measured], of: Callable[[Measured], float | None], form: str) -> str:
    values = [value for run in runs if (value := of(run)) is not None]
    if not values:
        return "-"
    return _range(values, form)


def _range(values: Sequence[float], form: str) -> str:
    middle = form.format(mean(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def _patch(runs: Sequence[Measured]) -> str:
    sizes = [(r.undo_bytes, r.undo_share) for r in runs if r.undo_bytes and r.undo_share]
    if not sizes:
        return "-"
    return f"{mean(s for s, _ in sizes) / 1e6:.2f} MB, {mean(s for _, s in sizes):.2%}"


def target_figures(rows: Sequence[Measured]) -> list[Figure]:
    """Return the targets of the stochastic merge; each has to be kept by every seed."""
    groups = grouped(rows)
    exact, (fresh,), ours = rows[0], groups[FRESH], groups[KEEP]
    task = [row.kl_task / fresh.kl_task for row in ours]
    losses = [row.loss - exact.loss for row in ours]
    prose = [row.kl_prose / fresh.kl_prose for row in ours]
    return [
        every("KL on the task's tokens, of nearest's", task, "{:.2g} x", "at most 0.01 x",
               lambda value: value <= KL_LIMIT),
        every("task loss, less the exact merge's", losses, "{:+.4f}", "within 0.01",
               lambda value: abs(value) <= LOSS_LIMIT),
        every("KL on prose, of nearest's", prose, "{:.2g} x", "below 1 x",
               lambda value: value < 1),
    ]  # fmt: skip


def every(
    name: str, values: Sequence[float], form: str, target: str, keeps: Callable[[float], bool]
) -> Figure:
    count = sum(map(keeps, values))
    detail = f"by seed: {', '.join(form.format(value) for value in values)}; kept by {count}"
    return Figure(name, mean(values), _range(values, form), target, count == len(values), detail)


def agreement_figure(agreed: Agreement) -> Figure:
    """Return whether bitsandbytes' own forward pass is that of the values, to bf16 rounding."""
    value = agreed.theirs / agreed.plain
    detail = (
        f"{agreed.theirs:.2%} of the logits' standard deviation from float32, plain bfloat16 "
        f"weights {agreed.plain:.2%}"
    )
    return Figure(
        "logits by bitsandbytes in bfloat16, distance from float32 against plain bfloat16's",
        value, f"{value:.2f} x", "at most 2 x", value <= AGREEMENT_LIMIT, detail,
    )  # fmt: skip


def section(found: Found, machine: Mapping[str, str], command: str) -> str:
    """Return what goes between the markers of the page."""
    lines = []
    for family, rows in found.tables:
        training = family.training
        said = (
            f"Training: {training.steps} steps, loss {training.first_loss:.3f} to "
            f"{training.last_loss:.3f}; |delta|/|W| {family.relative_delta:.2%}."
        )
        lines += [f"## {family.title}", "", said, "", table(rows), ""]
    task, prose = (sum(len(ids) - at for ids, at in rows) for rows in
                   (found.asked.task, found.asked.prose))  # fmt: skip
    figures = [*target_figures(found.tables[0][1]), agreement_figure(found.agreement)]
    facts = {
        "tokens": f"{task} of {len(found.asked.task)} answers, {prose} of prose in "
        f"{len(found.asked.prose)} passages"
    }
    lines += ["## Targets", "", "Of `--quantize keep`, into the NF4 model.", "", ""]
    return "\n".join(lines) + page.section(figures, {**facts, **machine}, command)


INTRODUCTION = f"""# What survives of a QLoRA adapter

`make bench-qlora` measures what is left of an adapter when the merged model is to stay in 4 bits.
The model is SmolLM2-135M-Instruct, put into NF4 by `regraft quantize`. The adapters are made by
PEFT: LoRA of rank 8, alpha 16, on all linear layers, 40 steps of 4 sentences of
[the demo's task](../src/regraft/demo/steps/data.py), learning rate 1e-3. QLoRA's is trained on the
values that the NF4 codes stand for (`regraft dequantize`), in float32.

- **The exact merge** is `regraft merge ... --dtype float32`: codes as values, plus the delta. It is
  what the others should be like.
- **Dequantize, merge, quantize again** is what one does without regraft: bitsandbytes'
  `quantize_4bit` makes new codes and new scales, each value going to the nearest level. Most of a
  delta is smaller than half a step, so most of the model falls back to the codes it had.
- **`--quantize keep`** keeps the base's scales and rounds stochastically: a value goes to one of
  the two levels around it, with the chance that makes the mean right. It keeps the delta and pays
  in noise.
- **Task loss** is the mean cross entropy of the answers' tokens to held-out sentences, which share
  no name, city or job with those of the training. **KL** is KL(exact merge || model), the mean over
  tokens, in nats, on those same tokens (task) and on
  [English prose](../benchmarks/qlora/general_text.txt) that has nothing to do with the task.
- **Kept of the delta** and **noise** are the receipt's `survived`, <Q - W, delta> / <delta, delta>,
  and `noise`, |Q - W - delta| / |W|; for bitsandbytes the same from its values. Where a 16-bit base
  is put into NF4, the noise is mostly that of quantizing at all.
- Every 4-bit model is loaded with `from_pretrained`, which must use all of it. What is evaluated
  are its values in float32 (`regraft dequantize`); that bitsandbytes' own forward pass agrees is
  checked on one of them.

{BEGIN}
{END}
"""
