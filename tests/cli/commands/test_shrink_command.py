"""``regraft shrink``: what it passes on, what it prints, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.kinds import Launch, Run
from cli.test_commands import Called
from cli.test_startup import HEAVY, WITHOUT_TORCH, loaded_by
from merging import toys
from regraft.cli.texts.shrink import render
from regraft.shrinking.report import EmbeddingCopy, ShrinkReport, ShrunkModule


def module(name: str, before: int = 16, after: int = 4, error: float = 0.05) -> ShrunkModule:
    """Return a linear layer whose delta, of norm 2, is off by ``error``."""
    return ShrunkModule(name, "linear", before, after, 1 - error**2, 2.0, 2.0 * error)


def report(**fields: Any) -> ShrinkReport:
    """Return the report of an adapter of two modules, but for the fields given."""
    usual: dict[str, Any] = {
        "adapter": "org/style",
        "revision": "abc",
        "base": None,
        "output": "./small",
        "dtype": "bfloat16",
        "dtypes_before": ("float32",),
        "rank": None,
        "energy": 0.99,
        "uniform": False,
        "error": 0.0321,
        "modules": (module("a", error=0.02), module("b", after=5, error=0.04)),
        "copies": (),
        "tensors": 4,
        "bytes_before": 16_800_000,
        "bytes_after": 8_410_000,
        "files": ("README.md",),
        "left_out": ("optimizer.pt", "runs/"),
        "warnings": (),
        "notes": (),
        "seconds": 1.25,
        "peak_memory": 90 * 2**20,
    }
    return ShrinkReport(**usual | fields)


def words(found: ShrinkReport) -> list[str]:
    """Return the lines of the text, each with single blanks."""
    return [" ".join(line.split()) for line in render(found).splitlines()]


# ---- the text


def test_the_summary() -> None:
    assert words(report()) == [
        "adapter org/style at abc",
        "dtype float32 -> bfloat16",
        "rank 2 modules: 16 -> 4..5 (4.5 on average)",
        "error |delta-delta'|/|delta| 3.21% over all modules, rounding included",
        "size 16.8 MB -> 8.41 MB (50.1%), 4 tensors",
        "files 1: README.md",
        "left out 2: optimizer.pt, runs/",
        "time 1.25 s",
        "memory 90 MiB at peak",
        "",
        "farthest off |delta-delta'|/|delta| rank kept",
        "b 4% 16 -> 5 99.8%",
        "a 2% 16 -> 4 100%",
        "",
        "shrunk into ./small",
    ]


def test_ranks_that_stay_and_no_error_take_no_table() -> None:
    same = report(modules=(module("a", 8, 8, 0.0),), dtypes_before=("bfloat16",), error=0.0)
    lines = words(same)
    assert "dtype bfloat16" in lines
    assert "rank 1 module: 8, as before" in lines
    assert not any(line.startswith("farthest off") for line in lines)


def test_an_adapter_of_whole_tensors_has_no_ranks() -> None:
    lines = words(report(modules=(), dtypes_before=(), error=0.0))
    assert not any(line.startswith(("rank", "error")) for line in lines)


def test_copies_are_told_by_what_became_of_them() -> None:
    copies = (
        EmbeddingCopy("embed", 262_000_000, "dropped"),
        EmbeddingCopy("head", 262_000_000, "differs"),
    )
    lines = words(report(copies=copies, notes=("head is kept", "be careful")))
    told = (
        "copies 1 embedding dropped, 262 MB (the base's own), 1 embedding kept, 262 MB (see below)"
    )
    assert told in lines
    assert lines[lines.index("note: head is kept") + 1] == "note: be careful"


def test_only_the_farthest_are_listed() -> None:
    modules = tuple(module(f"m{number}", error=0.01 * (number + 1)) for number in range(9))
    lines = words(report(modules=modules))
    start = lines.index("farthest off |delta-delta'|/|delta| rank kept")
    assert [line.split()[0] for line in lines[start + 1 : start + 6]] == [
        *("m8", "m7", "m6", "m5", "m4"),
    ]
    assert lines[start + 6] == ""


# ---- the command


def test_everything_is_passed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink = Called(report())
    monkeypatch.setattr("regraft.shrinking.verb.shrink", shrink)
    result = run(
        *("shrink", "org/style", "-o", "small", "--dtype", "float16", "--rank", "4"),
        *("--base", "org/base", "--overwrite", "--token", "secret"),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert shrink.named == {
        "adapter": "org/style",
        "out": "small",
        "dtype": "float16",
        "rank": 4,
        "energy": None,
        "uniform": None,
        "base": "org/base",
        "overwrite": True,
        "token": "secret",
        "progress": None,
    }
    run("shrink", "a", "-o", "b", "--energy", "0.99")
    assert (shrink.named["energy"], shrink.named["dtype"]) == (0.99, "bfloat16")
    assert "shrunk into ./small" in result.stdout
    assert run("shrink", "a", "-o", "b", "-q").stdout == ""


def test_as_json_it_is_the_report(run: Run, tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a")
    result = run("shrink", adapter, "-o", tmp_path / "s", "--rank", "2", "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert result.stderr.startswith(f"warning: {answer['warnings'][0][:60]}")
    assert answer["rank"] == 2
    assert [m["rank_after"] for m in answer["modules"]] == [2] * 4
    assert 0 < answer["modules"][0]["error"] < 1
    assert (tmp_path / "s" / "adapter_model.safetensors").stat().st_size == answer["bytes_after"]


def test_an_output_that_exists_is_3_in_text_and_in_json(run: Run, tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a")
    toys.write_adapter(tmp_path / "s")
    result = run("shrink", adapter, "-o", tmp_path / "s", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["type"] == "OutputExistsError"
    assert run("shrink", adapter, "-o", tmp_path / "s", "--overwrite").exit_code == 0


# ---- in a process of its own


def test_its_help_loads_nothing_heavy(launch: Launch) -> None:
    assert loaded_by(launch, "shrink", "--help") & HEAVY == set()


@pytest.mark.slow
def test_it_compiles_nothing_and_needs_no_torch(launch: Launch, tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a")
    found = loaded_by(launch, "shrink", adapter, "-o", tmp_path / "s", "-q")
    assert found & HEAVY == {"numpy"}
    done = launch("-c", WITHOUT_TORCH, "shrink", adapter, "-o", tmp_path / "t", "--rank", "1")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)  # the warning of the error
