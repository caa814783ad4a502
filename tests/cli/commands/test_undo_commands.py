"""``unmerge``, ``swap`` and ``clean`` from the command line to the files, on real ones."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

from cli import tiny
from cli.kinds import Launch, Run
from cli.test_startup import WITHOUT_TORCH
from regraft.cli.texts import clean as clean_text
from regraft.errors import DiskSpaceError
from regraft.formats.safetensors import read_header

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def merged(run: Run, base: Path, adapter: Path, tmp_path: Path) -> Path:
    """The base with the adapter merged into it."""
    assert run("merge", base, adapter, "-o", tmp_path / "merged", "-q").exit_code == 0
    return tmp_path / "merged"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another adapter that fits the base."""
    tensors = {name: tensor / 3 for name, tensor in tiny.adapter_tensors().items()}
    return tiny.make_adapter(tmp_path / "other", tensors)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def words(text: str) -> str:
    """Return a text with single spaces."""
    return " ".join(text.split())


def flip_a_bit(folder: Path, tensor: str) -> None:
    """Change one bit of a tensor in a folder's only weights file."""
    path = folder / "model.safetensors"
    start = read_header(path).tensors[tensor].start
    content = bytearray(path.read_bytes())
    content[start + 5] ^= 1
    path.write_bytes(bytes(content))


# ---- unmerge


def test_unmerge_gives_the_base_back_and_sums_up(
    run: Run, base: Path, merged: Path, tmp_path: Path
) -> None:
    kept = contents(base)
    for path in base.iterdir():  # it is not needed any more
        path.unlink()
    result = run("unmerge", merged, "-o", tmp_path / "back")
    assert (result.exit_code, result.stderr) == (0, "")
    assert contents(tmp_path / "back") == kept
    said = words(result.stdout)
    assert f"base {base} (as the merge named it)" in said
    assert "restored 21 tensors" in said
    assert "every tensor has the digest of the base's" in said
    assert "files 2: config.json, model.safetensors" in said
    assert "MiB at peak, the cap is 512 MiB" in said
    assert said.endswith(f"un-merged into {tmp_path / 'back'}")
    assert "left out" not in said


def test_unmerge_says_what_the_bases_folder_held_besides(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "model.gguf").write_bytes(b"GGUF")
    run("merge", base, adapter, "-o", tmp_path / "merged", "-q")
    result = run("unmerge", tmp_path / "merged", "-o", tmp_path / "back")
    assert "left out 1: model.gguf (in the base's folder" in words(result.stdout)


def test_unmerge_as_json_is_the_report(run: Run, merged: Path, tmp_path: Path) -> None:
    answer = json.loads(run("unmerge", merged, "-o", tmp_path / "back", "--json").stdout)
    assert answer["files"] == ["config.json", "model.safetensors"]
    assert (answer["tensors"], answer["left_out"]) == (21, [])
    assert answer["output"] == str(tmp_path / "back")
    assert answer["seconds"] > 0


