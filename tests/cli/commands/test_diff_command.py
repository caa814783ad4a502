"""``regraft diff``: what it passes on, what it prints, and the exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.kinds import Launch, Run
from cli.test_commands import Called
from cli.test_startup import HEAVY, loaded_by
from merging import toys
from merging.processes import errors, regraft_command
from regraft.cli.texts.diff import render
from regraft.verifying.diffing.report import (
    ConfigChange,
    DiffReport,
    DiffSide,
    FileChange,
    LoneTensor,
    TensorChange,
)

SIDE = DiffSide("./x", None, 2, 9, 3_090_000_000, False)
OTHER = DiffSide("org/y", "abc", 1, 9, 3_090_000_000, False)


def report(**fields: Any) -> DiffReport:
    """Return the report of two models that are the same, but for the fields given."""
    same: dict[str, Any] = {
        "kind": "checkpoint",
        "x": SIDE,
        "y": OTHER,
        "added": (),
        "removed": (),
        "changed": (),
        "unchanged": 9,
        "config": (),
        "files": (),
        "same_layout": True,
    }
    return DiffReport(**same | fields)


def change(name: str, relative: float = 0.01, **fields: Any) -> TensorChange:
    """Return a float tensor of 1000 elements that moved by ``relative``."""
    usual: dict[str, Any] = {
        "dtypes": ("BF16", "BF16"),
        "shapes": ((10, 100), (10, 100)),
        "changed": 500,
        "weight_norm": 2.0,
        "delta_norm": 2.0 * relative,
        "largest": 0.125,
        "ulps": 7,
    }
    return TensorChange(name, **usual | fields)


def words(found: DiffReport, limit: int | None = 20) -> list[str]:
    """Return the lines of the text, each with single blanks."""
    return [" ".join(line.split()) for line in render(found, limit=limit).splitlines()]


# ---- the text


def test_two_that_are_the_same() -> None:
    assert words(report()) == [
        "X ./x: full model, 9 tensors, 3.09 GB in 2 files",
        "Y org/y at abc: full model, 9 tensors, 3.09 GB in 1 file",
        "tensors 9 same",
        "",
        "same: 9 tensors, and the config",
    ]


def test_of_lone_files_the_config_is_not_compared() -> None:
    lone = DiffSide("a.safetensors", None, 1, 1, 4, True)
    lines = words(report(x=lone, unchanged=1))
    assert "config not compared: a single file was given" in lines
    assert lines[-1] == "same: 1 tensor"


def test_changed_tensors_are_listed_those_that_moved_most_first() -> None:
    changed = (
        change("near", 0.001, changed=1),
        change("far", 0.5),
        change("new", weight_norm=0.0),
        change("shape", shapes=((4,), (5, 1)), **dict.fromkeys(FIGURES)),
        change("dtype", 0.01, dtypes=("F32", "BF16"), ulps=None),
        change("nan", 0.002, not_finite=3),
    )
    lines = words(report(changed=changed, unchanged=3, same_layout=False))
    assert "tensors 6 changed, 3 same" in lines
    assert "layout the tensors are divided among files differently" in lines
    start = lines.index("changed |Y-X|/|X| elements largest ulps")
    assert lines[start + 1 : start + 7] == [
        "new inf 50% 0.125 7",
        "shape - - - - 4 -> 5x1",
        "far 50% 50% 0.125 7",
        "dtype 1% 50% 0.125 - F32 -> BF16",
        "nan 0.2% 50% 0.125 7 3 NaN or infinite",
        "near 0.1% 0.1% 0.125 7",
    ]
    assert lines[-1] == "different: 6 tensors changed"


FIGURES = ("changed", "weight_norm", "delta_norm", "largest", "ulps")


def test_the_totals_are_over_all_changed_tensors() -> None:
    changed = (change("a", 0.03), change("b", 0.04))
    moved = "moved |Y-X|/|X| 3.54%, 50% of 2.00 k elements differ, over the changed tensors"
    assert moved in words(report(changed=changed))


def test_very_few_elements_are_counted_and_not_a_share() -> None:
    few = change("t", shapes=((1000, 1000),) * 2, changed=3)
    lines = words(report(changed=(few,)))
    assert "t 1% 3 0.125 7" in lines
    assert any("3 of 1.00 M elements differ" in line for line in lines)


def test_long_lists_are_cut_unless_all_is_asked_for() -> None:
    found = report(
        changed=tuple(change(f"t{n}") for n in range(25)),
        added=tuple(LoneTensor(f"n{n}", "F32", ()) for n in range(22)),
    )
    lines = words(found)
    assert "... and 5 more, --all for all" in lines
    assert "... and 2 more, --all for all" in lines
    assert "n0 F32 scalar" in lines
    whole = words(found, limit=None)
    assert not any("more, --all" in line for line in whole)
    assert len(whole) == len(lines) + 5 + 2 - 2
    assert lines[-1] == whole[-1] == "different: 25 tensors changed, 22 tensors only in Y"


def test_configs_and_other_files_are_listed_with_both_values() -> None:
    found = report(
        removed=(LoneTensor("lm_head.weight", "BF16", (40, 16)),),
        config=(
            ConfigChange("dtype", "changed", "float16", "bfloat16"),
            ConfigChange("rope.theta", "added", None, 1e4),
            ConfigChange("long", "removed", ["x" * 100], None),
        ),
        files=(FileChange("tokenizer.json", "changed"), FileChange("merges.txt", "removed")),
    )
    lines = words(found)
    assert "lm_head.weight BF16 40x16" in lines
    assert '~ dtype: "float16" -> "bfloat16"' in lines
    assert "+ rope.theta: 10000.0" in lines
    assert any(line.startswith('- long: ["xxx') and line.endswith("x...") for line in lines)
    assert "config.json" in lines
    assert "~ tokenizer.json" in lines
    assert "- merges.txt" in lines
    told = "1 tensor only in X, 3 config keys differ; 2 other files differ"
    assert lines[-1] == f"different: {told}"


def test_an_adapters_config_has_its_own_name() -> None:
    found = report(kind="adapter", config=(ConfigChange("r", "changed", 8, 16),))
    lines = words(found)
    assert "adapter_config.json" in lines
    assert lines[-1] == "different: 1 config key differs"


def test_other_files_alone_do_not_make_a_difference() -> None:
    found = report(files=(FileChange("tokenizer.json", "changed"),))
    assert words(found)[-1] == "same: 9 tensors, and the config; 1 other file differs"


# ---- the command


def test_everything_is_passed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    diff = Called(report())
    monkeypatch.setattr("regraft.verifying.diffing.diff.diff", diff)
    result = run("diff", "./x", "org/y", "--threads", "3", "--token", "secret")
    assert (result.exit_code, result.stderr) == (0, "")
    assert diff.named == {
        "x": "./x",
        "y": "org/y",
        "raw": False,
        "threads": 3,
        "token": "secret",
        "progress": None,
    }


def test_the_exit_code_says_whether_they_differ(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tuple(change(f"t{n}") for n in range(25))
    monkeypatch.setattr("regraft.verifying.diffing.diff.diff", Called(report(changed=changed)))
    result = run("diff", "x", "y")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "... and 5 more" in result.stdout
    assert "... and 5 more" not in run("diff", "x", "y", "--all").stdout
    quiet = run("diff", "x", "y", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (1, "", "")


@pytest.mark.slow
def test_as_json_it_is_the_report(run: Run, tmp_path: Path) -> None:
    x = toys.write_base(tmp_path / "x", {"t": np.zeros(4, np.float32)}, {"a": float("nan")})
    y = toys.write_base(tmp_path / "y", {"t": np.ones(4, np.float32)}, {"a": 1})
    result = run("diff", x, y, "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["same"] is False
    assert answer["kind"] == "checkpoint"
    assert answer["changed"] == [
        {
            "name": "t",
            "dtypes": ["F32", "F32"],
            "shapes": [[4], [4]],
            "changed": 4,
            "not_finite": 0,
            "weight_norm": 0.0,
            "delta_norm": 2.0,
            "largest": 1.0,
            "ulps": 0x3F800000,
            "relative": None,
        }
    ]
    assert answer["config"] == [{"key": "a", "change": "changed", "x": None, "y": 1}]


def test_names_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    x = toys.write_base(tmp_path / "x", {}, {"a\x1b[2J": 1})
    y = toys.write_base(tmp_path / "y", {}, {})
    assert "\x1b" not in run("diff", x, y).stdout


# ---- in a process of its own


def test_its_help_loads_nothing_heavy(launch: Launch) -> None:
    assert loaded_by(launch, "diff", "--help") & HEAVY == set()


@pytest.mark.slow
def test_processes_end_with_the_code_that_fits(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "adapter")
    sharded = toys.write_sharded_base(tmp_path / "sharded")
    same = regraft_command("diff", base, sharded)
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.splitlines()[-1].startswith("same: ")

    config = toys.CONFIG | {"vocab_size": 41}
    other = regraft_command("diff", base, toys.write_base(tmp_path / "other", config=config))
    assert (other.returncode, other.stderr) == (1, "")
    assert other.stdout.splitlines()[-1] == "different: 1 config key differs"

    mixed = regraft_command("diff", base, adapter, "--json")
    assert errors(mixed)["type"] == "InputError"
    assert mixed.returncode == 3

    next(sharded.glob("model-00001*")).unlink()
    broken = regraft_command("diff", base, sharded, "--json")
    assert errors(broken)["type"] == "FormatError"
    assert broken.returncode == 3
    assert regraft_command("diff", base).returncode == 2
    assert regraft_command("diff", base, base, "--threads", "0").returncode == 2


def test_a_pytorch_file_is_compared_without_pytorch(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toys.write_base(tmp_path / "base")
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("diff", base, tmp_path / "pytorch_model.bin").exit_code == 1
