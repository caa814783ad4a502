"""The measurements: each runs whole processes and returns their samples."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.models import Model, make_model, merge_command, once, regraft, remove
from benchmarks.shared.process import Sample, measured

HERE = Path(__file__).resolve().parent


COPY = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
"""Copy and flush: ``sync FILE...`` calls fsync on just these files, and on the folder."""


@dataclass(frozen=True)
class Pairs:
    """Copies and merges of the same base, taken in turns."""

    copies: list[Sample]
    merges: list[Sample]


@dataclass(frozen=True)
class Undos:
    """Merges without and with an undo patch and un-merges of the same model, taken in turns.

    Attributes:
        plains, merges, unmerges: the samples.
        patch_bytes: size of the patch.
        model_bytes: size of the base's tensors.
        relative_delta: |delta| over |W|.
    """

    plains: list[Sample]
    merges: list[Sample]
    unmerges: list[Sample]
    patch_bytes: int
    model_bytes: int
    relative_delta: float


def copy_command(model: Model, out: Path) -> list[str]:
    return ["sh", "-c", COPY, "sh", str(model.base), str(out)]


def measure_pairs(model: Model, work: Path, count: int) -> Pairs:
    """Measure copies and merges in turns; which of the two goes first alternates, too."""
    out = work / "out"
    copy, merge = copy_command(model, out), merge_command(model, out)
    pairs = Pairs([], [])
    for number in range(count):
        jobs = [(copy, pairs.copies), (merge, pairs.merges)]
        for command, samples in jobs if number % 2 == 0 else reversed(jobs):
            samples.append(once(command, model, out))
    return pairs


def measure_undos(model: Model, work: Path, count: int) -> Undos:
    """Measure merges without and with an undo patch, and un-merges; the order rotates."""
    out, merged = work / "out", work / "merged"
    remove(merged)
    measured(merge_command(model, merged))
    totals = json.loads((merged / "regraft" / "receipt.json").read_text())["totals"]
    sizes = (totals["undo_bytes"], totals["bytes_written"], totals["relative_delta"])
    undos = Undos([], [], [], *sizes)
    jobs = [
        ([*merge_command(model, out), "--no-undo"], model, undos.plains),
        (merge_command(model, out), model, undos.merges),
        (regraft("unmerge", merged, "-o", out), Model(merged), undos.unmerges),
    ]
    try:
        for number in range(count):
            for command, source, samples in jobs[number % 3 :] + jobs[: number % 3]:
                samples.append(once(command, source, out))
    finally:
        remove(merged)
    return undos


def measure_peft(model: Model, work: Path, count: int) -> list[Sample]:
    """Measure PEFT's merge."""
    script, out = str(HERE / "peft_merge.py"), work / "out"
    command = [sys.executable, script, str(model.base), str(model.adapter), str(out)]
    return [once(command, model, out, {"HF_HUB_OFFLINE": "1"}) for _ in range(count)]


def measure_large(work: Path, scale: int) -> Sample:
    """Measure one merge of a model with ``scale`` times the layers, and remove the model."""
    model = make_model(work / f"scale{scale}", "--scale", str(scale))
    try:
        return once(merge_command(model, work / "out"), model, work / "out")
    finally:
        remove(model.folder)


def measure_help(count: int) -> list[Sample]:
    """Measure ``regraft --help``, once more than counted, so that the files are in memory."""
    return [measured(regraft("--help")) for _ in range(count + 1)][1:]


def measure_tiny(work: Path, count: int) -> list[Sample]:
    """Measure a merge so small that only start-up is left."""
    model = make_model(work / "tiny", "--shape", "tiny")
    out = work / "out"
    return [once(merge_command(model, out), model, out) for _ in range(count + 1)][1:]


def warm_up(work: Path) -> None:
    """Do once what is compiled when it is done first, for the processor that is compiled for."""
    model = make_model(work / "tiny", "--shape", "tiny")
    out, back = work / "out", work / "back"
    for command in (merge_command(model, out), regraft("unmerge", out, "-o", back)):
        measured(command)
    remove(out)
    remove(back)


def measure_compile(work: Path, count: int) -> list[tuple[Sample, Sample]]:
    """Measure (first, second) run of the tiny merge with an empty cache of compiled code."""
    model = make_model(work / "tiny", "--shape", "tiny")
    return [_first_and_second(model, work) for _ in range(count)]


def _first_and_second(model: Model, work: Path) -> tuple[Sample, Sample]:
    out, cache = work / "out", work / "numba"
    remove(cache)
    env = {"NUMBA_CACHE_DIR": str(cache)}
    try:
        first = once(merge_command(model, out), model, out, env)
        return first, once(merge_command(model, out), model, out, env)
    finally:
        remove(cache)


def measure_check(work: Path, count: int) -> list[Sample]:
    """Measure ``regraft check`` on the headers of a 70B model in some 30 files."""
    model = make_model(work / "70b", "--shape", "llama-70b", "--headers", "30")
    command = regraft("check", model.base, model.adapter)
    return [measured(command) for _ in range(count + 1)][1:]


def measure_undo_speed(work: Path, *, small: bool) -> dict[str, dict[str, list[float]]]:
    """Measure merges of several kinds and their way back in memory: nanoseconds an element."""
    out = work / "undo_speed.json"
    options = ["--small"] if small else []
    measured([sys.executable, str(HERE / "undo_speed.py"), str(out), *options])
    found: dict[str, dict[str, list[float]]] = json.loads(out.read_text())
    out.unlink()
    return found
