"""Which files of a folder may go along: regular ones that lie in it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from regraft.errors import FormatError, InputError
from regraft.formats.files.inside import LARGEST, contents_of, file_pieces, head_of, refuse_outside

OUTSIDE = "a link to outside of its folder"
NOWHERE = "a link that leads nowhere"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, beside a secret."""
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "model" / "vocab.txt").write_text("words")
    (tmp_path / "model" / "inner" / "deep.txt").write_text("deep")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "secrets").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("vocab.txt", ""), ("inner/deep.txt", ""), ("../model/vocab.txt", ""),
        ("../secret", OUTSIDE), ("/etc/hostname", OUTSIDE), ("../nothing", OUTSIDE),
        ("../secrets", OUTSIDE), ("/proc/self/environ", OUTSIDE), ("/dev/zero", OUTSIDE),
        ("nothing", NOWHERE), ("odd", NOWHERE), ("vocab.txt/below", NOWHERE),
        ("inner", "a link to a folder"), ("chain", OUTSIDE),
    ],
)  # fmt: skip
def test_a_link_is_followed_inside_its_folder_alone(folder: Path, target: str, why: str) -> None:
    (folder / "chain").symlink_to("../secret")
    (folder / "odd").symlink_to(target)
    found = contents_of(folder)
    assert ("odd" in found.files) == (not why)
    assert found.others.get("odd", "") == why
    assert found.files["vocab.txt"] == folder / "vocab.txt"
    assert "inner" not in {**found.files, **found.others}


def test_a_folder_that_is_a_link_itself_may_hold_links(folder: Path, tmp_path: Path) -> None:
    (folder / "odd").symlink_to(folder / "vocab.txt")
    (tmp_path / "other").symlink_to(folder)
    assert set(contents_of(tmp_path / "other").files) == {"vocab.txt", "odd"}


def test_a_folder_inside_that_is_a_link_to_outside_holds_nothing(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secrets" / "a.jinja").write_text("key")
    (folder / "templates").symlink_to("../secrets")
    found = contents_of(folder, "templates")
    assert found.files == {}
    assert found.others == {"templates/a.jinja": OUTSIDE}


def test_links_of_the_hubs_cache_lead_to_blobs_of_the_same_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc" / "sub"
    snapshot.mkdir(parents=True)
    for repository in ("name", "other"):
        blobs = tmp_path / f"models--org--{repository}" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / "1").write_text("one")
    (snapshot / "own").symlink_to("../../../blobs/1")
    (snapshot / "theirs").symlink_to("../../../../models--org--other/blobs/1")
    found = contents_of(snapshot)
    assert (list(found.files), found.others) == (["own"], {"theirs": OUTSIDE})


def test_what_is_no_file_or_too_large_does_not_go_along(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # a socket's path has to be short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        Path("large").touch()
        os.truncate("large", LARGEST + 1)
        others = contents_of(folder).others
    device = "a pipe, socket or device"
    assert others == {"pipe": device, "socket": device, "large": "larger than 256 MiB"}


def test_reading_does_not_wait_for_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(FormatError, match="pipe"):
        list(file_pieces(folder / "pipe"))
    with pytest.raises(FormatError, match="pipe"):
        head_of(folder / "pipe", 1)
    assert b"".join(file_pieces(folder / "vocab.txt")) == b"words"
    assert head_of(folder / "vocab.txt", 2) == b"wo"


def test_a_config_outside_is_refused_with_a_way_on(folder: Path) -> None:
    (folder / "config.json").symlink_to("../secret")
    (folder / "inside.json").symlink_to("vocab.txt")
    refuse_outside(folder, "inside.json", "vocab.txt", "absent.json")
    with pytest.raises(InputError, match=r"config\.json: is a link to outside.*cp -L"):
        refuse_outside(folder, "config.json")
