"""Work folders that others made, or may write to: refused by name, and left as they are."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

import regraft
from merging import toys
from merging.toys import tree
from regraft.cli.app import app
from regraft.errors import AccessError
from regraft.merging.files import staging as workplace
from regraft.runtime.saving.files import write_adapter

WORK = ".out.regraft"


@pytest.fixture
def work(base: Path, adapter: Path, tmp_path: Path) -> Path:
    """The work folder of a merge that was interrupted."""
    return interrupted(base, adapter, tmp_path)


def interrupted(base: Path, adapter: Path, place: Path) -> Path:
    """Interrupt a merge in its middle."""

    def progress(event: regraft.ProgressEvent) -> None:
        if event.stage == "merge" and 2 * event.done >= event.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regraft.merge(base, adapter, place / "out", threads=1, progress=progress)
    return place / WORK


def become_another_user(monkeypatch: pytest.MonkeyPatch, user: int | None = None) -> None:
    """From here on, what there is belongs to somebody else."""
    other = os.geteuid() + 1 if user is None else user
    monkeypatch.setattr(os, "geteuid", lambda: other)


@pytest.mark.parametrize("user", [None, 0])
def test_a_work_folder_of_another_user_is_refused_by_root_too(
    base: Path, adapter: Path, work: Path, monkeypatch: pytest.MonkeyPatch, user: int | None
) -> None:
    if user == os.geteuid():
        os.chown(work, 1, -1)
    else:
        become_another_user(monkeypatch, user)
    before = tree(work.parent)
    with pytest.raises(AccessError, match="the work folder belongs to another user") as caught:
        regraft.merge(base, adapter, work.parent / "out")
    assert caught.value.problems[0].where == str(work)
    assert "give another -o" in caught.value.problems[0].hint
    (found,) = regraft.clean(work.parent)
    assert (found.own, found.bytes) == (False, 0)
    assert tree(work.parent) == before


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_one_that_others_may_write_to_is_refused_and_can_be_cleaned(
    base: Path, adapter: Path, work: Path, mode: int
) -> None:
    work.chmod(mode)
    before = tree(work.parent)
    with pytest.raises(AccessError, match="other users may write to the work folder") as caught:
        regraft.merge(base, adapter, work.parent / "out")
    assert "`regraft clean`" in caught.value.problems[0].hint
    assert tree(work.parent) == before
    regraft.clean(work.parent / "out")
    regraft.merge(base, adapter, work.parent / "out")


def test_one_that_others_may_only_look_into_is_closed_to_them_and_gone_on_with(
    base: Path, adapter: Path, work: Path
) -> None:
    work.chmod(0o755)
    seen = []

    def progress(event: regraft.ProgressEvent) -> None:
        seen.append((event.stage, stat.S_IMODE(work.stat().st_mode)))

    regraft.merge(base, adapter, work.parent / "out", progress=progress)
    assert ("resume", 0o700) in seen
    assert ("merge", 0o700) in seen


def test_nobody_else_can_look_into_a_work_folder_and_anybody_into_the_output(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    usual = os.umask(0)
    try:
        work = interrupted(base, adapter, tmp_path)
        assert stat.S_IMODE(work.stat().st_mode) == 0o700
        assert stat.S_IMODE((work / "journal").stat().st_mode) == 0o600
        regraft.merge(base, adapter, tmp_path / "out")
    finally:
        os.umask(usual)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777
    assert stat.S_IMODE((tmp_path / "out" / "config.json").stat().st_mode) == 0o666


@pytest.mark.parametrize("kind", ["link", "link to nothing", "file"])
def test_a_link_or_a_file_in_its_place_is_refused(
    base: Path, adapter: Path, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / WORK
    place.write_text("mine") if kind == "file" else place.symlink_to(
        tmp_path if kind == "link" else "nowhere"
    )
    with pytest.raises(AccessError, match="the place of the work folder is taken"):
        regraft.merge(base, adapter, tmp_path / "out")
    assert os.path.lexists(place)
    assert regraft.clean(tmp_path) == []


@pytest.mark.parametrize("name", ["journal", "out"])
def test_what_is_not_ours_in_our_folder_is_made_anew(
    base: Path, adapter: Path, work: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = workplace.is_own_file if name == "journal" else workplace.is_own
    strange = (work / name).stat().st_ino
    monkeypatch.setattr(workplace, own.__name__, lambda s: s.st_ino != strange and own(s))
    stages = []
    regraft.merge(
        base, adapter, work.parent / "out", progress=lambda event: stages.append(event.stage)
    )
    assert "resume" not in stages
    assert regraft.verify(work.parent / "out").verdict == "exact"


def test_a_model_that_others_may_have_put_aside_is_not_put_back(work: Path) -> None:
    (work / "replaced").mkdir()
    (work / "replaced" / "evil").touch()
    work.chmod(0o777)
    with pytest.raises(AccessError, match="holds what was being replaced"):
        regraft.clean(work.parent)
    assert not (work.parent / "out").exists()
    work.chmod(0o700)
    regraft.clean(work.parent)
    assert (work.parent / "out" / "evil").exists()


def test_clean_says_what_it_leaves_to_its_owner(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_another_user(monkeypatch)
    said = [
        CliRunner().invoke(app, ["clean", str(work.parent), *a]).stdout for a in ([], ["--json"])
    ]
    (leftover,) = json.loads(said[1])["leftovers"]
    assert leftover["state"] == "another user's"
    assert said[0].endswith("0 folders, 0 B removed\n")
    assert work.exists()


def test_an_adapter_is_not_saved_by_way_of_another_user_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    tensors = {f"{toys.PREFIX}a.lora_A.weight": torch.ones(2, 2)}
    (tmp_path / ".a.saving").mkdir(mode=0o777)
    (tmp_path / ".a.saving").chmod(0o777)
    with pytest.raises(AccessError, match="other users may write to the work folder"):
        write_adapter(tmp_path / "a", toys.adapter_config(), tensors)
    (tmp_path / ".a.saving").chmod(0o700)
    with monkeypatch.context() as other:
        become_another_user(other)
        with pytest.raises(AccessError, match="save to another folder"):
            write_adapter(tmp_path / "a", toys.adapter_config(), tensors)
    write_adapter(tmp_path / "a", toys.adapter_config(), tensors)
