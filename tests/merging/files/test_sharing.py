"""Untouched tensors share blocks of the disk with their origin, where the file system can."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import regraft
from merging import toys
from merging.processes import errors, regraft_command
from regraft.errors import DiskSpaceError, EnvironmentShortfall, UsageError
from regraft.formats.safetensors import read_header
from regraft.merging.files import direct_io
from regraft.merging.files.publish import SLACK_BYTES
from regraft.system import sharing

MIB = 2**20
MERGED, KEPT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.table"
ROWS, WIDTH = 300, 256


@pytest.fixture
def place(xfs: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty folder of it, with a base and an adapter."""
    folder = xfs / request.node.name.partition("[")[0]
    write_inputs(folder)
    yield folder
    shutil.rmtree(folder)


def base_tensors() -> dict[str, Any]:
    """Return one tensor to be merged into between others, whose ends are those of no block."""
    large = {f"{KEPT}{number}.weight": toys.draw(8 * ROWS + 1, WIDTH) for number in range(2)}
    q = {f"{MERGED}.weight": toys.draw(ROWS, WIDTH)}
    return {"a.bias": toys.draw(6), **large, **q, "model.norm.weight": toys.draw(7)}


def write_inputs(folder: Path, tensors: dict[str, Any] | None = None) -> None:
    toys.write_base(folder / "base", base_tensors() if tensors is None else tensors)
    modules = {"target_modules": ["q_proj"]}
    for number, name in enumerate(("adapter", "other")):
        toys.write_adapter(folder / name, toys.lora(MERGED, ROWS, WIDTH, seed=number), **modules)


def taken_by(work: Callable[[], object], place: Path) -> int:
    """Return the bytes of the disk that some work takes."""
    before = _free(place)
    work()
    return before - _free(place)


def _free(place: Path) -> int:
    fd = os.open(place, os.O_RDONLY)
    try:
        os.sync()
        found = os.fstatvfs(fd)
    finally:
        os.close(fd)
    return found.f_bfree * found.f_frsize


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


ALL, CHANGED = 4 * WIDTH * (17 * ROWS + 2), 4 * WIDTH * ROWS
SMALL = 200_000
"""What else a verb may take: receipt, card, undo, adapters, folders, edges of tensors."""


def test_a_merge_takes_the_room_of_what_changes(place: Path) -> None:
    def merge(out: str, **options: Any) -> Callable[[], object]:
        return lambda: regraft.merge(place / "base", place / "adapter", place / out, **options)

    assert taken_by(merge("written", reflink="never"), place) >= ALL
    assert CHANGED <= taken_by(merge("shared"), place) <= CHANGED + SMALL
    assert CHANGED <= taken_by(merge("always", reflink="always"), place) <= CHANGED + SMALL
    receipts = []
    for name in ("written", "shared", "always"):
        tree = toys.tree(place / name)
        receipt = toys.read_json(place / name / "regraft" / "receipt.json")
        for key in ("output", "command", "created", "digest", "files"):
            receipt.pop(key)
        for figure in ("seconds", "peak_memory"):
            receipt["totals"].pop(figure)
        receipts.append((tree["model.safetensors"], receipt))
    assert receipts[0] == receipts[1] == receipts[2]


def test_the_way_back_and_the_way_over_share_too(place: Path) -> None:
    regraft.merge(place / "base", place / "adapter", place / "merged")
    regraft.merge(place / "base", place / "other", place / "expected")
    merged, swapped = place / "merged", place / "swapped"
    back = taken_by(lambda: regraft.unmerge(merged, place / "back"), place)
    over = taken_by(lambda: regraft.swap(merged, place / "other", swapped), place)
    for taken in (back, over):
        assert CHANGED <= taken <= CHANGED + SMALL
    assert weights(place / "back") == weights(place / "base")
    assert weights(swapped) == weights(place / "expected")
    shutil.rmtree(place / "base")
    shutil.rmtree(merged)
    assert regraft.verify(swapped).ok  # what was shared is there without its origin


def test_files_of_another_size_share_where_blocks_meet(place: Path) -> None:
    out = place / "out"
    taken = taken_by(lambda: regraft.convert(place / "base", out, shard_size="3MB"), place)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 2
    assert taken < ALL / 2  # each file begins where its own tensors lie in the base's
    for file in files:
        with safe_open(file, "np") as found, safe_open(place / "base/model.safetensors", "np") as b:
            for name in found.keys():  # noqa: SIM118
                np.testing.assert_array_equal(found.get_tensor(name), b.get_tensor(name))


def test_interrupted_work_goes_on_with_what_it_shares(place: Path) -> None:
    arguments = (place / "base", place / "adapter", place / "out")

    def stop(event: regraft.ProgressEvent) -> None:
        if event.stage == "finish":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regraft.merge(*arguments, progress=stop)
    assert (place / ".out.regraft").exists()
    assert taken_by(lambda: regraft.merge(*arguments), place) <= SMALL
    regraft.merge(place / "base", place / "adapter", place / "whole", reflink="never")
    assert weights(place / "out") == weights(place / "whole")


