"""The models that what survives of a QLoRA adapter is measured on: each a checkpoint folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regraft
from benchmarks.quantized import bitsandbytes_quantize as peer
from regraft.demo.progress import silent
from regraft.demo.settings import Settings
from regraft.demo.state import DemoFolder
from regraft.demo.steps.data import as_fields
from regraft.demo.steps.lessons import Lesson
from regraft.demo.steps.model import Base, get_base
from regraft.demo.steps.training import get_adapter
from regraft.demo.telling.result import Training

FRESH = "dequantize, merge, quantize again (bitsandbytes)"
KEEP = "`--quantize keep` (stochastic)"
NF4_STOCHASTIC = "`--quantize nf4 --rounding stochastic`"


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        steps: of training, four sentences each.
        seeds: of stochastic rounding, each a model of its own.
        sentences: held out; 36 have every name, city and job three times.
    """

    steps: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    sentences: int = 36

    @property
    def training(self) -> Settings:
        """The settings of the demo's training."""
        return Settings(self.steps, batch=4, learning_rate=1e-3, rank=8, alpha=16, seed=0)


@dataclass(frozen=True)
class Candidate:
    """A model that stands for the base with the adapter, more or less.

    Attributes:
        group: what it is a run of; seeds of the same setting share it.
        folder: the checkpoint.
        survived, noise: of its receipt; None where there is none.
        undo_bytes: size of its undo patch; None where there is none.
    """

    group: str
    folder: Path
    survived: float | None = None
    noise: float | None = None
    undo_bytes: int | None = None


@dataclass(frozen=True)
class Family:
    """A base, an adapter that was trained on it, and what became of the two.

    Attributes:
        title: what it is about.
        base: the base as plain weights: the model without the adapter.
        exact: the merge in float32.
        nearest: the group that the others are compared with.
        training: what training came to.
        relative_delta: |delta| over |W|.
        candidates: the models in 4 bits.
    """

    title: str
    base: Path
    exact: Path
    nearest: str
    training: Training
    relative_delta: float
    candidates: tuple[Candidate, ...]


def smollm2(work: Path) -> Base:
    """Return SmolLM2-135M-Instruct, in bfloat16."""
    folder = DemoFolder(work / "smollm2")
    folder.open()
    return get_base(folder, None, fresh=False)


def trained(base: Path, source: str, work: Path, sizes: Sizes) -> tuple[Path, Training]:
    """Return an adapter trained on a plain base, on the demo's task."""
    folder = DemoFolder(work)
    folder.open()
    there = Base(base, source, 0.0, kept=False)
    lesson = Lesson("fields", as_fields, sizes.training)
    training = get_adapter(folder, there, lesson, silent, fresh=False)
    return folder.adapter(lesson.name), training


def on_four_bits(base: Path, work: Path, sizes: Sizes) -> Family:
    """Return merges into NF4 of an adapter that was trained on the NF4 model: QLoRA."""
    four, plain, exact = work / "nf4", work / "nf4-plain", work / "exact"
    regraft.quantize(base, four, "nf4", overwrite=True)
    regraft.dequantize(four, plain, overwrite=True)
    adapter, training = trained(plain, "SmolLM2 in NF4", work / "trained-on-nf4", sizes)
    receipt = regraft.merge(four, adapter, exact, dtype="float32", overwrite=True)
    stochastic = [
        _merged(four, adapter, work / f"keep-{seed}", KEEP, "keep", None, seed)
        for seed in sizes.seeds
    ]
    candidates = [
        _fresh_nearest(four, adapter, work / "fresh"),
        _merged(four, adapter, work / "keep-nearest", "`--quantize keep --rounding nearest`",
                "keep", "nearest", 0),
        *stochastic,
    ]  # fmt: skip
    return Family("An adapter trained on the NF4 model (QLoRA)", plain, exact, FRESH, training,
                  receipt.totals.relative_delta, tuple(candidates))  # fmt: skip


def on_sixteen_bits(base: Path, work: Path, sizes: Sizes) -> Family:
    """Return merges into NF4 of an adapter that was trained on the 16-bit model."""
    exact = work / "exact-16"
    adapter, training = trained(base, "SmolLM2 in bfloat16", work / "trained-on-16", sizes)
    receipt = regraft.merge(base, adapter, exact, dtype="float32", overwrite=True)
    nearest = "`--quantize nf4`"
    candidates = [_merged(base, adapter, work / "nf4-nearest", nearest, "nf4", None, 0)]
    candidates += [
        _merged(base, adapter, work / f"nf4-{seed}", NF4_STOCHASTIC, "nf4", "stochastic", seed)
        for seed in sizes.seeds
    ]  # fmt: skip
    return Family("An adapter trained on the 16-bit model, merged and put into NF4", base, exact,
                  nearest, training, receipt.totals.relative_delta, tuple(candidates))  # fmt: skip


def _merged(
    base: Path, adapter: Path, out: Path, group: str, quantize: str, rounding: str | None, seed: int
) -> Candidate:
    receipt = regraft.merge(
        base, adapter, out, quantize=quantize, rounding=rounding, seed=seed, overwrite=True
    )
    totals = receipt.totals
    return Candidate(group, out, totals.survived, totals.noise, totals.undo_bytes or None)


def _fresh_nearest(four: Path, adapter: Path, out: Path) -> Candidate:
    """Merge as one does without regraft: the plain merge is quantized by bitsandbytes anew."""
    merged = out.with_name(f"{out.name}-plain")
    regraft.merge(four, adapter, merged, overwrite=True, undo=False)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    quantizer = peer.Quantizer(double_quant=False)
    for path in sorted(merged.glob("*.safetensors")):
        peer.convert(path, out, quantizer)
    _copy_config(four, out)
    return Candidate(FRESH, out)


def _copy_config(four: Path, out: Path) -> None:
    """Give a checkpoint of the same names and sizes the config of another."""
    config: dict[str, Any] = json.loads((four / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config))
