"""Runs of the tests side by side have a folder each, and remove only what no run uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from temp_root import PREFIX, TempRoot, on_disk, place_of_files, remove_left_over


def test_a_run_removes_what_killed_ones_left_and_no_other_runs_folder(tmp_path: Path) -> None:
    mine, theirs = TempRoot(tmp_path), TempRoot(tmp_path)
    killed = tmp_path / f"{PREFIX}killed"
    (killed / "deep" / "down").mkdir(parents=True)
    (tmp_path / "of somebody else").mkdir()
    assert remove_left_over(tmp_path) == [killed]
    (mine.path / "file").write_text("")
    mine.remove()
    assert {path.name for path in tmp_path.iterdir()} == {theirs.path.name, "of somebody else"}
    theirs.remove()
    assert remove_left_over(tmp_path) == []


def test_this_run_has_no_folder_that_it_shares(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert "pytest-of-" not in str(tmp_path_factory.getbasetemp())


def test_where_it_is_said_files_go_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert place_of_files() == tmp_path
    with on_disk() as folder:
        assert folder.parent == tmp_path
    assert not folder.exists()
