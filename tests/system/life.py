"""The life of a model, from base to base: run in a process of its own, which may lack things.

``python life.py INPUTS`` answers one line of standard input, a wish in JSON, after the other: in a
child process it takes away what the wish says, imports regraft, and lives through it. Rooms that
know no system are imported before, with their kernels; ``python life.py --alone WISH`` is a process
for one wish, which imports all of regraft without what it lacks.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numba  # noqa: F401  (what takes long is imported once, before the children part)
import numpy as np  # noqa: F401
import safetensors.numpy  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
from lacking import CALLED, take_away


def live(inputs: Path) -> None:
    """Go through every verb that writes or reads a folder, in the current one."""
    import regraft

    base, adapter, other = inputs / "base", inputs / "adapter", inputs / "other"
    assert regraft.inspect(adapter).kind
    regraft.merge(base, adapter, "merged")
    assert regraft.verify("merged").ok
    Path("empty").mkdir()
    regraft.merge(base, other, "empty")
    regraft.merge(base, adapter, "empty", overwrite=True)  # takes the place of another model
    _killed_and_gone_on_with(base, adapter)
    _kept_and_cleaned(base, adapter)
    _refused_while_busy(base, adapter)
    regraft.unmerge("merged", "base-again")
    regraft.swap("merged", other, "swapped")
    regraft.convert(base, "wide", dtype="float32")
    regraft.quantize(base, "four-bits", "nf4")
    regraft.dequantize("four-bits", "plain")
    regraft.shrink(adapter, "small", rank=1)
    assert not list(Path().glob(".*")), list(Path().glob(".*"))


def _interrupted(base: Path, adapter: Path, out: str, how: str) -> int:
    """Merge in a child process, which ends in the middle; return its exit code."""
    return _apart({"do": "interrupted", "arguments": [str(base), str(adapter), out, how]})


def interrupted(base: str, adapter: str, out: str, how: str) -> None:
    """Merge, and end in the middle: as after a kill, or as after Ctrl-C."""
    import regraft
    from regraft.merging.execution import commit_log

    commit_log.SECONDS_BETWEEN_NOTES = -1  # type: ignore[misc]

    def progress(event: Any) -> None:
        if event.stage == "merge" and 2 * event.done >= event.total:
            if how == "killed":
                os._exit(9)
            raise KeyboardInterrupt

    regraft.merge(base, adapter, out, threads=1, progress=progress)


def _killed_and_gone_on_with(base: Path, adapter: Path) -> None:
    import regraft

    assert _interrupted(base, adapter, "resumed", "killed") == 9
    (left,) = regraft.clean(dry_run=True)
    assert (Path(left.output).name, left.busy) == ("resumed", False)
    assert left.bytes > 0
    stages = []
    regraft.merge(base, adapter, "resumed", progress=lambda event: stages.append(event.stage))
    assert "resume" in stages


def _kept_and_cleaned(base: Path, adapter: Path) -> None:
    import regraft

    assert _interrupted(base, adapter, "never", "interrupted") == 1
    assert [Path(each.output).name for each in regraft.clean()] == ["never"]
    assert not regraft.clean(dry_run=True)


def _refused_while_busy(base: Path, adapter: Path) -> None:
    import regraft

    caught = []

    def progress(event: Any) -> None:
        if event.stage == "merge" and not caught:
            try:
                regraft.merge(base, adapter, "busy")
            except regraft.BusyError as error:
                caught.append(error)
            (left,) = regraft.clean(dry_run=True)
            assert left.busy

    regraft.merge(base, adapter, "busy", threads=1, progress=progress)
    assert caught


def save(inputs: Path) -> None:
    """Save an adapter anew, over itself, and over one with another config."""
    import torch

    from regraft.runtime.saving.files import write_adapter

    del inputs
    key = "base_model.model.q_proj."
    for alpha, value in ((1, 1.0), (1, 2.0), (2, 3.0)):
        tensors = {
            f"{key}lora_A.weight": torch.full((2, 3), value),
            f"{key}lora_B.weight": torch.full((5, 2), value),
        }
        write_adapter("saved", {"peft_type": "LORA", "lora_alpha": alpha}, tensors, card="Saved")
        Path("saved", "log").write_text("kept")
    assert not list(Path().glob(".*"))


def collide(inputs: Path) -> None:
    """Have outputs refused two of whose files would be one here."""
    import regraft

    verbs = {
        "sides": lambda: regraft.merge(inputs / "sides", inputs / "adapter", "one"),
        "shards": lambda: regraft.unmerge(inputs / "merged", "another"),
    }
    for name, verb in verbs.items():
        try:
            verb()
        except regraft.UsageError as error:
            Path(name).write_text(str(error))
        assert not list(Path().glob(".*"))


def _apart(wish: dict[str, Any]) -> int:
    """Fulfil a wish in a process of its own; return its exit code."""
    if not hasattr(os, "fork"):
        alone = [sys.executable, __file__, "--alone", json.dumps(wish)]
        return subprocess.run(alone, check=False).returncode
    pid = os.fork()
    if not pid:
        os._exit(_fulfil(wish))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fulfil(wish: dict[str, Any]) -> int:
    """Do what is wished; return 0, or 1 with the reason in a file beside the place."""
    try:
        if wish["do"] == "interrupted":
            interrupted(*wish["arguments"])
            return 0
        os.chdir(wish["place"])
        take_away(wish["lacks"])
        {"live": live, "save": save, "collide": collide}[wish["do"]](Path(wish["inputs"]))
        if "all but macOS has" in wish["lacks"]:
            assert {"F_PREALLOCATE", "F_NOCACHE", "F_FULLFSYNC", "renamex_np"} == CALLED
    except BaseException:
        if "place" in wish:
            reason = Path(wish["place"]).with_suffix(".error")
            reason.write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    return 0


KNOW_NO_SYSTEM = (
    "regraft.deltas.", "regraft.errors.", "regraft.names.", "regraft.numerics.", "regraft.quant.",
    "regraft.tensors.",
)  # fmt: skip
"""Rooms that import nothing of ``regraft.system``, nor of what does: the kernels, and tables."""


def _load_kernels(inputs: Path) -> None:
    """Live here, where nothing lacks, and forget all but the rooms that know no system.

    So the children do not load each kernel anew, which takes longer than all that they do.
    """
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        live(inputs)
    for name in [*sys.modules]:
        if name.partition(".")[0] == "regraft" and not f"{name}.".startswith(KNOW_NO_SYSTEM):
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # what the children share with this process they need not look through


def main(inputs: Path) -> None:
    """Answer wishes until there are none."""
    _load_kernels(inputs)
    for line in sys.stdin:
        wish = json.loads(line)
        if wish["do"] == "save":
            import torch  # noqa: F401  (once, for all children)
        sys.stdout.write(f"{_apart(wish)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "--alone":
        sys.exit(_fulfil(json.loads(sys.argv[2])))
    main(Path(sys.argv[1]))
