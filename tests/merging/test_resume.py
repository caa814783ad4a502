"""Work that was interrupted is gone on with, and comes out as if it had not been."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging import toys
from merging.killing import Command, Server
from merging.processes import python
from merging.toys import tree
from regraft.errors import AccessError, BusyError, DiskSpaceError, OutputExistsError
from regraft.merging import building
from regraft.merging.execution.step_run import StepRun
from regraft.merging.files import leftovers
from regraft.merging.files import publish as output
from regraft.system import locks, renaming

WORK = ".out.regraft"
SHARD = "out/model-00001-of-00003.safetensors"
PATCH = "out/regraft/undo/patch.safetensors"

COMMANDS: Mapping[str, Command] = {
    "merge": ("merge", ["../base", "../adapter", "out"], {}),
    "overwrite": ("merge", ["../base", "../adapter", "out"], {"overwrite": True}),
    "unmerge": ("unmerge", ["../merged", "out"], {}),
    "swap": ("swap", ["../merged", "../other", "out"], {}),
    "method": ("merge", ["../base", "../adapter", "out"], {"method": "dare_ties", "seed": 3}),
}
"""What is called, by a name; relative paths are the same wherever it is done."""


INPUTS = ("base", "adapter", "other", "merged", "old")
"""The folders that the fixture of this name makes."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two adapters, a merged model and an older one."""
    folder = tmp_path_factory.mktemp("inputs")
    base = toys.write_sharded_base(folder / "base")
    toys.write_json(base / "tokenizer.json", {})
    head = {f"{toys.PREFIX}lm_head.weight": toys.draw(toys.VOCAB, toys.HIDDEN, seed=3)}
    saved = {"modules_to_save": ["lm_head"]}
    toys.write_adapter(folder / "adapter", toys.attention() | head, **saved)
    toys.write_adapter(folder / "other", toys.attention(seed=9) | head, **saved)
    regraft.merge(base, folder / "adapter", folder / "merged")
    regraft.merge(base, folder / "other", folder / "old", undo=False)
    (folder / "old" / "notes.txt").write_text("of the old one")
    return folder


