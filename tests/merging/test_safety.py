"""OUT appears whole or not at all, and nothing that was there is harmed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import regraft
from merging import toys
from merging.processes import environment, errors, regraft_command
from merging.test_memory import MIB, write_sparse
from merging.test_resume import comparable
from merging.toys import tree, write_adapter, write_base, write_json
from regraft.errors import (
    AccessError,
    BusyError,
    DiskSpaceError,
    InputError,
    OutputExistsError,
    RegraftError,
    UsageError,
)
from regraft.formats.files import inside
from regraft.system import renaming


class Stand:
    """Stands in for a system call: passes calls on, counts them, and fails one of them.

    Attributes:
        fail_at: the number of the call that fails, 0-based; None for none.
        only: calls whose first argument does not end so are neither counted nor failed.
        calls: how many were counted.
    """

    def __init__(self, real: Callable[..., Any], code: int, fail_at: int | None, only: str = ""):
        self.real, self.code, self.fail_at, self.only = real, code, fail_at, only
        self.calls = 0

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Be a method where a method is stood in for."""
        return self if instance is None else lambda *a, **n: self(instance, *a, **n)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Fail, or do what was asked."""
        if str(arguments[0] if arguments else "").endswith(self.only):
            self.calls += 1
            if self.calls - 1 == self.fail_at:
                raise OSError(self.code, os.strerror(self.code), "the file")
        return self.real(*arguments, **named)


def sharded(tmp_path: Path) -> tuple[Path, Path]:
    """Return a base in three files, with a tokenizer, and an adapter."""
    base = toys.write_sharded_base(tmp_path / "base")
    write_json(base / "tokenizer.json", {})
    return base, write_adapter(tmp_path / "adapter")


# Failures on the way


def test_too_little_room_is_found_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Path, "mkdir", Stand(Path.mkdir, errno.EIO, 0))  # nobody tries
    with pytest.raises(DiskSpaceError, match=r"expected 0\.07 GB free; found 0\.00 GB") as caught:
        regraft.merge(base, adapter, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert str(tmp_path) in caught.value.problems[0].where
    assert tree(tmp_path) == before
    assert regraft.plan(base, adapter, tmp_path / "out").disk["free"] == 10**6


POINTS: dict[str, tuple[Any, str, int, float, str]] = {
    "the folder": (Path, "mkdir", errno.EACCES, 0, ""),
    "the first weights file": (os, "posix_fallocate", errno.ENOSPC, 0, ""),
    "the last weights file": (os, "posix_fallocate", errno.ENOSPC, 1, ""),
    "the first write": (os, "pwrite", errno.ENOSPC, 0, ""),
    "a write": (os, "pwrite", errno.EIO, 0.5, ""),
    "the last write": (os, "pwrite", errno.EDQUOT, 1, ""),
    "the first flush": (os, "fsync", errno.EIO, 0, ""),
    "a flush": (os, "fsync", errno.ENOSPC, 0.5, ""),
    "a read": (os, "preadv", errno.EIO, 0.5, ""),
    "a side file": (inside, "open_regular", errno.EIO, 0, "tokenizer.json"),
    "the rename": (renaming, "kernel_rename", errno.EACCES, 0, ""),
}
"""What is patched: where, its name, the error, at which of its calls (0 the first, 1 the last), and
which calls count."""


def fail(point: str, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have a merge fail at a point: count the calls in one that succeeds, then fail one of them."""
    where, name, code, position, only = POINTS[point]
    real = getattr(where, name)
    with monkeypatch.context() as patch:
        counter = Stand(real, code, None, only)
        patch.setattr(where, name, counter)
        regraft.merge(base, adapter, base.parent / "deep" / "down" / "out", threads=1)
    shutil.rmtree(base.parent / "deep")
    assert counter.calls
    monkeypatch.setattr(where, name, Stand(real, code, int(position * (counter.calls - 1)), only))
    return code


