"""The peak memory of commands on tensors of ten times the cap."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from torture.kills.digests import digest_file
from torture.kills.inputs import write_adapter
from torture.kills.sharing import say

MEASURE = """
import json, sys
import regraft
from regraft.system.memory import peak_memory
name, arguments, cap = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
getattr(regraft, name)(*arguments, max_memory=cap)
print(peak_memory())
"""


def memory(work: Path, cap: int) -> dict[str, Any]:
    """Return the peak memory of each command on tensors of ten times the cap."""
    rows, columns = 10 * cap // (2 * 4096) + 1, 4096
    found: dict[str, Any] = {"cap": cap, "tensor": 2 * rows * columns}
    for kind in ("zeros", "random numbers"):
        place = work / kind.split()[0]
        write_huge(place / "base", rows, columns, random_numbers=kind != "zeros")
        shape = {"huge.weight": np.empty((rows, columns), np.uint8)}
        for number, name in enumerate(("adapter", "other")):
            write_adapter(place / name, shape, None, number, rank=16)
        calls = {
            "merge": [place / "base", place / "adapter", place / "merged"],
            "unmerge": [place / "merged", place / "unmerged"],
            "swap": [place / "merged", place / "other", place / "swapped"],
        }
        peaks = {name: measured(name, arguments, cap) for name, arguments in calls.items()}
        same = digest_file(place / "base" / "model.safetensors") == digest_file(
            place / "unmerged" / "model.safetensors"
        )
        found[kind] = {**peaks, "unmerged is the base": same}
        say(f"memory: {kind}: {found[kind]}")
        shutil.rmtree(place)
    return found


def write_huge(folder: Path, rows: int, columns: int, *, random_numbers: bool) -> None:
    """Write a base of one bfloat16 tensor, all zeros (and no room on the disk) or random."""
    folder.mkdir(parents=True)
    size = 2 * rows * columns
    header = {"huge.weight": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, rows if random_numbers else 0, 4096):
            shape = (min(4096, rows - begin), columns)
            values = draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            file.write(values.tobytes())
        file.truncate(8 + len(text) + size)


def measured(name: str, arguments: Iterable[Path], cap: int) -> int:
    """Return the peak resident memory of a call in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, json.dumps([str(a) for a in arguments]), str(cap)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)