def test_a_system_that_stops_sharing_is_written_to(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def once(*arguments: int) -> bool:
        asked.append(arguments)
        return len(asked) == 1 and sharing.share_blocks(*arguments)

    monkeypatch.setattr(direct_io, "share_blocks", once)
    after = {"model.layers.1.mlp.table.weight": toys.draw(8 * ROWS, WIDTH)}
    toys.write_base(place / "base", base_tensors() | after)  # the merged tensor parts two ranges
    regraft.merge(place / "base", place / "adapter", place / "out", threads=1)
    assert len(asked) == 2
    monkeypatch.undo()
    regraft.merge(place / "base", place / "adapter", place / "whole", reflink="never")
    assert weights(place / "out") == weights(place / "whole")


def test_what_is_shared_needs_no_room(place: Path) -> None:
    arguments = (place / "base", place / "adapter", place / "out")
    needed = regraft.plan(*arguments, reflink="never").disk["needed"]
    leave_free(place, needed - ALL // 2)
    with pytest.raises(DiskSpaceError):
        regraft.merge(*arguments, reflink="never")
    regraft.merge(*arguments)
    assert regraft.verify(place / "out").ok


def leave_free(place: Path, nbytes: int) -> None:
    """Fill a disk until so many bytes are free."""
    with (place / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _free(place) - nbytes)


def test_a_plan_asks_for_the_room_of_what_changes(place: Path) -> None:
    arguments = (place / "base", place / "adapter", place / "out")
    whole = regraft.plan(*arguments, reflink="never").disk["needed"]
    shared = ALL - CHANGED
    for reflink in ("auto", "always"):
        needed = regraft.plan(*arguments, reflink=reflink).disk["needed"]
        assert shared - SMALL <= whole - needed <= shared
    done = regraft_command("merge", *arguments[:2], "-o", arguments[2], "--dry-run", "--json")
    assert json.loads(done.stdout)["disk"]["needed"] == needed
    assert not arguments[2].exists()


def test_a_plan_refuses_what_cannot_be_shared_and_shall_be(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    if sharing.shares_with(tmp_path / "base" / "model.safetensors", tmp_path):
        pytest.skip("temporary files lie where blocks are shared")
    arguments = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(EnvironmentShortfall, match="blocks of the disk cannot be shared"):
        regraft.plan(*arguments, reflink="always")
    assert regraft.plan(*arguments).disk["needed"] > ALL
    assert not regraft.plan(*arguments[:2], reflink="always").disk  # of no output nothing is known


def test_the_way_back_and_the_way_over_need_the_room_of_what_changes(place: Path) -> None:
    regraft.merge(place / "base", place / "adapter", place / "merged")
    back = (place / "merged", place / "back")
    over = (place / "merged", place / "other", place / "swapped")
    leave_free(place, SLACK_BYTES + ALL // 2)
    for work in (lambda **o: regraft.unmerge(*back, **o), lambda **o: regraft.swap(*over, **o)):
        with pytest.raises(DiskSpaceError, match="not enough disk space"):
            work(reflink="never")
        work()
    assert weights(place / "back") == weights(place / "base")
    assert regraft.verify(place / "swapped").ok


def test_too_little_room_for_what_changes_is_refused_and_leaves_nothing(place: Path) -> None:
    regraft.merge(place / "base", place / "adapter", place / "merged")
    before = {path.name for path in place.iterdir()}
    leave_free(place, SLACK_BYTES + CHANGED // 2)
    with pytest.raises(DiskSpaceError, match="not enough disk space"):
        regraft.unmerge(place / "merged", place / "back")
    with pytest.raises(DiskSpaceError, match="not enough disk space"):
        regraft.swap(place / "merged", place / "other", place / "swapped")
    assert {path.name for path in place.iterdir()} == before | {"filler"}


def test_where_blocks_cannot_be_shared_always_refuses(tmp_path: Path) -> None:
    """In memory, as here, no file system shares blocks; nor on ext4."""
    write_inputs(tmp_path)
    if sharing.shares_with(tmp_path / "base" / "model.safetensors", tmp_path):
        pytest.skip("temporary files lie where blocks are shared")
    arguments = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(EnvironmentShortfall, match="blocks of the disk cannot be shared") as caught:
        regraft.merge(*arguments, reflink="always")
    assert "model.safetensors" in str(caught.value)
    with pytest.raises(UsageError, match="auto, never, always"):
        regraft.merge(*arguments, reflink="sometimes")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "other"}
    regraft.merge(*arguments)
    regraft.merge(*arguments[:2], tmp_path / "never", reflink="never")
    assert weights(tmp_path / "out") == weights(tmp_path / "never")


def test_the_command_line_says_where_it_cannot(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    if sharing.shares_with(tmp_path / "base" / "model.safetensors", tmp_path):
        pytest.skip("temporary files lie where blocks are shared")
    inputs = (tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    done = regraft_command("merge", *inputs, "--reflink", "always", "--json")
    assert done.returncode == 4
    assert "XFS" in errors(done)["problems"][0]["expected"]


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"format": "pt", "made": "by hand" * 50}])
def test_data_begin_in_a_block_where_the_base_has_them(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    """Whatever the header of the base has; so the blocks of files on any disk would meet."""
    write_inputs(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    save_file(base_tensors(), path, metadata)
    regraft.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = read_header(path), read_header(tmp_path / "out" / "model.safetensors")
    for name, spec in before.tensors.items():
        assert (after.tensors[name].start - spec.start) % direct_io.BLOCK == 0
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert weights(tmp_path / "back") == path.read_bytes()
    regraft.swap(tmp_path / "out", tmp_path / "other", tmp_path / "swapped")
    regraft.merge(tmp_path / "base", tmp_path / "other", tmp_path / "expected")
    assert weights(tmp_path / "swapped") == weights(tmp_path / "expected")
