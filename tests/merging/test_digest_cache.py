"""Digests of files that are as they were are known, and of no others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import regraft
from merging import toys
from merging.processes import command_here
from regraft.errors import MismatchError
from regraft.formats.files import known_digests
from regraft.formats.files.known_digests import KnownDigests
from regraft.formats.files.reading import FilePool
from regraft.formats.safetensors import read_header
from regraft.system.times import dates_changes, kinds_of
from regraft.tensors import TensorSpec
from temp_root import on_disk

WEIGHTS = "model.safetensors"
merge, unmerge, swap = (
    partial(verb, digest_cache=True) for verb in (regraft.merge, regraft.unmerge, regraft.swap)
)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder on the disk: times of files in memory are not believed."""
    with on_disk() as folder:
        if not dates_changes(folder.stat().st_dev):
            pytest.skip("times are not believed where temporary files lie")
        yield folder


@pytest.fixture(autouse=True)
def _not_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files that were just written count as old."""
    monkeypatch.setattr(known_digests, "YOUNG", 0)


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the lists, where there is none yet."""
    monkeypatch.setenv(known_digests.PLACE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests"


def known_of(receipt: regraft.Receipt) -> set[bool]:
    return {record.known for record in receipt.tensors}


def told(receipt: regraft.Receipt) -> Any:
    """Return what two merges of the same inputs say alike."""
    value = receipt.to_json()
    for key in ("created", "output", "command", "files"):
        del value[key]
    for figure in ("seconds", "peak_memory"):
        del value["totals"][figure]
    for record in value["tensors"]:
        del record["known"]
    return value


def check_digests(receipt: regraft.Receipt, base: Path) -> None:
    """See that a receipt has the digests of a base as it is."""
    specs = read_header(base / WEIGHTS).tensors
    content = (base / WEIGHTS).read_bytes()
    for name, digest in receipt.base.tensors.items():
        spec = specs[name]
        assert digest == blake3(content[spec.start :][: spec.nbytes]).hexdigest()


def test_what_a_merge_has_read_the_next_one_knows(
    lists: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    first = merge(base, adapter, tmp_path / "first")
    assert known_of(first) == {False}
    assert lists.stat().st_mode & 0o777 == 0o700
    second = merge(base, adapter, tmp_path / "second", threads=2)
    assert known_of(second) == {True}
    third = merge(base, adapter, tmp_path / "third", digest_cache=False, threads=2)
    assert known_of(third) == {False}
    assert told(second) == told(third)
    check_digests(second, base)
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("first", "second", "third")]
    assert files[0] == files[1] == files[2]
    assert regraft.verify(tmp_path / "second", base=base, adapters=adapter).ok
    unmerge(tmp_path / "second", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()


def changed_in_place(path: Path) -> None:
    """Change a byte of a file, and give it its date back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Put another file of the same size and date in the place of one."""
    before = path.stat()
    other = path.with_suffix(".new")
    shutil.copyfile(path, other)
    changed_in_place(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("change", [changed_in_place, replaced])
def test_a_file_that_was_changed_is_read_again(
    base: Path, adapter: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    merge(base, adapter, tmp_path / "first")
    change(base / WEIGHTS)
    receipt = merge(base, adapter, tmp_path / "second")
    assert known_of(receipt) == {False}
    check_digests(receipt, base)


def not_whole(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))


def writable_by_others(path: Path) -> None:
    path.chmod(0o666)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def of_another_layout(path: Path) -> None:
    text = path.read_bytes().partition(b"\n")[2].replace(b'"layout":1', b'"layout":2')
    path.write_bytes(blake3(text).hexdigest().encode() + b"\n" + text)


def of_somebody_else(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize(
    "damage",
    [not_whole, altered, writable_by_others, a_folder, of_another_layout, of_somebody_else],
)
def test_a_list_that_is_not_ours_or_not_whole_counts_for_nothing(
    lists: Path, base: Path, adapter: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    regraft.digest(base)
    for path in lists.iterdir():
        damage(path)
    assert known_of(merge(base, adapter, tmp_path / "out")) == {False}
    if damage is not a_folder:  # it is made anew
        assert known_of(merge(base, adapter, tmp_path / "again")) == {True}


def test_a_folder_that_cannot_be_written_to_keeps_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(known_digests.PLACE, str(tmp_path / "file" / "below"))
    for name in ("first", "second"):
        assert known_of(merge(base, adapter, tmp_path / name)) == {False}


def test_digest_says_if_they_are_not_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in ("", tmp_path / "file" / "below"):
        monkeypatch.setenv(known_digests.PLACE, str(place))
        done = command_here("digest", base)
        assert done.returncode == 0
        assert "the digests were not kept" in done.stderr
    assert not regraft.digest(base).kept


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("what", ["young", "another start", "in memory"])
def test_times_are_not_believed_of_every_file(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "young":
        monkeypatch.setattr(known_digests, "YOUNG", 60 * 10**9)
    elif what == "in memory":
        monkeypatch.setattr(known_digests, "dates_changes", lambda _: False)
    assert regraft.digest(base).kept == (what == "another start")
    if what == "another start":
        monkeypatch.setattr(known_digests, "boot", lambda: "another")
    receipt = merge(base, adapter, tmp_path / "out")
    assert known_of(receipt) == {False}
    check_digests(receipt, base)
    if what == "young":  # what this work has written, nobody else is writing
        assert known_of(swap(tmp_path / "out", adapter, tmp_path / "again")) == {False, True}


def test_kinds_of_file_systems_are_told_by_the_mounts() -> None:
    line = "36 35 {} /a /b rw - {} /dev/x rw\n"
    mounts = line.format("8:1", "ext4") + line.format("0:40", "tmpfs") + line.format("8:1", "ext4")
    assert kinds_of(os.makedev(8, 1), mounts) == {"ext4"}
    assert kinds_of(os.makedev(0, 40), mounts) == {"tmpfs"}
    assert kinds_of(os.makedev(9, 9), mounts) == set()
    if Path("/dev/shm").is_dir() and Path("/proc/self/mountinfo").exists():
        assert not dates_changes(Path("/dev/shm").stat().st_dev)


def test_no_folder_is_made_where_none_is_wanted(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(known_digests.PLACE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    merge(base, adapter, tmp_path / "first")
    monkeypatch.delenv(known_digests.PLACE)
    merge(base, adapter, tmp_path / "second", digest_cache=False)
    assert not (tmp_path / "cache").exists()
    merge(base, adapter, tmp_path / "third")
    assert list((tmp_path / "cache" / "regraft" / "digests").iterdir())


@pytest.mark.usefixtures("lists")
def test_digest_tells_and_keeps_them(base: Path, adapter: Path, tmp_path: Path) -> None:
    first, second = regraft.digest(base), regraft.digest(str(base))
    receipt = merge(base, adapter, tmp_path / "out")
    assert known_of(receipt) == {True}
    assert first.tensors == second.tensors == receipt.base.tensors
    assert (first.known, second.known) == (0, len(first.tensors))
    assert first.nbytes == sum(s.nbytes for s in read_header(base / WEIGHTS).tensors.values())


def test_the_command_line_digests_and_does_without(
    base: Path, adapter: Path, tmp_path: Path, lists: Path
) -> None:
    done = command_here("digest", base)
    assert done.returncode == 0, done.stderr
    assert "21 tensors" in done.stdout
    for option, known in (("--digest-cache", True), ("--no-digest-cache", False)):
        out = tmp_path / option.strip("-")
        done = command_here("merge", base, adapter, "-o", out, option)
        assert done.returncode == 0, done.stderr
        records = toys.read_json(out / "regraft" / "receipt.json")["tensors"]
        assert {record["known"] for record in records} == {known}
    assert lists.exists()


@pytest.mark.usefixtures("lists")
def test_digests_of_a_file_that_the_hub_calls_by_another_are_not_taken(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the Hub's cache a blob is named by its sha256."""
    blob = tmp_path / ("a" * 64)
    (base / WEIGHTS).rename(blob)
    (base / WEIGHTS).symlink_to(blob)
    regraft.digest(base)
    assert regraft.digest(base).known == 21
    monkeypatch.setattr(known_digests, "_hub_digest", lambda _: "b" * 64)
    assert regraft.digest(base).known == 0


def test_the_oldest_lists_go(lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_digests, "MOST_LISTS", 3)
    bases = [toys.write_base(tmp_path / f"base{number}") for number in range(5)]
    for number, each in enumerate(bases):
        regraft.digest(each)
        for path in lists.iterdir():
            os.utime(path, (number, number)) if path.stat().st_mtime > 100 else None
    assert len(list(lists.iterdir())) == 3
    assert [regraft.digest(each).known > 0 for each in bases[:1:-1]] == [True, True, True]


def put_wrong(lists: Path, path: Path, name: str) -> None:
    """Have the list of a file say something wrong of one tensor: as after an error of the disk."""
    spec = read_header(path).tensors[name]
    KnownDigests(lists).remember(path, {(spec.start, spec.nbytes): "0" * 64})


def test_bytes_that_rotted_since_are_found(
    lists: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """What a list says is believed by a merge, and by nobody who is asked to look."""
    name = "model.norm.weight"
    merge(base, adapter, tmp_path / "sound")
    put_wrong(lists, tmp_path / "sound" / WEIGHTS, name)
    with pytest.raises(MismatchError, match=name):
        unmerge(tmp_path / "sound", tmp_path / "back")
    unmerge(tmp_path / "sound", tmp_path / "back", digest_cache=False)
    put_wrong(lists, base / WEIGHTS, name)
    merge(base, adapter, tmp_path / "out")
    assert not regraft.verify(tmp_path / "out").ok


@pytest.mark.usefixtures("lists")
def test_what_is_known_and_shared_is_not_even_read(
    xfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = "model.layers.0.self_attn.q_proj"
    sizes = {"large.weight": (999, 257), f"{q}.weight": (64, 64)}
    base = toys.write_base(xfs / "base", {n: toys.draw(*s) for n, s in sizes.items()})
    adapter = toys.write_adapter(xfs / "a", toys.lora(q, 64, 64), target_modules=["q_proj"])
    read = []
    usual = FilePool.read_into

    def counted(self: FilePool, spec: TensorSpec, offset: int, buffer: Any) -> None:
        if spec.name == "large.weight":
            read.append(memoryview(buffer).nbytes)
        usual(self, spec, offset, buffer)

    monkeypatch.setattr(FilePool, "read_into", counted)
    merge(base, adapter, xfs / "merged")
    assert sum(read) == 4 * 999 * 257
    for work in (
        lambda: merge(base, adapter, xfs / "again"),
        lambda: swap(xfs / "again", adapter, xfs / "swapped"),
        lambda: unmerge(xfs / "merged", xfs / "back"),
    ):
        read.clear()
        work()
        assert sum(read) < 2 * 4096  # the blocks that it shares with its neighbours
    assert (xfs / "back" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()
    for name in ("again", "swapped"):
        assert (xfs / name / WEIGHTS).read_bytes() == (xfs / "merged" / WEIGHTS).read_bytes()
