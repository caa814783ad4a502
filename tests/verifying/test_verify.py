"""A merged model is held against its receipt: every bit of every file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging import toys
from regraft.merging.files import receipt as receipts
from regraft.merging.files.receipt import read_receipt, receipt_bytes
from regraft.merging.files.side_files import json_bytes
from regraft.verifying.report import Difference

RECEIPT = "regraft/receipt.json"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensors in two files, an index, a config, a tokenizer, a template in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = {name: toys.draw(2, 3, dtype=toys.BF16) for name in ("a.weight", "b.weight")}
    base = toys.write_base(folder / "base", weights, {"dtype": "bfloat16"}, [["a.weight"],
                           ["b.weight"]])  # fmt: skip
    toys.write_json(base / "tokenizer.json", {"version": "1.0"})
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    factors = toys.lora("a", 2, 3, rank=1)
    adapter = toys.write_adapter(folder / "adapter", factors, r=1, target_modules=["a"])
    regraft.merge(base, adapter, folder / "out", command="regraft merge")
    return folder / "out"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model that nobody merged."""
    return toys.write_base(tmp_path / "base")


@pytest.fixture
def out(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny output, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "out"))


def files_of(folder: Path) -> list[Path]:
    """Return every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, at: int, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def found(folder: Path) -> bool:
    """Whether a damage is noticed: a difference, or a receipt that is not believed."""
    try:
        return not regraft.verify(folder, receipt_only=True, threads=1).ok
    except regraft.FormatError as error:
        return RECEIPT in str(error)


def test_what_was_just_written_is_what_it_should_be(tiny: Path) -> None:
    report = regraft.verify(tiny, receipt_only=True)
    assert report.ok
    assert report.verdict == "exact"
    assert report.differences == report.tensors == report.warnings == ()
    names = {path.relative_to(tiny).as_posix(): path for path in files_of(tiny)}
    sizes = {name: path.stat().st_size for name, path in names.items() if name != RECEIPT}
    assert report.checked == {
        "files": len(sizes) - 2, "headers": 2, "tensors": 2, "bytes": sum(sizes.values()),
    }  # fmt: skip


@pytest.fixture
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a receipt of the same bytes as one before not decoded again: half of what verify does.

    One of other bytes is read as ever.
    """
    read, known = receipts.read_receipt, dict[bytes, receipts.Receipt]()

    def read_new(path: Path) -> receipts.Receipt:
        content = path.read_bytes()
        if content not in known:
            known[content] = read(path)
        return known[content]

    monkeypatch.setattr(receipts, "read_receipt", read_new)


@pytest.mark.slow
@pytest.mark.usefixtures("_read_once")
def test_a_flipped_bit_in_any_byte_is_found(out: Path) -> None:
    """Every bit of every byte is flipped by scripts/torture/bitflips.py."""
    draw, missed = random.Random(4), []
    for path in files_of(out):
        original = path.read_bytes()
        step = 1 if path.parent == out and path.suffix == ".safetensors" else 11
        for at in range(draw.randrange(step), len(original), step):
            flip(path, at, draw.randrange(8))
            if not found(out):
                missed.append((path.name, at))
            path.write_bytes(original)
    assert missed == []
    assert regraft.verify(out).ok


@pytest.mark.slow
@pytest.mark.usefixtures("_read_once")
def test_every_bit_of_a_header_is_found(out: Path) -> None:
    content = (out / FIRST).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for at in range(length):
        for bit in range(8):
            flip(out / FIRST, at, bit)
            report = regraft.verify(out, receipt_only=True, threads=1)
            assert Difference(FIRST, "", "its header has changed") in report.differences
            (out / FIRST).write_bytes(content)


