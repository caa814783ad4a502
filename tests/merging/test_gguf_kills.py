"""Work on a GGUF file that is killed: nothing or a whole file is left, and it is gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging.killing import Command, Server
from merging.test_gguf_undo import adapter, model
from merging.toys import tree
from regraft.merging.execution.step_run import StepRun

OUT, RECORDS, WORK = "out.gguf", "out.gguf.regraft", ".out.gguf.regraft"
BASE = "../base/model.gguf"
COMMANDS: Mapping[str, Command] = {
    "merge": ("merge", [BASE, "../adapter", OUT], {}),
    "without an undo": ("merge", [BASE, "../adapter", OUT], {"undo": False}),
    "overwrite": ("merge", [BASE, "../adapter", OUT], {"overwrite": True}),
    "over a plain file": ("merge", [BASE, "../adapter", OUT], {"overwrite": True}),
    "unmerge": ("unmerge", ["../merged.gguf", OUT], {}),
    "unmerge over a merge": ("unmerge", ["../merged.gguf", OUT], {"overwrite": True}),
    "swap": ("swap", ["../merged.gguf", "../other", OUT], {}),
}
"""What is called, by a name; relative paths are the same wherever it is done."""

OLD = {"overwrite": True, "over a plain file": False, "unmerge over a merge": True}
"""Where a file is replaced, and whether that has records."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two adapters, a merged file and an older one."""
    folder = tmp_path_factory.mktemp("inputs")
    base = model(folder / "base", "Q4_0")
    adapter(folder / "adapter")
    adapter(folder / "other", seed=9)
    regraft.merge(base, folder / "adapter", folder / "merged.gguf")
    regraft.merge(base, folder / "other", folder / "old.gguf")
    return folder


@pytest.fixture(scope="module")
def server(inputs: Path) -> Iterator[Server]:
    """A server that has everything compiled."""
    warm = [("merge", ["base/model.gguf", "adapter", "warm.gguf"])]
    warm += [("swap", ["warm.gguf", "other", "warmer.gguf"])]
    started = Server(inputs, warm)
    yield started
    started.close()


def begin(folder: Path, inputs: Path, command: str) -> Path:
    """Make a folder to run a command in: empty, or with the file that is to be replaced."""
    folder.mkdir()
    if command in OLD:
        shutil.copy(inputs / "old.gguf", folder / OUT)
    if OLD.get(command):
        shutil.copytree(inputs / "old.gguf.regraft", folder / RECORDS)
    return folder


def comparable(folder: Path) -> dict[str, Any]:
    """Return file and records; of a receipt, what two runs may not differ in."""
    found: dict[str, Any] = {n: c for n, c in tree(folder).items() if not n.startswith(WORK)}
    content = found.get(f"{RECORDS}/receipt.json")
    if content is not None:
        receipt = json.loads(content)
        del receipt["created"], receipt["digest"]
        for name in ("seconds", "peak_memory", "threads"):
            del receipt["totals"][name]
        found[f"{RECORDS}/receipt.json"] = receipt
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_anywhere_the_same_command_gives_the_same_bytes(
    inputs: Path, server: Server, command: str
) -> None:
    place = begin(inputs / command, inputs, command)
    before = comparable(place)
    code, calls = server.run(place, COMMANDS[command])
    expected, points, kept = comparable(place), 8, 0
    assert code == 0
    assert not (place / WORK).exists()
    moments = {1 + n * (calls - 1) // (points - 1) for n in range(points)}
    for kill in sorted(moments | {*range(calls - 24, calls + 1)}):
        place = begin(inputs / f"{command}-{kill}", inputs, command)
        code, _ = server.run(place, COMMANDS[command], kill)
        assert code == -9
        where = f"killed at call {kill} of {calls}"
        journal = place / WORK / "journal"
        kept += journal.exists() and journal.read_bytes().count(b"\n") > 1
        left = comparable(place)
        assert left.get(OUT) in (before.get(OUT), expected[OUT]), where
        whole = left.get(OUT) == expected[OUT]
        shutil.copytree(place, inputs / f"{command}-{kill}-cleaned")
        code, _ = server.run(place, COMMANDS[command], threads=2 if kill % 2 else 1)
        assert code == (3 if whole and command not in OLD else 0), where
        regraft.clean(place)
        assert comparable(place) == expected, where
        assert not (place / WORK).exists()
        place = inputs / f"{command}-{kill}-cleaned"
        regraft.clean(place)
        assert comparable(place) == (expected if whole else before), where
        assert not (place / WORK).exists()
    assert kept >= points // 3


@pytest.mark.slow
def test_what_is_done_is_not_done_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, adapters = inputs / "base" / "model.gguf", inputs / "adapter"
    seen, stages, names = 0, list[str](), list[str]()

    def interrupt(event: regraft.ProgressEvent) -> None:
        nonlocal seen
        seen += bool(event.tensor)
        if seen == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regraft.merge(base, adapters, tmp_path / OUT, threads=1, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [WORK]
    real = StepRun.work

    def work(run: StepRun, *arguments: Any) -> Any:
        names.append(run.step.name)
        return real(run, *arguments)

    monkeypatch.setattr(StepRun, "work", work)
    receipt = regraft.merge(
        base, adapters, tmp_path / OUT, progress=lambda event: stages.append(event.stage)
    )
    assert "resume" in stages
    assert 0 < len(set(names)) <= receipt.totals.tensors - 8
    undo = "undo/patch.safetensors"
    for name in (OUT, f"{RECORDS}/{undo}"):
        due = inputs / name.replace("out", "merged")
        assert (tmp_path / name).read_bytes() == due.read_bytes()
