"""The measurements: each runs whole processes on files of the shape of Kimi K2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.huge.kimi import Kimi
from benchmarks.shared.models import Model, regraft
from benchmarks.shared.process import Sample, measured
from benchmarks.shared.xfs import free_bytes

RAW_WRITE = Path(__file__).resolve().parents[1] / "shared" / "raw_write.py"

CAPS = {"fp8": "1GiB", "bf16": "512MiB"}
"""What ``--max-memory`` says: the default where that is enough for so many tensors."""


@dataclass(frozen=True)
class Taken:
    """A piece of work, and the bytes of the disk that it took."""

    sample: Sample
    disk: int


@dataclass(frozen=True)
class Measured:
    """What was measured of one format.

    Attributes:
        kimi: the shape.
        tensors, nbytes: how many tensors the base has, and their bytes.
        changed: bytes of the tensors that the adapter changes.
        patch: bytes of the undo's patch.
        plans: dry runs.
        merge, unmerge: the whole, with digests that are known.
        raw: ``changed`` bytes written straight to the same file system.
        digest: one file read and hashed, as it has to be once.
        digest_bytes: its bytes.
    """

    kimi: Kimi
    tensors: int
    nbytes: int
    changed: int
    patch: int
    plans: list[Sample]
    merge: Taken
    unmerge: Taken
    raw: Sample
    digest: Sample
    digest_bytes: int


def measure(place: Path, kimi: Kimi, plans: int, tell: Callable[[str], None]) -> Measured:
    """Lay the model down on a file system that shares blocks, and measure work on it.

    Args:
        place: an empty folder of that file system.
        kimi: the shape and format of the model.
        plans: how many dry runs.
        tell: is told what is done.
    """
    model, out, back = Model(place / "model"), place / "out", place / "back"
    env = {"REGRAFT_CACHE": str(place / "cache")}
    tell(f"laying {kimi.format} down")
    measured(_lay_command(model, kimi), env)
    merge = _merge_command(model, out, kimi)
    tell("plans")
    planned = [measured([*merge, "--dry-run"], env) for _ in range(plans)]
    tell("merge")
    merged = _taken(merge, place, env)
    tell("un-merge")
    cap = ("--max-memory", CAPS[kimi.format])
    undone = _taken(regraft("unmerge", out, "-o", back, "--digest-cache", "-q", *cap), place, env)
    patch = (out / "regraft" / "undo" / "patch.safetensors").stat().st_size
    shutil.rmtree(out)
    shutil.rmtree(back)
    files = kimi.files()
    changed = sum(t.nbytes for tensors in files.values() for t in tensors if t.is_merged)
    tell("a raw write of what changes")
    raw = _raw_write(place, changed)
    tell("digests of one file")
    name = sorted(files)[0] if kimi.layers == 1 else list(files)[1]
    digest = measured(regraft("digest", model.base / name))
    every = [tensor for tensors in files.values() for tensor in tensors]
    return Measured(
        kimi, len(every), sum(tensor.nbytes for tensor in every), changed, patch, planned, merged,
        undone, raw, digest, sum(tensor.nbytes for tensor in files[name]),
    )  # fmt: skip


def _lay_command(model: Model, kimi: Kimi) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.huge.laying", "--out", str(model.folder),
        "--shape", json.dumps(asdict(kimi)), "--known",
    ]  # fmt: skip


def _merge_command(model: Model, out: Path, kimi: Kimi) -> list[str]:
    keep = ("--quantize", "keep") if kimi.format == "fp8" else ()
    cap = ("--max-memory", CAPS[kimi.format])
    return regraft("merge", model.base, model.adapter, "-o", out, *keep, *cap, *MERGE_OPTIONS)


MERGE_OPTIONS = ("--digest-cache", "--reflink", "always", "-q")


def _taken(command: Sequence[str], place: Path, env: dict[str, str]) -> Taken:
    before = free_bytes(place)
    sample = measured(command, env)
    return Taken(sample, before - free_bytes(place))


def _raw_write(place: Path, nbytes: int) -> Sample:
    path = place / "raw"
    free_bytes(place)
    try:
        return measured([sys.executable, str(RAW_WRITE), str(path), str(nbytes)])
    finally:
        path.unlink(missing_ok=True)


def samples_of(found: Measured) -> dict[str, object]:
    """Return every run as JSON-ready objects."""
    runs = {
        "plan": found.plans, "merge": [found.merge.sample], "unmerge": [found.unmerge.sample],
        "raw write": [found.raw], "digest of a file": [found.digest],
    }  # fmt: skip
    return {name: [asdict(sample) for sample in samples] for name, samples in runs.items()}