def test_a_flip_is_reported_by_file_and_tensor(out: Path) -> None:
    flip(out / FIRST, (out / FIRST).stat().st_size - 1, 3)
    flip(out / "additional_chat_templates" / "tool.jinja", 0, 0)
    report = regraft.verify(out)
    assert report.verdict == "different"
    assert report.differences == (
        Difference("additional_chat_templates/tool.jinja", "", "its bytes have changed"),
        Difference(FIRST, "a.weight", "its bytes have changed"),
    )


def _rename(out: Path, old: str, new: str) -> None:
    (out / old).rename(out / new)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a weight file is gone": (lambda out: (out / FIRST).unlink(), FIRST, "is missing"),
    "a side file is gone": (
        lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json", "is missing",
    ),
    "a file more": (
        lambda out: (out / "evil.py").write_text("1"), "evil.py", "the merge did not write",
    ),
    "a hidden file more": (
        lambda out: (out / ".env").write_text("1"), ".env", "the merge did not write",
    ),
    "a file more beside the receipt": (
        lambda out: (out / "regraft" / "x").write_text("1"), "regraft/x", "did not write",
    ),
    "a folder more": (
        lambda out: [(out / "x" / "y").mkdir(parents=True), (out / "x" / "y" / "z").touch()],
        "x/", "a folder of 1 file ",
    ),
    "a link more": (lambda out: (out / "link").symlink_to("/etc"), "link", "did not write"),
    "a link for a file": (
        lambda out: [_rename(out, "config.json", "c"), (out / "config.json").symlink_to("nowhere")],
        "config.json", "no such file",
    ),
    "a pipe for a file": (
        lambda out: [(out / "config.json").unlink(), os.mkfifo(out / "config.json")],
        "config.json", "cannot be read as a file",
    ),
    "a weight file cut short": (
        lambda out: os.truncate(out / FIRST, (out / FIRST).stat().st_size - 1),
        FIRST, "cut short",
    ),
    "a weight file of nothing": (lambda out: os.truncate(out / FIRST, 0), FIRST, "not a whole"),
    "a weight file with more": (
        lambda out: os.truncate(out / FIRST, (out / FIRST).stat().st_size + 1),
        FIRST, "bytes follow",
    ),
    "a weight file of other tensors": (
        lambda out: toys.save_file({"c.weight": toys.draw(2, 3)}, out / FIRST),
        FIRST, "header has changed",
    ),
    "an empty side file": (
        lambda out: os.truncate(out / "README.md", 0), "README.md", "have changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_other_damage_is_a_difference_too(out: Path, what: str) -> None:
    damage, file, said = DAMAGES[what]
    damage(out)
    report = regraft.verify(out)
    assert report.verdict == "different"
    assert any(d.file == file and said in d.what for d in report.differences), report.differences


def test_tensors_of_another_name_dtype_or_shape_are_told(out: Path) -> None:
    held = {"a.weight": toys.draw(3, 2, dtype=toys.BF16), "z": toys.draw(1)}
    toys.save_file(held, out / FIRST, {"format": "pt"})
    told = {(d.tensor, d.what) for d in regraft.verify(out).differences if d.file == FIRST}
    assert told == {
        ("", "its header has changed"),
        ("a.weight", "it is BF16 [3, 2] and was written as BF16 [2, 3]"),
        ("z", "a tensor that the merge did not write"),
    }


def test_what_the_file_system_adds_is_no_difference(out: Path) -> None:
    (out / FIRST).chmod(0o600)
    os.utime(out / "config.json", (1, 1))
    assert regraft.verify(out).ok


def test_a_copy_elsewhere_and_behind_a_link_verifies(out: Path, tmp_path: Path) -> None:
    moved = out.rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(moved)
    assert regraft.verify(moved).ok
    assert regraft.verify(tmp_path / "link").ok


def test_links_inside_the_folder_are_no_difference_if_the_bytes_are_the_same(out: Path) -> None:
    shutil.copytree(out, copy := out.with_name("copy"))
    blob = copy / "README.md"
    assert regraft.verify(copy).ok
    blob.write_bytes(blob.read_bytes())
    blob.rename(blob.with_name("blob"))
    blob.symlink_to("blob")
    assert [d.file for d in regraft.verify(copy).differences] == ["blob"]


def test_a_snapshot_in_the_hub_s_cache_verifies(out: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--org--name"
    snapshot, blobs = hub / "snapshots" / "abc", hub / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(files_of(out)):
        shutil.copy(path, blobs / str(number))
        place = snapshot / path.relative_to(out)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert regraft.verify(snapshot).ok
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(out / "README.md")
    (difference,) = regraft.verify(snapshot).differences
    assert (difference.file, "outside of the folder" in difference.what) == ("README.md", True)


@pytest.mark.parametrize("name", [FIRST, "README.md", RECEIPT, "regraft/undo/undo.json"])
def test_a_link_to_elsewhere_is_a_difference_whatever_it_holds(out: Path, name: str) -> None:
    there = out.with_name("there")
    (out / name).rename(there)
    (out / name).symlink_to(there)
    report = regraft.verify(out)
    assert report.verdict == "different"
    (difference,) = report.differences
    assert (difference.file, difference.tensor) == (name, "")
    assert difference.what == "a link to outside of the folder, where the merge wrote a file"


def test_empty_folders_are_a_difference_each_the_highest_named(out: Path) -> None:
    (out / "x" / "y").mkdir(parents=True)
    (out / "regraft" / "z").mkdir()
    report = regraft.verify(out)
    assert report.verdict == "different"
    assert [d.file for d in report.differences] == ["regraft/z/", "x/"]
    assert all(d.what == "an empty folder that the merge did not write" for d in report.differences)


# Receipts that cannot be gone by


def test_a_receipt_that_is_not_as_written_cannot_be_gone_by(out: Path) -> None:
    value = json.loads((out / RECEIPT).read_text())
    (out / RECEIPT).write_text(json.dumps(value))
    with pytest.raises(regraft.FormatError, match="not as it was written"):
        regraft.verify(out)


def test_without_a_receipt_it_says_what_to_give(out: Path) -> None:
    shutil.rmtree(out / "regraft")
    with pytest.raises(regraft.InputError, match="--base BASE --adapter ADAPTER"):
        regraft.verify(out)


def test_a_single_file_has_no_receipt(base: Path) -> None:
    with pytest.raises(regraft.InputError, match="a folder with its receipt"):
        regraft.verify(base / "model.safetensors")


def test_a_receipt_names_no_path_that_is_opened(out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    receipt = read_receipt(out / RECEIPT)
    names = {"../secret": "0" * 64, str(secret): "0" * 64, "config.json/..": "0" * 64}
    records = tuple(replace(record, file="../secret") for record in receipt.tensors)
    changed = replace(receipt, files={**receipt.files, **names}, tensors=records)
    (out / RECEIPT).write_bytes(receipt_bytes(changed))
    told = {d.file: d.what for d in regraft.verify(out).differences}
    assert {told[name] for name in names} == {"the file is missing"}


def test_one_of_the_first_version_is_checked_as_far_as_it_goes(out: Path) -> None:
    value = json.loads((out / RECEIPT).read_text())
    old = {k: v for k, v in value.items() if k not in ("digest", "files", "headers")}
    (out / RECEIPT).write_bytes(json_bytes(old))
    (out / "config.json").write_text("{}")
    report = regraft.verify(out)
    assert (report.ok, report.verdict) == (False, "unjudged")
    assert "does not speak of the other files" in report.conclusions[0]
    assert "only tensors were checked" in report.warnings[0]
    flip(out / FIRST, (out / FIRST).stat().st_size - 1, 0)
    assert not regraft.verify(out).ok


# Base and adapters that the receipt names


def _said(report: regraft.VerifyReport) -> str:
    return "\n".join(report.conclusions)


@pytest.fixture
def trio(tiny: Path, tmp_path: Path) -> Path:
    """A folder of its own with a base, an adapter, and ``out``, the merge of both."""
    for name in ("base", "adapter"):
        shutil.copytree(tiny.parent / name, tmp_path / name)
    regraft.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    return tmp_path


def test_the_merge_is_done_again_with_what_the_receipt_names(trio: Path) -> None:
    shutil.rmtree(trio / "adapter")  # a copy was kept
    report = regraft.verify(trio / "out")
    assert {tensor.verdict for tensor in report.tensors} == {"exact"}
    assert report.ok
    assert report.checked["judged"] == 2
    assert f"done again with {trio}/base and {trio}/adapter, which the receipt names" in _said(
        report
    )


def test_adapters_of_which_no_copy_was_kept_are_looked_for_where_they_were(trio: Path) -> None:
    for undo in ({"keep_adapter": False}, {"undo": False}):
        regraft.merge(trio / "base", trio / "adapter", trio / "out", overwrite=True, **undo)
        assert regraft.verify(trio / "out").checked["judged"] == 2
    (trio / "adapter").rename(trio / "moved")
    report = regraft.verify(trio / "out")
    assert report.verdict == "exact"
    assert report.tensors == ()
    assert "the adapter that the receipt names is not here" in _said(report)
    report = regraft.verify(trio / "out", adapters=trio / "moved")
    assert report.checked["judged"] == 2
    assert f"with {trio}/base and {trio}/moved" in _said(report)


def test_a_base_that_is_gone_is_said_and_the_receipt_decides(trio: Path) -> None:
    (trio / "base").rename(trio / "moved")
    report = regraft.verify(trio / "out")
    assert report.verdict == "exact"
    assert f"the base that the receipt names is not here ({trio}/base)" in _said(report)
    report = regraft.verify(trio / "out", base=trio / "moved")
    assert {tensor.verdict for tensor in report.tensors} == {"exact"}
    assert f"with {trio}/moved and {trio}/adapter" in _said(report)


def test_a_base_on_the_hub_is_not_fetched_unasked(trio: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(trio)
    Path("org").mkdir()
    Path("base").rename("org/name")
    regraft.merge("org/name", "adapter", "out", overwrite=True)
    Path("org").rename("gone")
    assert "is not here (org/name)" in _said(regraft.verify("out"))


@pytest.mark.parametrize("change", ["values", "sizes", "none left"])
def test_another_base_in_its_place_is_told_from_a_wrong_merge(trio: Path, change: str) -> None:
    shape = (4, 3) if change == "sizes" else (2, 3)
    names = ("c.weight",) if change == "none left" else ("a.weight", "b.weight")
    weights = {name: toys.draw(*shape, seed=9, dtype=toys.BF16) for name in names}
    shutil.rmtree(trio / "base")
    toys.write_base(trio / "base", weights, {"dtype": "bfloat16"})
    report = regraft.verify(trio / "out")
    assert report.verdict == "exact"
    assert f"{trio}/base is not the base that was merged any more" in _said(report)
    assert report.tensors == ()


def test_another_adapter_in_its_place_is_not_taken_for_it(trio: Path) -> None:
    regraft.merge(trio / "base", trio / "adapter", trio / "out", overwrite=True, undo=False)
    factors = toys.lora("a", 2, 3, rank=1, seed=5)
    shutil.rmtree(trio / "adapter")
    toys.write_adapter(trio / "adapter", factors, r=1, target_modules=["a"])
    report = regraft.verify(trio / "out")
    assert report.verdict == "exact"
    assert "this is not the adapter that was merged" in _said(report)


def test_a_bit_of_the_base_that_changed_is_not_called_rounding(trio: Path) -> None:
    path = trio / "base" / FIRST
    flip(path, path.stat().st_size - 2, 0)
    report = regraft.verify(trio / "out")
    assert report.verdict == "exact"
    assert f"{trio}/base is not the base that was merged any more" in _said(report)


def test_what_is_named_and_is_not_what_the_receipt_has_is_told(trio: Path) -> None:
    factors = toys.lora("a", 2, 3, rank=1, seed=5)
    other = toys.write_adapter(trio / "other", factors, r=1, target_modules=["a"])
    report = regraft.verify(trio / "out", base=trio / "base", adapters=other)
    assert report.verdict == "different"
    told = f"{other} is not the adapter that the receipt has, {trio}/adapter"
    assert told in report.conclusions[1]  # before what follows from it
    assert "is not the base" not in _said(report)
    weights = {n: toys.draw(2, 3, seed=9, dtype=toys.BF16) for n in ("a.weight", "b.weight")}
    base = toys.write_base(trio / "b2", weights, {"dtype": "bfloat16"})
    report = regraft.verify(trio / "out", base=base, adapters=trio / "adapter")
    assert f"{base} is not the base that the receipt has, {trio}/base" in _said(report)


def test_a_pipe_where_the_base_was_is_not_waited_for(trio: Path) -> None:
    shutil.rmtree(trio / "base")
    os.mkfifo(trio / "base")
    assert "the merge was not done again" in _said(regraft.verify(trio / "out"))


def test_a_damaged_copy_of_an_adapter_is_a_difference(trio: Path) -> None:
    (config,) = (trio / "out/regraft/undo").rglob("adapter_config.json")
    config.write_text(config.read_text().replace('"r": 1', '"r": 8'))
    report = regraft.verify(trio / "out")
    assert [d.file for d in report.differences] == [config.relative_to(trio / "out").as_posix()]
    assert "was not done again" in _said(report)
    assert "r = 8" in _said(report)


def test_damage_is_found_and_said_by_tensor(trio: Path) -> None:
    path = trio / "out" / FIRST
    flip(path, path.stat().st_size - 1, 4)
    report = regraft.verify(trio / "out")
    assert report.verdict == "different"
    assert [d.tensor for d in report.differences] == ["a.weight"]
    assert [t.name for t in report.tensors if t.verdict != "exact"] == ["a.weight"]


# The call


def test_a_base_without_adapters_is_a_contradiction_if_no_receipt_names_them(base: Path) -> None:
    for arguments in ({"base": base}, {"base": base, "adapters": []}):
        with pytest.raises(regraft.UsageError, match="together"):
            regraft.verify(base, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", ["base", "adapters", "prompts"])
def test_the_receipt_alone_is_compared_with_nothing_else(tiny: Path, more: str) -> None:
    arguments: dict[str, object] = {"receipt_only": True, more: str(tiny)}
    with pytest.raises(regraft.UsageError, match=f"--{more.removesuffix('s')}"):
        regraft.verify(tiny, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"max_memory": "much"}])
def test_choices_are_checked(tiny: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(regraft.UsageError):
        regraft.verify(tiny, **arguments)  # type: ignore[arg-type]


def test_nothing_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(regraft.InputError, match="no such"):
        regraft.verify(tmp_path / "nothing")


def test_progress_counts_every_byte(tiny: Path) -> None:
    events: list[regraft.ProgressEvent] = []
    regraft.verify(tiny, receipt_only=True, progress=events.append)
    assert {event.stage for event in events} == {"verify"}
    assert events[-1].done == events[-1].total > 0
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert {"a.weight", "b.weight"} <= {event.tensor for event in events}


def test_an_error_in_progress_stops_it(tiny: Path) -> None:
    def fail(event: regraft.ProgressEvent) -> None:
        raise ValueError(event.stage)

    with pytest.raises(ValueError, match="verify"):
        regraft.verify(tiny, progress=fail)


def test_the_report_is_json(out: Path) -> None:
    flip(out / "README.md", 0, 0)
    report = json.loads(json.dumps(regraft.verify(out).to_json()))
    assert report["verdict"] == "different"
    assert report["differences"] == [
        {"file": "README.md", "tensor": "", "what": "its bytes have changed"}
    ]