def test_unmerge_when_quiet_says_nothing(run: Run, merged: Path, tmp_path: Path) -> None:
    result = run("unmerge", merged, "-o", tmp_path / "back", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_unmerge_replaces_an_output_only_when_told_to(
    run: Run, base: Path, merged: Path, tmp_path: Path
) -> None:
    back = tiny.make_base(tmp_path / "back", vocab_size=7)
    assert run("unmerge", merged, "-o", back).exit_code == 3
    assert run("unmerge", merged, "-o", back, "--overwrite").exit_code == 0
    assert contents(back) == contents(base)


@pytest.mark.slow
def test_unmerge_works_without_torch(launch: Launch, merged: Path, tmp_path: Path) -> None:
    result = launch("-c", WITHOUT_TORCH, "unmerge", merged, "-o", tmp_path / "back", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---- what it refuses


def test_what_keeps_no_undo_is_refused(
    run: Run, base: Path, adapter: Path, other: Path, tmp_path: Path
) -> None:
    run("merge", base, adapter, "-o", tmp_path / "plain", "--no-undo", "-q")
    assert not (tmp_path / "plain" / "regraft" / "undo").exists()
    for command in (
        ("unmerge", tmp_path / "plain", "-o", tmp_path / "back"),
        ("unmerge", base, "-o", tmp_path / "back"),
        ("swap", tmp_path / "plain", other, "-o", tmp_path / "back"),
    ):
        result = run(*command)
        assert result.exit_code == 3
        told = "is no model that regraft merged" if base in command else "keeps no undo patch"
        assert told in result.stderr
        assert not (tmp_path / "back").exists()


def test_an_edited_weight_is_named_and_nothing_is_written(
    run: Run, merged: Path, other: Path, tmp_path: Path
) -> None:
    flip_a_bit(merged, Q0)
    for command in (("unmerge", merged), ("swap", merged, other)):
        result = run(*command, "-o", tmp_path / "back", "--json")
        assert result.exit_code == 3
        error = json.loads(result.stdout)["error"]
        assert error["type"] == "MismatchError"
        assert [problem["where"] for problem in error["problems"]] == [f"tensor {Q0!r}"]
        assert [path.name for path in tmp_path.iterdir() if "back" in path.name] == []


def test_an_edited_weight_that_no_adapter_touches_is_named_too(
    run: Run, merged: Path, tmp_path: Path
) -> None:
    flip_a_bit(merged, "model.norm.weight")
    result = run("unmerge", merged, "-o", tmp_path / "back")
    assert result.exit_code == 3
    assert "tensor 'model.norm.weight'" in result.stderr


def test_a_missing_tensor_is_named(run: Run, merged: Path, tmp_path: Path) -> None:
    path = merged / "model.safetensors"
    tensors = load_file(path)
    del tensors[Q0]
    save_file(tensors, path, {"format": "pt"})
    result = run("unmerge", merged, "-o", tmp_path / "back")
    assert result.exit_code == 3
    assert Q0 in result.stderr


def test_without_a_copy_of_the_adapters_they_have_to_be_given(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged, back = tmp_path / "merged", tmp_path / "back"
    run("merge", base, f"{adapter}=0.5", "-o", merged, "--no-keep-adapter", "-q")
    assert not list(merged.rglob("adapter_model.safetensors"))
    refused = run("unmerge", merged, "-o", back)
    assert refused.exit_code == 3
    assert "kept no copy of its adapters" in refused.stderr
    assert "--adapter" in refused.stderr
    unweighted = run("unmerge", merged, "-o", back, "--adapter", adapter)
    assert unweighted.exit_code == 2
    assert f"expected {adapter}=0.5" in unweighted.stderr
    assert not back.exists()
    assert run("unmerge", merged, "-o", back, "--adapter", f"{adapter}=0.5").exit_code == 0
    assert contents(back) == contents(base)


def test_another_adapter_than_the_merged_one_is_refused(
    run: Run, base: Path, adapter: Path, other: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    run("merge", base, adapter, "-o", merged, "--no-keep-adapter", "-q")
    result = run("unmerge", merged, "-o", tmp_path / "back", "--adapter", other)
    assert result.exit_code == 3
    assert not (tmp_path / "back").exists()


def test_an_output_in_the_merged_model_is_wrong_usage(run: Run, merged: Path) -> None:
    assert run("unmerge", merged, "-o", merged / "back").exit_code == 2


# ---- swap


def test_swap_makes_what_a_merge_of_the_base_makes(
    run: Run, base: Path, merged: Path, other: Path, tmp_path: Path
) -> None:
    run("merge", base, f"{other}=0.5", "-o", tmp_path / "direct", "-q")
    result = run("swap", merged, f"{other}=0.5", "-o", tmp_path / "swapped")
    assert (result.exit_code, result.stderr) == (0, "")
    direct, swapped = contents(tmp_path / "direct"), contents(tmp_path / "swapped")
    assert direct.keys() == swapped.keys()
    differing = {name for name in direct if direct[name] != swapped[name]}
    assert differing == {"README.md", "regraft/receipt.json"}  # they name the output and the call
    said = words(result.stdout)
    assert f"base {base} adapter {other} x 0.5 tensors 21: 4 merged, 17 copied" in said
    assert f"regraft unmerge {tmp_path / 'swapped'} -o BASE" in said


def test_swap_as_json_is_the_receipt(run: Run, merged: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "swapped"
    result = run("swap", merged, other, "-o", out, "--dtype", "bfloat16", "--json")
    answer, written = (
        json.loads(result.stdout),
        json.loads((out / "regraft/receipt.json").read_text()),
    )
    assert answer.pop("quiet") is False
    assert answer["tensors"] == written["tensors"]
    assert {record["dtype"] for record in answer["tensors"]} == {"BF16"}
    command = f"regraft swap {merged} {other} --out {out} --dtype bfloat16"
    assert written["command"] == command


def test_swap_can_be_undone_and_swapped_again(
    run: Run, base: Path, merged: Path, other: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("swap", merged, other, "-o", first, "--shard-size", "4kB").exit_code == 0
    assert run("swap", first, tmp_path / "adapter", "-o", second).exit_code == 0
    assert (second / "model.safetensors").read_bytes() == (
        merged / "model.safetensors"
    ).read_bytes()
    assert run("unmerge", second, "-o", tmp_path / "back").exit_code == 0
    assert contents(tmp_path / "back") == contents(base)


def test_swap_keeps_no_undo_when_told_so(
    run: Run, base: Path, adapter: Path, other: Path, tmp_path: Path
) -> None:
    merged, out = tmp_path / "merged", tmp_path / "swapped"
    run("merge", base, adapter, "-o", merged, "--no-keep-adapter", "-q")
    assert run("swap", merged, other, "-o", out).exit_code == 3
    result = run("swap", merged, other, "-o", out, "--merged-adapter", adapter, "--no-undo")
    assert result.exit_code == 0
    assert "regraft unmerge" not in result.stdout
    assert not (out / "regraft" / "undo").exists()
    recorded = json.loads((out / "regraft" / "receipt.json").read_text())["command"]
    assert recorded == (
        f"regraft swap {merged} {other} --out {out} --merged-adapter {adapter} --no-undo"
    )


# ---- interrupted work, and clean


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold the lock on a work folder, as a process that works in it does."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


Cut = Callable[..., Result]
"""Cuts a merge off by an exception and returns how it ended."""


@pytest.fixture
def cut(
    monkeypatch: pytest.MonkeyPatch, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> Cut:
    """Cut a merge off when the weights are done."""

    def call(error: BaseException, *options: str) -> Result:
        def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("regraft.merging.building.write_rest", fail)
            return run("merge", base, adapter, "-o", tmp_path / "out", *options)

    return call


def test_interrupted_work_is_kept_and_said_so(
    cut: Cut, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    result = cut(KeyboardInterrupt())
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == (
        "regraft: interrupted. The work so far is kept: the same command goes on from there, "
        f"`regraft clean {tmp_path / 'out'}` removes it\n"
    )
    assert not (tmp_path / "out").exists()
    weights = tmp_path / ".out.regraft" / "out" / "model.safetensors"
    inode = weights.stat().st_ino
    assert run("merge", base, adapter, "-o", tmp_path / "out", "-q").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == inode
    assert not (tmp_path / ".out.regraft").exists()


def test_work_that_is_kept_after_an_error_is_a_note(cut: Cut) -> None:
    error = DiskSpaceError("the disk is full", where="a file")
    result = cut(error, "--json")
    assert result.exit_code == 4
    told = json.loads(result.stdout)["error"]
    (note,) = told["notes"]
    assert note.startswith("the work so far is kept")
    assert result.stderr == f"error: a file: the disk is full\nnote: {note}\n"


def test_clean_removes_what_is_left_and_says_how_much(cut: Cut, run: Run, tmp_path: Path) -> None:
    cut(KeyboardInterrupt())
    looked = run("clean", tmp_path, "--dry-run")
    assert looked.exit_code == 0
    lines = looked.stdout.splitlines()
    assert lines[0].split() == ["folder", "output", "size", "age", "state"]
    assert lines[1].split()[:2] == [str(tmp_path / ".out.regraft"), str(tmp_path / "out")]
    assert lines[1].endswith("would be removed")
    assert lines[-1].startswith("1 folder, ")
    assert (tmp_path / ".out.regraft").exists()
    cleaned = run("clean", tmp_path / "out")
    assert cleaned.exit_code == 0
    assert cleaned.stdout.splitlines()[-1].endswith("removed")
    assert not (tmp_path / ".out.regraft").exists()
    assert run("clean", tmp_path).stdout == "nothing to clean\n"


def test_clean_leaves_alone_what_is_in_use(cut: Cut, run: Run, tmp_path: Path) -> None:
    cut(KeyboardInterrupt())
    with in_use(tmp_path / ".out.regraft"):
        result = run("clean", tmp_path, "--json")
        (leftover,) = json.loads(result.stdout)["leftovers"]
        assert (leftover["state"], leftover["busy"]) == ("in use", True)
        assert run("clean", tmp_path).stdout.endswith("0 folders, 0 B removed\n")
    assert (tmp_path / ".out.regraft").exists()
    assert run("clean", tmp_path).exit_code == 0
    assert not (tmp_path / ".out.regraft").exists()


def test_clean_looks_in_the_current_folder_by_itself(
    cut: Cut, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(KeyboardInterrupt())
    monkeypatch.chdir(tmp_path)
    (leftover,) = json.loads(run("clean", "--json").stdout)["leftovers"]
    assert (leftover["output"], leftover["state"]) == ("out", "removed")
    assert json.loads(run("clean", "--json").stdout) == {"leftovers": []}


def test_clean_of_no_folder_is_3(run: Run, tmp_path: Path) -> None:
    assert run("clean", tmp_path / "nowhere").exit_code == 3


def test_another_process_at_the_same_output_is_4(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    place = tmp_path / ".out.regraft"
    place.mkdir()
    with in_use(place):
        result = run("merge", base, adapter, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["error"]["type"] == "BusyError"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 seconds"),
        (1.9, "1 second"),
        (60, "1 minute"),
        (7300, "2 hours"),
        (86400 * 3.5, "3 days"),
    ],
)
def test_age_is_told_in_one_unit(seconds: float, text: str) -> None:
    assert clean_text.age(seconds) == text


# ---- merge's own part


def test_a_merge_says_what_its_undo_takes(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a folder"
    said = words(run("merge", base, adapter, "-o", out).stdout)
    assert "of the model): `regraft unmerge " in said
    assert f"'{out}' -o BASE`" in said
    patch = out / "regraft" / "undo" / "patch.safetensors"
    receipt = json.loads((out / "regraft" / "receipt.json").read_text())
    assert receipt["totals"]["undo_bytes"] == patch.stat().st_size
    without = run("merge", base, adapter, "-o", tmp_path / "other", "--no-undo")
    assert "regraft unmerge" not in without.stdout


def test_a_swap_moves_numbers_as_a_merge_does(
    run: Run, merged: Path, other: Path, tmp_path: Path
) -> None:
    run("swap", merged, other, "-o", tmp_path / "swapped", "-q")
    written = load_file(tmp_path / "swapped" / "model.safetensors")
    factors = {n: t.astype(float) / 3 for n, t in tiny.adapter_tensors().items()}
    key = f"base_model.model.{Q0.removesuffix('.weight')}"
    delta = factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(
        written[Q0], tiny.base_tensors()[Q0] + 2.0 * delta, rtol=1e-5, atol=1e-6
    )
