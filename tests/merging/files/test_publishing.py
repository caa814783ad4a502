"""Nothing is put into its place before all of it is on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging import toys
from regraft.system import renaming

State = Any
"""Of a file its size and time, of a folder what is in it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in three files, two adapters, a merged model and an older one."""
    folder = tmp_path_factory.mktemp("inputs")
    base = toys.write_sharded_base(folder / "base")
    toys.write_json(base / "tokenizer.json", {})
    toys.write_json(base / "additional_chat_templates" / "of the base.json", {})
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    toys.write_adapter(folder / "adapter")
    toys.write_adapter(folder / "other", toys.attention(seed=9))
    for name in ("adapter", "other"):
        regraft.merge(base, folder / name, folder / f"merged {name}")
    return folder


COMMANDS: Mapping[str, Callable[[Path, Path], Any]] = {
    "merge": lambda inputs, out: regraft.merge(inputs / "base", inputs / "adapter", out),
    "unmerge": lambda inputs, out: regraft.unmerge(inputs / "merged adapter", out),
    "swap": lambda inputs, out: regraft.swap(inputs / "merged adapter", inputs / "other", out),
    "convert": lambda inputs, out: regraft.convert(inputs / "base", out, dtype="float32"),
    "shrink": lambda inputs, out: regraft.shrink(inputs / "adapter", out, rank=1),
}


def state(path: Path) -> State:
    """Return what would be lost of a file or folder if only an older state of it were flushed."""
    if path.is_dir():
        return sorted(entry.name for entry in path.iterdir())
    return path.stat().st_size, path.stat().st_mtime_ns


class Watch:
    """Notes what is flushed, and what had been when a folder was renamed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushed: dict[Path, State] = {}
        self.renamed: list[tuple[Path, Path, dict[Path, State]]] = []
        self._kernels, self._os = renaming.kernel_rename, os.rename
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "rename", self._rename)
        monkeypatch.setattr(renaming, "kernel_rename", self._kernel_rename)

    def _fsync(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        self.flushed[path] = state(path)

    def _note(self, source: Any, target: Any) -> None:
        self.renamed.append((Path(source).absolute(), Path(target).absolute(), {**self.flushed}))
        self.flushed.clear()

    def _kernel_rename(self, source: Path, target: Path, how: str) -> int:
        failure = self._kernels(source, target, how)
        if not failure:
            self._note(source, target)
        return failure

    def _rename(self, source: Any, target: Any, **more: Any) -> None:
        self._os(source, target, **more)
        self._note(source, target)


def flushed_before(watch: Watch, out: Path) -> None:
    """Check that all of an output was flushed, as it is, when it was renamed to its place."""
    ((source, _, flushed),) = [each for each in watch.renamed if each[1] == out]
    for path in (out, *out.rglob("*")):
        there = source / path.relative_to(out)
        assert there in flushed, f"{there} was not flushed before it was put into place"
        assert flushed[there] == state(path), f"{there} changed after it was flushed"


@pytest.mark.parametrize("command", COMMANDS)
def test_all_that_is_put_into_place_is_flushed_before_and_its_name_afterwards(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    watch, out = Watch(monkeypatch), tmp_path / "out"
    COMMANDS[command](inputs, out)
    flushed_before(watch, out)
    assert tmp_path in watch.flushed


@pytest.mark.parametrize("there", ["a model", "nothing"])
def test_what_takes_the_place_of_something_is_flushed_too(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    out = tmp_path / "out"
    if there == "a model":
        regraft.merge(inputs / "base", inputs / "other", out)
    else:
        out.mkdir()
    watch = Watch(monkeypatch)
    regraft.merge(inputs / "base", inputs / "adapter", out, overwrite=True)
    flushed_before(watch, out)
    assert tmp_path in watch.flushed
    assert len(watch.renamed) == 1  # in one step


def test_a_kernel_that_cannot_swap_has_the_new_one_flushed_before_the_old_is_moved(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    regraft.merge(inputs / "base", inputs / "other", out)
    monkeypatch.setattr(renaming, "kernel_rename", lambda *_: 38)
    watch = Watch(monkeypatch)
    regraft.merge(inputs / "base", inputs / "adapter", out, overwrite=True)
    (aside, place, back) = watch.renamed
    assert (aside[0], place[1]) == (out, out)
    assert back[0] == aside[1]
    watch.renamed = [(place[0], place[1], aside[2])]
    flushed_before(watch, out)


def test_what_an_earlier_try_has_finished_is_flushed_by_the_one_that_puts_it_into_place(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def progress(event: regraft.ProgressEvent) -> None:
        if event.stage == "merge" and 4 * event.done >= 3 * event.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regraft.merge(inputs / "base", inputs / "adapter", out, threads=1, progress=progress)
    watch = Watch(monkeypatch)
    regraft.merge(inputs / "base", inputs / "adapter", out, threads=1)
    flushed_before(watch, out)