@pytest.mark.parametrize("point", POINTS)
def test_whatever_fails_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    base, adapter = sharded(tmp_path)
    before, out = tree(tmp_path), tmp_path / "deep" / "down" / "out"
    regraft.merge(base, adapter, out, threads=1)
    expected = comparable(out)
    shutil.rmtree(tmp_path / "deep")
    code = fail(point, base, adapter, monkeypatch)
    kind = DiskSpaceError if code in (errno.ENOSPC, errno.EDQUOT) else AccessError
    with pytest.raises(kind, match=os.strerror(code)) as caught:
        regraft.merge(base, adapter, out, threads=1)
    assert caught.value.exit_code == 4
    assert all(problem.where for problem in caught.value.problems)
    monkeypatch.undo()
    left = tree(tmp_path)
    assert {name: left.pop(name) for name in before} == before
    if hasattr(caught.value, "__notes__"):
        assert {path.name for path in out.parent.iterdir()} == {".out.regraft"}
    else:
        assert not left
    regraft.merge(base, adapter, out, threads=1)
    assert comparable(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("point", POINTS)
def test_whatever_fails_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    base, adapter = sharded(tmp_path)
    fail(point, base, adapter, monkeypatch)
    before = open_files()
    with pytest.raises(RegraftError):
        regraft.merge(base, adapter, tmp_path / "deep" / "down" / "out", threads=1)
    assert open_files() == before


def open_files() -> int:
    """Return how many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("stage", ["read", "merge", "finish"])
def test_an_exception_of_the_callers_own_passes(
    tmp_path: Path, error: BaseException, stage: str
) -> None:
    base, adapter = sharded(tmp_path)
    before = tree(tmp_path)

    def progress(event: regraft.ProgressEvent) -> None:
        if event.stage == stage and event.done >= event.total // 2:
            raise error

    with pytest.raises(type(error)):
        # One thread: what is done is then surely the first tensor, which the work is kept for.
        regraft.merge(base, adapter, tmp_path / "out", progress=progress, threads=1)
    if stage == "read" or isinstance(error, ValueError):
        assert tree(tmp_path) == before
    else:  # not the work's fault: it can be gone on with
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [".out.regraft", "adapter", "base"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of a few kilobytes, where the system lets us."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        place = tmp_path / f"disk{kib}"
        place.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={kib}k,mode=755", "tmpfs", str(place)]
        done = subprocess.run(["mount", *options], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_point_can_be_gone_on_with_once_there_is_room(
    tmp_path: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = sharded(tmp_path)
    plenty = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
    outcomes, kept, whole = [], 0, list[dict[str, Any]]()
    for kib in (4, 12, 20, 28, 36, 44, 56, 72, 96, 128, 160, 256):
        disk = small_disk(kib)
        outcomes.append(fits(base, adapter, disk / "out"))
        left = [path.name for path in disk.iterdir()]
        assert left in ([], ["out"] if outcomes[-1] else [".out.regraft"])
        kept += left == [".out.regraft"]
        if not outcomes[-1]:
            larger = ["mount", "-o", "remount,size=4m", str(disk)]
            subprocess.run(larger, check=True)
            assert fits(base, adapter, disk / "out")
        assert [path.name for path in disk.iterdir()] == ["out"]
        whole.append(comparable(disk / "out"))
        whole[-1].pop("README.md")  # the folder's name is in these
        whole[-1].pop("regraft/receipt.json")
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 5
    assert kept >= 3
    assert outcomes[-1]
    assert all(each == whole[0] for each in whole)


def fits(base: Path, adapter: Path, out: Path) -> bool:
    """Merge, and return whether there was room for it."""
    try:
        regraft.merge(base, adapter, out)
    except DiskSpaceError as error:
        return "the disk is full" not in str(error)
    return True


@pytest.mark.slow
def test_no_room_is_exit_code_4(tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    base, adapter = sharded(tmp_path)
    disk = small_disk(64)
    done = regraft_command("merge", base, adapter, "-o", disk / "out", "--json")
    assert errors(done)["type"] == "DiskSpaceError"
    assert done.returncode == 4
    assert tree(disk) == {}


# Interrupted


NOTES_AT_ONCE = """
from regraft.merging.execution import commit_log as ledger
ledger.SECONDS_BETWEEN_NOTES = 0
from regraft.cli import main
main()
"""
"""The command line, with a note of each tensor, so that most of the work is still to be done."""


def heed_interrupts() -> None:
    """Undo what a shell does to commands in its background: there they are deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_merge(tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a merge that takes a while; return once it has noted the first tensors as done."""
    many = {f"a{number:03d}": ("BF16", (8, MIB // 2)) for number in range(192)}
    base = write_sparse(tmp_path / "base", {**many, "m.weight": ("F32", (8, 8))})
    adapter = write_adapter(tmp_path / "adapter", toys.lora("m", 8, 8), target_modules=["m"])
    command = [sys.executable, "-c", NOTES_AT_ONCE, "merge", str(base), str(adapter)]
    command += ["-o", str(tmp_path / "out"), "-q", "--threads", "1"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    journal = tmp_path / ".out.regraft" / "journal"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process, base


@pytest.mark.slow
def test_a_killed_merge_leaves_no_out_and_is_not_in_the_way(tmp_path: Path) -> None:
    process, base = start_merge(tmp_path)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".out.regraft", "adapter", "base"]
    shutil.rmtree(base)
    regraft.merge(write_base(base), write_adapter(tmp_path / "two"), tmp_path / "out")
    assert (tmp_path / "out" / "regraft" / "receipt.json").exists()
    assert not (tmp_path / ".out.regraft").exists()


@pytest.mark.slow
def test_ctrl_c_is_exit_code_130_and_keeps_the_work(tmp_path: Path) -> None:
    process, _ = start_merge(tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.regraft", "adapter", "base"]
    (left,) = regraft.clean(tmp_path)
    assert not left.busy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_interrupt_while_the_threads_are_started_stops_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = sharded(tmp_path)
    begun, events = threading.Event(), []

    def progress(event: regraft.ProgressEvent) -> None:
        if event.stage == "merge":
            events.append(event)
            begun.set()
            time.sleep(0.01)

    def start(thread: threading.Thread) -> None:
        if thread.name == "regraft-1":
            begun.wait()
            raise KeyboardInterrupt
        real(thread)

    real = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        regraft.merge(base, adapter, tmp_path / "out", progress=progress, threads=2)
    assert events[-1].done < events[-1].total
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_merges_to_one_place_at_a_time_one_whole_model_remains(
    base: Path, tmp_path: Path, overwrite: bool
) -> None:
    adapters = [write_adapter(tmp_path / f"a{n}", toys.attention(seed=n)) for n in range(4)]
    out, failures = tmp_path / "out", list[RegraftError]()

    def merge(adapter: Path) -> None:
        try:
            regraft.merge(base, adapter, out, overwrite=overwrite)
        except RegraftError as error:
            failures.append(error)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(merge, adapters))
    assert not list(tmp_path.glob(".*"))
    receipt = toys.read_json(out / "regraft" / "receipt.json")
    promised = {record["name"]: record["blake3"] for record in receipt["tensors"]}
    held = {name: blake3(t.tobytes()).hexdigest() for name, t in toys.load(out).items()}
    assert promised == held
    assert {type(error) for error in failures} <= {BusyError} | (
        set() if overwrite else {OutputExistsError}
    )
    assert len(failures) < 4 if overwrite else len(failures) == 3


# What is there already


def occupy(place: Path, kind: str) -> None:
    """Put something where the output should go."""
    if kind == "a file":
        place.write_text("mine")
    elif kind == "a link to nothing":
        place.symlink_to("nowhere")
    else:
        place.mkdir()
        (place / "diary.txt").write_text("mine")


def listing(folder: Path) -> dict[str, Any]:
    """Return everything below a folder, links as where they lead."""
    links = {p.name: str(p.readlink()) for p in folder.iterdir() if p.is_symlink()}
    return {**tree(folder), **links}


KINDS = ["a file", "a link to nothing", "a folder of other things"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_out_that_exists_is_refused(
    base: Path, adapter: Path, tmp_path: Path, kind: str
) -> None:
    occupy(tmp_path / "out", kind)
    before = listing(tmp_path)
    with pytest.raises(OutputExistsError, match=r"is a link|is a file|--overwrite") as caught:
        regraft.merge(base, adapter, tmp_path / "out")
    assert "or --overwrite" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert caught.value.problems[0].where == str(tmp_path / "out")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", [*KINDS, "an adapter", "a link to a model"])
def test_overwrite_replaces_nothing_but_models(
    base: Path, adapter: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "an adapter":
        write_adapter(tmp_path / "out")
    elif kind == "a link to a model":
        write_base(tmp_path / "model")
        (tmp_path / "out").symlink_to("model")
    else:
        occupy(tmp_path / "out", kind)
    before = listing(tmp_path)
    with pytest.raises(OutputExistsError, match=r"replaces only folders|is a link|is a file"):
        regraft.merge(base, adapter, tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["empty", "merged", "checkpoint", "tokenizer"])
def test_overwrite_replaces_a_model_once_the_new_one_is_complete(
    base: Path, adapter: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    makers = {
        "empty": out.mkdir,
        "merged": lambda: regraft.merge(base, write_adapter(tmp_path / "old"), out),
        "checkpoint": lambda: write_base(out),
        "tokenizer": lambda: write_json(out / "tokenizer.json", {}),
    }
    makers[kind]()
    if kind != "empty":
        (out / "notes.txt").write_text("of the old one")
    before, seen = tree(out), []

    def progress(_: regraft.ProgressEvent) -> None:
        seen.append(tree(out) == before)

    regraft.merge(base, f"{adapter}=2", out, overwrite=True, progress=progress)
    assert seen
    assert all(seen)
    assert not (out / "notes.txt").exists()
    assert toys.read_json(out / "regraft" / "receipt.json")["adapters"][0]["weight"] == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_overwrite_keeps_the_old_model(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # an old kernel, or a file system that cannot
        monkeypatch.setattr(renaming, "kernel_rename", lambda *_: errno.ENOSYS)
    out = tmp_path / "out"
    regraft.merge(base, adapter, out)
    regraft.merge(base, f"{adapter}=3", out, overwrite=True)
    before = tree(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Stand(os.fsync, errno.EIO, 1))
        with pytest.raises(AccessError):
            regraft.merge(base, f"{adapter}=2", out, overwrite=True)
    assert tree(out) == before
    regraft.merge(base, f"{adapter}=2", out, overwrite=True)
    assert toys.read_json(out / "regraft" / "receipt.json")["adapters"][0]["weight"] == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_out_meanwhile_is_not_touched(
    base: Path, adapter: Path, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "out"

    def progress(event: regraft.ProgressEvent) -> None:
        if event.stage == "finish":
            out.mkdir(exist_ok=True)
            (out / "diary.txt").write_text("mine")

    with pytest.raises(OutputExistsError):
        regraft.merge(base, adapter, out, overwrite=overwrite, progress=progress)
    assert tree(out) == {"diary.txt": b"mine"}
    assert not list(tmp_path.glob(".*"))


# Inputs are never written to


@pytest.mark.parametrize(
    "place",
    ["base", "base/out", "base/deep/out", "adapter", "adapter/out", ".", "link", "link/out",
     "base/../base", "adapter/../base/out"],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_out_over_or_in_an_input_is_refused(
    base: Path, adapter: Path, tmp_path: Path, place: str, overwrite: bool
) -> None:
    (tmp_path / "link").symlink_to("base")
    before = tree(tmp_path)
    with pytest.raises((UsageError, OutputExistsError)) as caught:
        regraft.merge(base, adapter, tmp_path / place, overwrite=overwrite)
    if not (tmp_path / place).exists():
        assert isinstance(caught.value, UsageError)
        assert "the output would lie in (or over) an input" in str(caught.value)
    assert tree(tmp_path) == before


def test_a_lone_file_may_have_out_beside_it_but_not_over_it(base: Path, adapter: Path) -> None:
    lone = base / "model.safetensors"
    regraft.merge(lone, adapter, base / "out")
    assert toys.load(base / "out").keys() == toys.load(base).keys()
    with pytest.raises(UsageError, match="over"):
        regraft.merge(lone, adapter, base, overwrite=True)
    with pytest.raises(UsageError, match="over"):
        regraft.merge(lone, adapter, lone, overwrite=True)


def test_a_parent_that_is_a_file_is_an_error_of_ours(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises((AccessError, InputError)):
        regraft.merge(base, adapter, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_out_below_a_link_to_a_folder_is_made(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    regraft.merge(base, adapter, tmp_path / "link" / "out")
    assert (tmp_path / "there" / "out" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["out"]


def test_a_name_that_is_too_long_is_told_as_such(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="too long") as caught:
        regraft.merge(base, adapter, tmp_path / ("o" * 250))
    assert "shorter -o" in str(caught.value)


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = 'cd gone && rmdir ../gone && exec "$0" -m regraft merge x y -o z'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], cwd=tmp_path, capture_output=True, text=True,
        check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 3
    assert "the current folder was removed" in done.stderr


def test_a_merge_reads_its_inputs_without_changing_them(tmp_path: Path) -> None:
    base, adapter = sharded(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    content = tree(tmp_path)
    regraft.merge(base, adapter, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert tree(tmp_path) == content
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


if sys.platform != "linux":  # mounts, O_DIRECT and /proc
    pytestmark = pytest.mark.skip(reason="written for Linux")