@pytest.fixture
def place(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with copies of the inputs beside it."""
    (tmp_path / "all" / "here").mkdir(parents=True)
    for name in INPUTS:  # and nothing of what other tests have made beside them
        shutil.copytree(inputs / name, tmp_path / "all" / name)
    monkeypatch.chdir(tmp_path / "all" / "here")
    return tmp_path / "all" / "here"


def comparable(folder: Path) -> dict[str, Any]:
    """Return a folder's content; of a receipt, what two runs may not differ in."""
    found: dict[str, Any] = tree(folder)
    content = found.get("regraft/receipt.json")
    if content is not None:
        receipt = json.loads(content)
        del receipt["created"], receipt["digest"]
        for name in ("seconds", "peak_memory"):
            del receipt["totals"][name]
        found["regraft/receipt.json"] = receipt
    return found


# Killed


@pytest.fixture(scope="module")
def server(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in whose folder the inputs are."""
    folder = tmp_path_factory.mktemp("warm")
    for name in ("base", "adapter", "other"):
        shutil.copytree(inputs / name, folder / name)
    warm = [("merge", ["base", "adapter", "warm"]), ("swap", ["warm", "other", "warmer"])]
    started = Server(folder, warm)
    yield started
    started.close()


def begin(folder: Path, inputs: Path, command: str) -> Path:
    """Make a folder to run a command in: empty, or with the model that is to be replaced."""
    folder.mkdir()
    if command == "overwrite":
        shutil.copytree(inputs / "old", folder / "out")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "old_kernel", "points"),
    [
        ("merge", False, 9), ("overwrite", False, 5), ("overwrite", True, 5),
        ("unmerge", False, 6), ("swap", False, 6), ("method", False, 5),
    ],
)  # fmt: skip
def test_killed_anywhere_the_same_command_gives_the_same_bytes(
    inputs: Path, server: Server, command: str, old_kernel: bool,
    points: int,
) -> None:  # fmt: skip
    name = f"{command}-{old_kernel}"
    before, place = tree(inputs / "base") | tree(inputs / "merged"), begin(
        inputs / name, inputs, command
    )  # fmt: skip
    code, calls = server.run(place, COMMANDS[command], old_kernel=old_kernel)
    expected, old = comparable(place / "out"), comparable(inputs / "old")
    assert (code, 0 < server.published < calls) == (0, True)
    assert [path.name for path in place.iterdir()] == ["out"]
    kept = 0
    last = range(server.published - 1, calls + 1)  # every call that publishes and cleans up
    for kill in sorted({1 + n * (calls - 1) // (points - 1) for n in range(points)} | {*last}):
        place = begin(inputs / f"{name}-{kill}", inputs, command)
        code, _ = server.run(place, COMMANDS[command], kill, old_kernel=old_kernel)
        assert code == -9
        journal = place / WORK / "journal"
        kept += journal.exists() and journal.read_bytes().count(b"\n") > 1
        whole = (place / "out").exists() and comparable(place / "out") == expected
        if not whole and (place / "out").exists():
            assert comparable(place / "out") == old
        assert (place / "out").exists() or command != "overwrite" or old_kernel
        code, _ = server.run(
            place, COMMANDS[command], threads=2 if kill % 2 else 1, old_kernel=old_kernel
        )
        assert code == (3 if whole and command != "overwrite" else 0)
        found = comparable(place / "out")
        if command != "unmerge":
            found["regraft/receipt.json"]["totals"]["threads"] = 1
        assert found == expected, f"killed at call {kill} of {calls}"
        regraft.clean(place)
        assert [path.name for path in place.iterdir()] == ["out"]
    assert kept >= points // 3
    assert tree(inputs / "base") | tree(inputs / "merged") == before


@pytest.mark.slow
def test_what_was_being_replaced_is_put_back_by_clean(inputs: Path, server: Server) -> None:
    place = begin(inputs / "aside", inputs, "overwrite")
    _, calls = server.run(place, COMMANDS["overwrite"], old_kernel=True)
    for kill in range(calls, 0, -1):
        place = begin(inputs / f"aside-{kill}", inputs, "overwrite")
        server.run(place, COMMANDS["overwrite"], kill, old_kernel=True)
        if not (place / "out").exists():
            break
    regraft.clean(place)
    assert comparable(place / "out") == comparable(inputs / "old")
    assert [path.name for path in place.iterdir()] == ["out"]


# Interrupted


def merge(**options: Any) -> regraft.Receipt:
    """Merge in the current folder."""
    return regraft.merge("../base", options.pop("adapter", "../adapter"), "out", **options)


def interrupt(after: int = 12, error: BaseException | None = None, **options: Any) -> None:
    """Merge in the current folder, and interrupt it after some tensors."""
    seen = 0

    def progress(event: regraft.ProgressEvent) -> None:
        nonlocal seen
        seen += bool(event.tensor)
        if seen > after:
            raise error or KeyboardInterrupt

    with pytest.raises(type(error) if error else KeyboardInterrupt) as caught:
        merge(progress=progress, threads=1, **options)
    noted = "\n".join(getattr(caught.value, "__notes__", ()))
    assert "the same command goes on from there" in noted
    assert not Path("out").exists()
    assert len(Path(WORK, "journal").read_bytes().splitlines()) > min(after, 2)


def worked_on(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Merge in the current folder; return the tensors that were computed."""
    names: list[str] = []
    real = StepRun.work

    def work(run: StepRun, *arguments: Any) -> Any:
        names.append(run.step.name)
        return real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StepRun, "work", work)
        merge(**options)
    assert [path.name for path in Path().iterdir()] == ["out"]
    return names


@pytest.fixture(scope="module")
def expected(inputs: Path) -> dict[str, Any]:
    """What a merge gives that nobody disturbs, with one thread."""
    place = begin(inputs / "expected", inputs, "merge")
    before = Path.cwd()
    os.chdir(place)
    merge(threads=1)
    os.chdir(before)
    return comparable(place / "out")


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_what_is_done_is_not_done_again(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(12)
    done, stages = worked_on(monkeypatch, threads=1), list[str]()
    assert comparable(Path("out")) == expected
    assert 5 <= len(done) <= len(toys.llama_tensors()) - 12
    shutil.rmtree("out")
    interrupt(5)
    interrupt(9)
    merge(threads=1, progress=lambda event: stages.append(event.stage))
    assert [stage for n, stage in enumerate(stages) if stages.index(stage) == n] == [
        "read", "resume", "merge", "finish",
    ]  # fmt: skip
    assert comparable(Path("out")) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("error", [MemoryError(), SystemExit(1), OSError(errno.EDQUOT, "full")])
def test_work_is_kept_after_what_is_not_its_fault(
    expected: dict[str, Any], error: BaseException
) -> None:
    if isinstance(error, OSError):
        with pytest.raises(DiskSpaceError):
            interrupt(error=error)
    else:
        interrupt(error=error)
    assert Path(WORK).exists()
    merge(threads=1)
    assert comparable(Path("out")) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_other_threads_and_another_cap_go_on_too(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(12)
    assert len(worked_on(monkeypatch, threads=5, max_memory="1GiB")) < len(toys.llama_tensors())
    found = comparable(Path("out"))
    found["regraft/receipt.json"]["totals"]["threads"] = 1
    assert found == expected


def touch_base(place: Path) -> None:
    """Change one weight of the base."""
    path = place.parent / "base" / "model-00002-of-00003.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


CHANGES: Mapping[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "a weight of the base": (touch_base, {}),
    "a base that was only touched": (lambda p: (p.parent / "base" / "config.json").touch(), {}),
    "a new file of the base": (
        lambda p: (p.parent / "base" / "vocab.txt").write_text("x"), {}),
    "the adapter": (
        lambda p: shutil.copy(p.parent / "other" / "adapter_model.safetensors",
                              p.parent / "adapter"), {}),
    "the adapter's config": (
        lambda p: toys.write_json(p.parent / "adapter" / "adapter_config.json",
                                  toys.adapter_config(lora_alpha=7, modules_to_save=["lm_head"])),
        {}),
    "the weight": (lambda _: None, {"adapter": "../plain=0.5"}),
    "another adapter": (lambda _: None, {"adapter": "../other"}),
    "two adapters": (lambda _: None, {"adapter": ["../adapter", "../plain"]}),
    "the dtype": (lambda _: None, {"dtype": "float32"}),
    "the size of the files": (lambda _: None, {"shard_size": "4KB"}),
    "no undo": (lambda _: None, {"undo": False}),
    "no copy of the adapter": (lambda _: None, {"keep_adapter": False}),
    "the version": (lambda _: None, {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_and_options_start_afresh(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    toys.write_adapter(place.parent / "plain")
    action, options = CHANGES[change]
    interrupt(12, **({"adapter": "../plain"} if change == "the weight" else {}))
    action(place)
    if change == "the version":
        monkeypatch.setattr("regraft.merging.execution.jobs.__version__", "9")
    assert set(worked_on(monkeypatch, **options)) >= set(toys.llama_tensors())
    found = comparable(Path("out"))
    shutil.rmtree("out")
    merge(**options)
    assert comparable(Path("out")) == found


# Damage


def flip(name: str, at: int) -> Callable[[Path], None]:
    """Return a function that flips a bit of a file, counted from its middle."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2 + at] ^= 1
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    """Return a function that cuts a file off."""
    return lambda folder: os.truncate(folder / name, keep((folder / name).stat().st_size))


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    """Return a function that changes the journal's lines."""

    def damage(folder: Path) -> None:
        found = (folder / "journal").read_bytes().splitlines(keepends=True)
        (folder / "journal").write_bytes(b"".join(change(found)))

    return damage


def forged(found: list[bytes]) -> list[bytes]:
    """Return lines, one with another number in it."""
    number = next(n for n, line in enumerate(found) if b'"action":"merge"' in line)
    changed = found[number].replace(b'"changed":', b'"changed":1')
    assert changed != found[number]
    return [*found[:number], changed, *found[number + 1 :]]


def clutter(folder: Path) -> None:
    """Put things into an unfinished output that do not belong there."""
    (folder / "out" / "notes.txt").write_text("mine")
    (folder / "out" / "empty" / "folder").mkdir(parents=True)
    (folder / "out" / "regraft" / "undo" / "base").mkdir(parents=True, exist_ok=True)
    (folder / "out" / "regraft" / "undo" / "base" / "vocab.txt").write_text("old")


DAMAGE: Mapping[str, Callable[[Path], Any]] = {
    "a bit of the weights": flip(SHARD, 7),
    "the header of the weights": lambda f: flip(SHARD, 9 - (f / SHARD).stat().st_size // 2)(f),
    "weights that are cut off": cut(SHARD, lambda size: size // 3),
    "weights that are too long": cut(SHARD, lambda size: size + 999),
    "weights that are gone": lambda f: (f / SHARD).unlink(),
    "weights that are a folder": lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()),
    "a bit of the patch": flip(PATCH, 3),
    "a patch that is cut off": cut(PATCH, lambda size: size - 5),
    "a patch that is empty": cut(PATCH, lambda _: 0),
    "a patch with a huge header": lambda f: (f / PATCH).write_bytes(b"\xff" * 9000),
    "a patch with a large header": lambda f: (f / PATCH).write_bytes(b"\xff" * 6 + bytes(9000)),
    "a patch that is gone": lambda f: (f / PATCH).unlink(),
    "a journal cut off in mid-line": cut("journal", lambda size: size - 9),
    "a journal cut off in its first line": cut("journal", lambda _: 20),
    "a journal that is empty": cut("journal", lambda _: 0),
    "a journal of zeros": lambda f: (f / "journal").write_bytes(bytes(5000)),
    "a journal of garbage": lambda f: (f / "journal").write_bytes(os.urandom(5000)),
    "a journal of other JSON": lines(lambda found: [*found[:3], b'{"name": 3}\n', *found[3:]]),
    "a journal with another number": lines(forged),
    "a journal with a line lost": lines(lambda found: found[:4] + found[5:]),
    "a journal with a line twice": lines(lambda found: found[:4] + found[3:]),
    "a journal with zeros at its end": lines(lambda found: [*found[:-1], bytes(len(found[-1]))]),
    "a journal that is gone": lambda f: (f / "journal").unlink(),
    "no output": lambda f: shutil.rmtree(f / "out"),
    "things that do not belong there": clutter,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed_and_made_good(
    place: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    interrupt(14)
    DAMAGE[what](place / WORK)
    done = worked_on(monkeypatch, threads=1)
    assert comparable(Path("out")) == expected
    if "mid-line" in what:
        assert len(done) < len(toys.llama_tensors()) - 8


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_cut_off_line_does_not_swallow_those_of_the_next_try(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(3)
    lines(lambda found: [found[0], found[1][:30]])(Path(WORK))
    interrupt(14)
    assert len(worked_on(monkeypatch, threads=1)) <= len(toys.llama_tensors()) - 14
    assert comparable(Path("out")) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_what_cannot_be_read_any_more_is_done_again(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(14)
    real = os.preadv

    def preadv(fd: int, *rest: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        if WORK in path and "undo/adapter-" not in path:  # these are only made at the end
            raise OSError(errno.EIO, "bad sector")
        return real(fd, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    merge(threads=1)
    assert comparable(Path("out")) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("number", [0, 1, 3])
def test_what_could_not_be_flushed_is_done_again(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It may still be read, from the cache, although the disk does not have it."""
    real, calls = os.fsync, 0

    def fsync(fd: int) -> None:
        nonlocal calls
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):  # noqa: PTH115
            calls += 1
            if calls - 1 == number:
                raise OSError(errno.EIO, "bad sector")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(AccessError, match="bad sector"):
            merge(threads=1)
    name = PATCH if number == 3 else f"out/model-0000{number + 1}-of-00003.safetensors"
    assert Path(WORK, name).stat().st_size == 0
    merge(threads=1)
    assert comparable(Path("out")) == expected


# Other people's files


@pytest.mark.slow
@pytest.mark.parametrize("link", ["", "out", "journal", SHARD, PATCH, "out/regraft", "base",
                                  "out/config.json", "hard"])  # fmt: skip
def test_links_lead_to_no_harm(place: Path, expected: dict[str, Any], link: str) -> None:
    interrupt(14)
    victim = place.parent / "victim"
    at = Path(WORK, SHARD if link == "hard" else link)
    if not os.path.lexists(at):
        at.parent.mkdir(exist_ok=True)
        victim.mkdir()
        (victim / "diary.txt").write_text("mine")
    else:
        at.rename(victim)
    before = tree(victim) if victim.is_dir() else victim.read_bytes()
    at.hardlink_to(victim) if link == "hard" else at.symlink_to(victim)
    if link:
        merge(threads=1)
        assert comparable(Path("out")) == expected
    else:
        with pytest.raises(AccessError):
            merge()
        regraft.clean()
        assert at.is_symlink()
    assert (tree(victim) if victim.is_dir() else victim.read_bytes()) == before


# Room


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_the_room_that_kept_work_has_taken_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(14)
    taken = sum(p.lstat().st_blocks * 512 for p in Path(WORK).rglob("*"))
    assert taken > 8000
    needed = regraft.plan("../base", "../adapter", "out").disk["needed"]
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - taken // 2))
    assert regraft.plan("../base", "../adapter", "out").disk["free"] > needed
    with pytest.raises(DiskSpaceError):
        regraft.merge("../base", "../adapter", "elsewhere")
    merge()


# At once


class Paused:
    """A merge that waits in its middle until it is let go."""

    def __init__(self) -> None:
        self.there, self._go = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._work = self._pool.submit(merge, threads=1, progress=self._progress)
        assert self.there.wait(60)

    def _progress(self, event: regraft.ProgressEvent) -> None:
        if event.stage == "merge":
            self.there.set()
            assert self._go.wait(60)

    def finish(self) -> None:
        """Let it go and wait for its end."""
        self._go.set()
        self._work.result()
        self._pool.shutdown()


@pytest.mark.slow
def test_a_second_merge_to_the_same_place_is_refused_at_once(
    place: Path, expected: dict[str, Any]
) -> None:
    paused = Paused()
    before = tree(place)
    with pytest.raises(BusyError, match="another process is writing the same output") as caught:
        merge()
    assert caught.value.exit_code == 4
    with pytest.raises(BusyError):
        regraft.unmerge("../merged", "../here/out")
    code = "import regraft, sys; regraft.swap('../merged', '../other', 'out')"
    done = python(code)
    assert "BusyError" in done.stderr
    found = regraft.clean()
    assert [(each.busy, Path(each.output).name) for each in found] == [(True, "out")]
    assert tree(place) == before
    paused.finish()
    assert comparable(Path("out")) == expected
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_clean_leaves_alone_what_was_begun_while_it_looked(expected: dict[str, Any]) -> None:
    interrupt(5)
    (found,) = leftovers.find_leftovers([Path()])
    assert not found.busy
    paused = Paused()
    leftovers.remove_leftover(found)
    paused.finish()
    assert comparable(Path("out")) == expected
    leftovers.remove_leftover(found)  # what is gone is gone


@pytest.mark.slow
def test_clean_removes_what_was_kept_and_nothing_else(place: Path) -> None:
    interrupt(5)
    (place / ".other.regraft").mkdir()
    (place / ".other.regraft" / "diary.txt").write_text("mine")
    (found,) = regraft.clean(dry_run=True)
    assert found.output == "out"
    assert found.bytes > 0
    assert Path(WORK).exists()
    assert [each.modified for each in regraft.clean("out")] == [found.modified]
    assert [path.name for path in place.iterdir()] == [".other.regraft"]
    assert regraft.clean() == []


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_that_its_last_owner_has_just_removed_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    real, calls = locks.open_folder, 0

    def open_folder(folder: Path) -> int | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            folder.rmdir()
            raise error(errno.ENOENT, "gone", str(folder))
        return real(folder)

    monkeypatch.setattr(locks, "open_folder", open_folder)
    merge()
    assert calls == 2


# The end


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_after_the_output_is_in_place_leaves_it_there(
    expected: dict[str, Any], inputs: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        shutil.copytree(inputs / "old", "out")
    real = output.sync_place

    def sync_place(path: Path) -> None:
        if path == Path.cwd():
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(output, "sync_place", sync_place)
    with pytest.raises(KeyboardInterrupt) as caught:
        merge(threads=1, overwrite=overwrite)
    assert not hasattr(caught.value, "__notes__")
    assert comparable(Path("out")) == expected
    assert [path.name for path in Path().iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("old_kernel", [False, True])
def test_an_output_that_could_not_be_flushed_into_place_is_taken_back(
    expected: dict[str, Any], inputs: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool,
    old_kernel: bool,
) -> None:  # fmt: skip
    if overwrite:
        shutil.copytree(inputs / "old", "out")
    if old_kernel:
        monkeypatch.setattr(renaming, "kernel_rename", lambda *_: errno.ENOSYS)
    real = output.sync_place

    def sync_place(path: Path) -> None:
        if path == Path.cwd():
            raise OSError(errno.EIO, "bad sector")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(output, "sync_place", sync_place)
        with pytest.raises(AccessError, match="bad sector"):
            merge(threads=1, overwrite=overwrite)
    assert Path("out").exists() == overwrite
    if overwrite:
        assert comparable(Path("out")) == comparable(inputs / "old")
    assert not worked_on(monkeypatch, threads=1, overwrite=overwrite)
    assert comparable(Path("out")) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_the_old_model_comes_back_if_the_new_one_cannot_take_its_place(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(inputs / "old", "out")
    monkeypatch.setattr(renaming, "kernel_rename", lambda *_: errno.ENOSYS)
    real, calls = Path.rename, 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        merge(overwrite=True)
    assert calls == 3
    assert comparable(Path("out")) == comparable(inputs / "old")


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_work_that_was_not_even_begun_leaves_what_is_kept(expected: dict[str, Any]) -> None:
    interrupt(14)
    before = tree(Path(WORK))
    Path("../merged/regraft/undo/undo.json").write_text(
        Path("../merged/regraft/undo/undo.json").read_text().replace('"plan": "', '"plan": "0')
    )
    toys.reseal(Path("../merged"))
    with pytest.raises(regraft.UnsupportedError):
        regraft.swap("../merged", "../other", "out")
    left = {name: content for name, content in tree(Path(WORK)).items() if name[:4] != "base"}
    assert left == before
    merge(threads=1)
    assert comparable(Path("out")) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_ctrl_c_twice_does_not_close_files_that_are_written_to(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_wait = threading.Thread.is_alive, threading.Condition.wait_for
    interrupts, waits = 0, 0

    def is_alive(thread: threading.Thread) -> bool:  # what is asked first of a thread to wait for
        nonlocal interrupts
        if thread.name.startswith("regraft") and not interrupts:
            interrupts += 1
            raise KeyboardInterrupt
        return real(thread)

    def wait_for(changed: threading.Condition, *arguments: Any) -> bool:
        nonlocal interrupts, waits
        if threading.current_thread() is threading.main_thread() and interrupts:
            waits += 1
            if interrupts < 2:
                interrupts += 1
                raise KeyboardInterrupt
        return bool(real_wait(changed, *arguments))

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "is_alive", is_alive)
        patch.setattr(threading.Condition, "wait_for", wait_for)
        with pytest.raises(KeyboardInterrupt):
            merge(threads=2)
    assert interrupts == 2
    assert waits >= 2
    assert not [t for t in threading.enumerate() if t.name.startswith("regraft")]
    merge(threads=1)
    assert comparable(Path("out")) == expected


@pytest.mark.slow
def test_a_swap_takes_whole_tensors_from_the_new_adapter(place: Path) -> None:
    regraft.swap("../merged", "../other", "swapped")
    regraft.merge("../base", "../other", "direct")
    for path in (place / "direct").glob("*.safetensors"):
        assert path.read_bytes() == (place / "swapped" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_an_output_that_is_there_is_not_merged_for_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an old kernel's exchange left half done is put back first, and found in the way."""
    interrupt(5)
    shutil.copytree("../old", Path(WORK, output.REPLACED))
    monkeypatch.setattr(building, "execute", None)
    with pytest.raises(OutputExistsError):
        merge()
    assert comparable(Path("out")) == comparable(Path("../old"))
