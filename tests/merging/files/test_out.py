"""Where an output goes: home, an empty folder, the current folder; and who may read it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import regraft
from merging import toys
from mounting import run
from regraft.cli.app import app
from regraft.errors import AccessError, DiskSpaceError, OutputExistsError
from regraft.merging.files import publish as output

Verb = Callable[[Path, str], object]

VERBS: dict[str, Verb] = {
    "merge": lambda at, out: regraft.merge(at / "base", at / "a", out),
    "swap": lambda at, out: regraft.swap(at / "merged", at / "a", out),
    "unmerge": lambda at, out: regraft.unmerge(at / "merged", out),
    "shrink": lambda at, out: regraft.shrink(at / "a", out),
    "quantize": lambda at, out: regraft.quantize(at / "base", out, "int8"),
    "dequantize": lambda at, out: regraft.dequantize(at / "int8", out),
}
"""Every verb that makes a folder and needs no torch."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    base, adapter = toys.write_base(folder / "base"), toys.write_adapter(folder / "a")
    regraft.merge(base, adapter, folder / "merged")
    regraft.quantize(base, folder / "int8", "int8")
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_a_tilde_is_home_in_every_verb(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    VERBS[verb](inputs, "~/out")
    assert any((tmp_path / "home" / "out").glob("*.safetensors"))
    assert not (tmp_path / "~").exists()


def test_a_tilde_is_home_on_the_command_line(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["merge", str(inputs / "base"), str(inputs / "a"), "-o", "~/out", "-q"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert regraft.clean("~") == []


@pytest.mark.parametrize("verb", VERBS)
def test_an_empty_folder_is_filled_without_more_words(
    inputs: Path, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "out").mkdir()
    VERBS[verb](inputs, str(tmp_path / "out"))
    assert any((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_comes_into_an_empty_folder_meanwhile_stays(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    whole = output._take_empty

    def late(folder: Path, out: Path) -> None:
        (out / "mine.txt").write_text("mine")
        whole(folder, out)

    monkeypatch.setattr(output, "_take_empty", late)
    with pytest.raises(OutputExistsError, match="no longer empty"):
        VERBS["merge"](inputs, str(tmp_path / "out"))
    assert toys.tree(tmp_path / "out") == {"mine.txt": b"mine"}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("out", [".", ".."])
def test_the_folder_that_one_is_in_is_refused_with_what_to_do(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputExistsError, match="current folder") as caught:
        VERBS[verb](inputs, out)
    assert "-o ./NAME" in str(caught.value)
    assert Path(os.path.relpath(tmp_path / "here")) == Path()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("verb", VERBS)
def test_overwrite_is_not_suggested_where_it_would_be_refused(
    inputs: Path, tmp_path: Path, verb: str
) -> None:
    names = {"swap": "merged", "unmerge": "merged", "shrink": "a", "dequantize": "int8"}
    own = inputs / names.get(verb, "base")
    (tmp_path / "file").write_text("notes")
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("notes")
    said = {own: "over) an input", inputs: "over) an input", tmp_path / "file": "is a file",
            tmp_path / "link": "over) an input", tmp_path / "other": "already, and --overwrite "
            "replaces only"}  # fmt: skip
    for out, words in said.items():
        with pytest.raises(regraft.RegraftError) as caught:
            VERBS[verb](inputs, str(out))
        assert words in str(caught.value)
        assert "or --overwrite" not in str(caught.value)


def test_a_link_is_called_a_link_and_home_is_not_replaced(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys.write_base(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "broken").symlink_to("nowhere")
    for overwrite in (False, True):
        for out, words in {"link": r"is a link.*found a link to home",
                           "broken": r"is a link.*found a link to nowhere",
                           "home": r"the home folder is not replaced"}.items():  # fmt: skip
            with pytest.raises(OutputExistsError, match=words):
                regraft.merge(inputs / "base", inputs / "a", tmp_path / out, overwrite=overwrite)


# -- what a plan says of the place -----------------------------------------------------------------


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing can be made in: for root, who may write anywhere, a read-only disk."""
    place = tmp_path / "closed"
    place.mkdir()
    if os.geteuid():
        place.chmod(0o555)
        yield place
        place.chmod(0o755)
        return
    run("mount", "-t", "tmpfs", "-o", "ro", "none", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("out", ["out", "made/on/the/way/out"])
def test_a_plan_refuses_a_folder_that_may_not_be_written_to(
    inputs: Path, closed: Path, out: str
) -> None:
    with pytest.raises(AccessError, match="cannot write"):
        regraft.plan(inputs / "base", inputs / "a", closed / out)
    with pytest.raises(AccessError, match="cannot write"):
        regraft.merge(inputs / "base", inputs / "a", closed / out)
    assert not list(closed.iterdir())


@pytest.mark.parametrize("out", ["n" * 250, "made/" + "n" * 250, "n" * 300 + "/out"])
def test_a_plan_refuses_a_name_that_is_too_long(inputs: Path, tmp_path: Path, out: str) -> None:
    """The name of the folder beside it, in which it is built, is longer by nine."""
    for verb in (regraft.plan, regraft.merge):
        with pytest.raises(AccessError, match="too long"):
            verb(inputs / "base", inputs / "a", tmp_path / out)
    assert regraft.plan(inputs / "base", inputs / "a", tmp_path / ("n" * 200)).disk is not None
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_so_in_a_dry_run(inputs: Path, closed: Path) -> None:
    arguments = ["merge", str(inputs / "base"), str(inputs / "a"), "--dry-run"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(closed / "out")])
    assert done.exit_code == 4
    assert f"{closed}: cannot write" in done.stderr


def test_a_file_system_without_room_for_another_file_says_so(inputs: Path, tmp_path: Path) -> None:
    place = tmp_path / "few"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "nr_inodes=6", "none", place)
    try:
        with pytest.raises(DiskSpaceError, match="no more files"):
            regraft.merge(inputs / "base", inputs / "a", place / "out")
    finally:
        subprocess.run(["umount", str(place)], check=True)
