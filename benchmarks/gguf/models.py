"""The models that what survives in a GGUF file is measured on: each one file."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import regraft
from benchmarks.gguf.names import THREADS, TYPES
from benchmarks.qlora.models import Sizes as Training
from benchmarks.qlora.models import smollm2, trained
from benchmarks.shared.running import say
from regraft.demo.telling.result import Training as Trained

EXACT = "merged, F16"
WIDE = "merged, F32"
BASE = "no adapter"
AGAIN = "merged in F16, quantized again (`llama-quantize`)"
KEPT = "kept (stochastic)"
NEAREST = "kept, `--rounding nearest`"


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        steps: of training, four sentences each; an adapter for each number.
        seeds: of stochastic rounding, each a model of its own.
        sentences: held out.
    """

    steps: tuple[int, ...] = (40,)
    seeds: tuple[int, ...] = (0, 1, 2)
    sentences: int = 36


@dataclass(frozen=True)
class Candidate:
    """A model that stands for the base with the adapter, more or less.

    Attributes:
        group: what it is a run of; seeds of the same setting share it.
        path: the GGUF file.
        survived, noise: of its receipt; None where there is none.
    """

    group: str
    path: Path
    survived: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Base:
    """A model in GGUF.

    Attributes:
        type: what llama-quantize was told.
        path: the file.
        plain: what its codes stand for, a checkpoint in float32 with a tokenizer.
        values: the same in GGUF, F16.
    """

    type: str
    path: Path
    plain: Path
    values: Path


@dataclass(frozen=True)
class Family:
    """A base, an adapter that was trained on it, and what became of the two.

    Attributes:
        base: the base.
        adapter: the adapter's folder.
        training: what training came to.
        relative_delta: |delta| over |W|.
        candidates: the models, first the one that the others should be like.
    """

    base: Base
    adapter: Path
    training: Trained
    relative_delta: float
    candidates: tuple[Candidate, ...]


def tool(tools: Path, name: str, *arguments: str | Path) -> None:
    """Run one of llama.cpp's programs.

    Raises:
        CalledProcessError: it ended with an error.
    """
    command = [str(tools / name), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bases(work: Path, tools: Path) -> list[Base]:
    """Return SmolLM2-135M-Instruct in each type, as llama.cpp quantizes it."""
    folder = smollm2(work).path
    plain = work / "f16.gguf"
    if not plain.exists():
        regraft.export(folder, plain, type="f16")
    return [_made(base_in(kind, work), folder, plain, tools) for kind in TYPES]


def base_in(kind: str, work: Path) -> Base:
    """Return where a base of a type is."""
    return Base(kind, work / f"{kind}.gguf", work / f"{kind}-plain", work / f"{kind}-f16.gguf")


def _made(found: Base, folder: Path, plain: Path, tools: Path) -> Base:
    say(f"the base in {found.type}")
    if not found.values.exists():
        tool(tools, "llama-quantize", plain, found.path, found.type, THREADS)
        regraft.dequantize(found.path, found.plain, dtype="float32", overwrite=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (folder / name).exists():
                shutil.copy(folder / name, found.plain)
        regraft.export(found.plain, found.values, type="f16", overwrite=True)
    return found


def family(base: Base, steps: int, work: Path, tools: Path, sizes: Sizes) -> Family:
    """Return the merges of an adapter that was trained on what a base's codes stand for."""
    name = f"{base.type}-{steps}"
    say(f"{base.type}, {steps} steps of training")
    source = f"SmolLM2 in {base.type}"
    adapter, training = trained(base.plain, source, work / name, Training(steps=steps))
    exact, again = work / f"{name}-exact.gguf", work / f"{name}-again.gguf"
    receipt = regraft.merge(base.path, adapter, exact, dtype="f16", overwrite=True)
    wide = work / f"{name}-wide.gguf"
    regraft.merge(base.path, adapter, wide, dtype="f32", overwrite=True)
    tool(tools, "llama-quantize", exact, again, base.type, THREADS)
    kept = [
        _kept(base, adapter, work / f"{name}-kept-{seed}.gguf", KEPT, None, seed)
        for seed in sizes.seeds
    ]
    nearest = _kept(base, adapter, work / f"{name}-nearest.gguf", NEAREST, "nearest", 0)
    return Family(base, adapter, training, receipt.totals.relative_delta, (
        Candidate(EXACT, exact), Candidate(WIDE, wide), Candidate(BASE, base.path),
        Candidate(AGAIN, again), nearest, *kept,
    ))  # fmt: skip


def _kept(
    base: Base, adapter: Path, out: Path, group: str, rounding: str | None, seed: int
) -> Candidate:
    receipt = regraft.merge(base.path, adapter, out, rounding=rounding, seed=seed, overwrite=True)
    return Candidate(group, out, receipt.totals.survived, receipt.totals.noise)
