"""The room of what systems have in different ways, a subject at a time."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from regraft.errors import UsageError
from regraft.merging.files.publish import out_path
from regraft.system import memory, names, opening, positioned, renaming, times
from regraft.system.locks import OpenFolder

WINDOWS = "\\"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("CON", "a device's name"),
        ("nul.safetensors", "a device's name"),
        ("com1 .json", "a device's name"),
        ("LPT9", "a device's name"),
        ("C:model.safetensors", "holds ':'"),
        ("a:stream", "holds ':'"),
        ("what?", "holds '?'"),
        ("tab\t", "holds '\\t'"),
        ("model.", "ends in a dot"),
        ("model ", "ends in a dot or a space"),
    ],
)
def test_names_that_no_file_of_windows_can_have(name: str, why: str) -> None:
    assert why in names.trouble_of_name(name, WINDOWS)
    assert not names.trouble_of_name(name, "/")


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", ".out.regraft", "console", "ä"]
)
def test_names_that_every_file_can_have(name: str) -> None:
    assert not names.trouble_of_name(name, WINDOWS)


def test_an_output_of_a_name_that_no_folder_can_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = names.trouble_of_name
    monkeypatch.setattr(
        "regraft.merging.files.publish.trouble_of_name", lambda name: rules(name, WINDOWS)
    )
    with pytest.raises(UsageError, match="the output's name is a device's name"):
        out_path("models/aux")
    assert out_path("../models/./one") == Path("../models/one")


def test_names_are_the_same_whatever_their_case_and_the_composition_of_their_letters() -> None:
    composed, apart = "caf\u00e9", "CAFE\u0301"
    assert names.same_names(["a", "b", "A", composed, apart]) == [["A", "a"], [apart, composed]]


def test_two_names_are_tried_where_they_are_to_be(tmp_path: Path) -> None:
    assert names.are_one(tmp_path, "a", "a")
    assert not names.are_one(tmp_path, "a/b", "a/c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_threads_read_and_write_at_places_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if not there:
        for name in ("pread", "preadv", "pwrite"):
            monkeypatch.delattr(os, name)
    fd = opening.open_to_write(tmp_path / "file")
    wrong = []

    def work(number: int) -> None:
        content = memoryview(bytes([number]) * 1000)
        view = memoryview(bytearray(1000))
        for _ in range(50):
            positioned.write_all(fd, content, number * 1000)
            count = positioned.read_into(fd, view, number * 1000)
            if (count, view) != (1000, content) or positioned.read_piece(
                fd, 10, number * 1000
            ) != bytes(content[:10]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert not wrong
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([n]) * 1000 for n in range(8))


@pytest.mark.parametrize("flag", ["_NO_LINK", "FOLDER"])
def test_links_are_refused_without_a_flag_for_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(opening, flag, 0)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(OSError, match="symbolic links") as caught:
        opening.open_to_write(tmp_path / "link", fresh=True)
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "file").read_text() == "mine"
    for name in ("folder", "file"):
        with pytest.raises(NotADirectoryError):
            opening.open_folder(tmp_path / name)


def test_a_pipe_is_told_without_waiting_where_opening_it_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_NO_WAIT", 0)
    os.mkfifo(tmp_path / "pipe")
    fd, _ = opening.open_if_regular(tmp_path / "pipe")
    assert fd is None


@pytest.mark.parametrize("filled", [False, True])
def test_an_empty_folder_is_taken_where_nothing_is_renamed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filled: bool
) -> None:
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "there", str(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    new, out = tmp_path / "new", tmp_path / "out"
    new.mkdir()
    out.mkdir()
    (new / "file").touch()
    if filled:
        (out / "other").touch()
        with pytest.raises(OSError) as caught:
            renaming.take_empty(new, out)
        assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
        assert (out / "other").exists()
    else:
        renaming.take_empty(new, out)
        assert (out / "file").exists()


def test_a_lock_file_is_one_process_alone_and_goes_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.system.locks.open_folder", lambda _: None)
    place = tmp_path / "work"
    place.mkdir()
    (place / "inside").mkdir()
    with OpenFolder(place) as one, OpenFolder(place) as other:
        assert one.lock()
        assert not other.lock()
        assert one.is_in_place()
        one.remove()
        assert not place.exists()
        place.mkdir()
        assert other.lock()  # of the file that is gone: so it is looked at again
        assert not other.is_in_place()


def test_a_clock_that_is_another_one_elsewhere_is_not_gone_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import time

    before = time.time_ns()
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _: 5)  # as macOS's, since it began
    assert before - 10**9 < times.now_of_files() < time.time_ns()
    assert times.step_of_files() > 0.001


def test_memory_is_told_by_the_next_who_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    known = memory.peak_memory()
    assert memory.available_memory()
    monkeypatch.setattr(memory, "Path", lambda _: Path("/nowhere"))
    assert 0.5 < memory.peak_memory() / known < 20
    assert memory.available_memory() is None
    assert memory.resident_memory() == 0
