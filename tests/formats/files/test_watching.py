"""Files that are read have to stay as they are, and are named where they do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from regraft.errors import AccessError, ChangedError, FormatError, InputError, OutputExistsError
from regraft.formats.files import watching
from regraft.formats.files.inside import read_whole
from regraft.formats.files.json_file import read_json
from regraft.formats.files.reading import FilePool, open_regular
from regraft.formats.files.watching import (
    Stamp,
    Watch,
    check_unchanged,
    current,
    leave_out,
    watched,
)
from regraft.system.times import has_inodes
from regraft.tensors import TensorSpec


def in_place(path: Path) -> None:
    """Write other bytes of the same number, as the file lies there."""
    with path.open("r+b") as file:
        file.write(bytes(b ^ 1 for b in path.read_bytes()))


def with_old_times(path: Path) -> None:
    found = path.stat()
    in_place(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(path: Path) -> None:
    """Put another file of the same bytes in its place."""
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    new.rename(path)


WAYS: dict[str, Callable[[Path], object]] = {
    "written in place": in_place,
    "written in place, and its time set back": with_old_times,
    "replaced": replaced,
    "cut short": lambda path: os.truncate(path, 1),
    "made longer": lambda path: os.truncate(path, 9),
    "touched": os.utime,
    "removed": Path.unlink,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"[1, 2]")
    return tmp_path / "file"


def read(path: Path) -> None:
    os.close(open_regular(path))


def run(*steps: Callable[[], object], to_the_end: bool = True) -> None:
    """Do things one after the other, under one watch."""
    with watched(to_the_end=to_the_end):
        for step in steps:
            step()


def fail(error: BaseException) -> Callable[[], None]:
    """Return what raises an error."""

    def step() -> None:
        raise error

    return step


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_changed_is_refused_by_name(file: Path, way: str) -> None:
    with pytest.raises(ChangedError) as caught:
        run(lambda: read(file), lambda: WAYS[way](file))
    (problem,) = caught.value.problems
    assert problem.where == str(file)
    assert problem.what.startswith("the file was ")
    assert problem.hint == "Run it again when nothing writes to the file"
    assert caught.value.exit_code == 3


def test_a_change_right_after_another_one_is_seen_however_coarse_the_clock_is(file: Path) -> None:
    for _ in range(30):
        file.write_bytes(b"[3, 4]")
        with pytest.raises(ChangedError):
            run(lambda: read(file), lambda: file.write_bytes(b"[5, 6]"))


def test_every_changed_file_is_named_and_no_other(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("{}")
    reads = [partial(read, path) for path in paths]
    with pytest.raises(ChangedError) as caught:
        run(*reads, lambda: in_place(paths[0]), lambda: in_place(paths[2]))
    assert [problem.where for problem in caught.value.problems] == [str(paths[0]), str(paths[2])]


def test_what_is_not_changed_or_not_read_passes(file: Path) -> None:
    beside = file.with_name("log")
    beside.write_text("1")
    with watched(to_the_end=True):
        read(file)
        read(file)
        in_place(beside)
    assert current() is None
    check_unchanged()  # where nothing is watched, nothing is refused


def test_a_link_is_its_target(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    with pytest.raises(ChangedError):
        run(lambda: read(link), lambda: in_place(file))
    run(lambda: read(link))


def test_a_pool_notes_files_whatever_thread_opens_them(file: Path) -> None:
    spec = TensorSpec("", "U8", (6,), file, 0, 6)

    def read_in_a_thread() -> None:
        with FilePool() as pool, ThreadPoolExecutor(1) as threads:
            threads.submit(pool.read_bytes, spec).result()

    with pytest.raises(ChangedError):
        run(read_in_a_thread, lambda: in_place(file))


def test_folders_that_are_written_to_are_left_out(file: Path) -> None:
    with watched(to_the_end=True):
        read(file)
        leave_out(file.parent)
        in_place(file)
        read(file)
        in_place(file)


@pytest.mark.parametrize("again", [read_whole, read_json])
def test_bytes_decide_where_times_do_not(
    file: Path, again: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stamp, "of", lambda _: Stamp(0, 0, 0, 1, 1))
    steps = (lambda: read_json(file), lambda: file.write_bytes(b"[1, 3]"), lambda: again(file))
    with pytest.raises(ChangedError, match="the bytes that were read first"):
        run(*steps)


def test_an_error_that_a_change_can_explain_says_so(file: Path) -> None:
    for error in (FormatError("malformed"), KeyError("x"), AccessError("gone")):
        steps = (lambda: read(file), lambda: in_place(file), fail(error))
        with pytest.raises(ChangedError) as caught:
            run(*steps, to_the_end=False)
        assert caught.value.__cause__ is error


def test_an_error_that_no_change_can_explain_stays(file: Path) -> None:
    for error in (OutputExistsError("there"), KeyboardInterrupt(), OSError(28, "full")):
        steps = (lambda: read(file), lambda: in_place(file), fail(error))
        with pytest.raises(type(error)):
            run(*steps, to_the_end=False)
    with pytest.raises(InputError) as caught:
        run(lambda: read(file), fail(InputError("bad")))
    assert not isinstance(caught.value, ChangedError)


def test_a_watch_within_another_one_is_its_own(file: Path) -> None:
    with watched():
        outer = current()
        with watched():
            read(file)
            assert current() is not outer
        assert isinstance(outer, Watch)
        assert outer.first(file) is None


MOUNTS = """\
22 28 0:21 / /proc rw,nosuid shared:12 - proc proc rw
31 28 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 31 0:52 / /mnt/bucket rw,nosuid - fuse.rclone remote: rw,user_id=0
"""


@pytest.mark.parametrize(("device", "kept"), [((0, 52), False), ((8, 1), True), ((9, 9), True)])
def test_inodes_are_gone_by_where_a_file_system_has_them(
    device: tuple[int, int], kept: bool
) -> None:
    assert has_inodes(os.makedev(*device), MOUNTS) == kept


@pytest.mark.parametrize("kept", [True, False])
def test_another_inode_alone_is_a_change_where_there_are_inodes(
    file: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = count()
    monkeypatch.setattr(Stamp, "of", lambda _: Stamp(1, next(numbers), 6, 1, 1))
    monkeypatch.setattr(watching, "has_inodes", lambda _: kept)
    with pytest.raises(ChangedError) if kept else nullcontext():
        run(lambda: read(file), lambda: read(file))
