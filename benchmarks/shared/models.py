"""Models on the disk, made for a measurement, and a command measured on one of them."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.process import Sample, measured

HERE = Path(__file__).resolve().parent


RESERVE_BYTES = 2 * 10**9
"""Left free on the disk, whatever a measurement writes."""


@dataclass(frozen=True)
class Model:
    """A base and an adapter on the disk."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.base.iterdir())


def regraft(*arguments: str | Path) -> list[str]:
    """Return the command line of regraft: the installed script, or the module without one."""
    script = Path(sys.executable).with_name("regraft")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "regraft"]
    return [*program, *map(str, arguments)]


def merge_command(model: Model, out: Path) -> list[str]:
    return regraft("merge", model.base, model.adapter, "-o", out)


def make_model(folder: Path, *options: str) -> Model:
    """Write a synthetic model, in a process of its own, unless it is there from before."""
    model = Model(folder)
    if not (model.adapter / "adapter_config.json").exists():
        remove(folder)
        measured([sys.executable, str(HERE / "synthetic.py"), "--out", str(folder), *options])
        os.sync()
    return model


def room_for(folder: Path, needed: int) -> str:
    """Return why ``needed`` bytes do not fit into a folder's disk, or an empty string."""
    free = shutil.disk_usage(folder).free
    if free >= needed + RESERVE_BYTES:
        return ""
    wanted = (needed + RESERVE_BYTES) / 1e9
    return f"needs {wanted:.0f} GB of free disk, {free / 1e9:.0f} GB are free"


def remove(path: Path) -> None:
    """Remove a folder and let the disk settle, so that it does not weigh on what comes next."""
    if path.exists():
        shutil.rmtree(path)
        os.sync()


def warm_cache(model: Model) -> None:
    """Read a model once, so that its pages are in memory for whoever is measured."""
    for path in sorted(model.folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**20):
                pass


def once(command: list[str], model: Model, out: Path, env: dict[str, str] | None = None) -> Sample:
    """Measure a command that makes ``out`` of a model that is in the page cache.

    Removing ``out``, before and after, is not counted, nor is reading the model beforehand: each
    time, because some systems drop pages that were not used for a while.
    """
    remove(out)
    warm_cache(model)
    sample = measured(command, env)
    remove(out)
    return sample
