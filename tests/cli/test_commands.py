"""The commands as thin layers: what they pass on, and what they print, with the API stood in."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.kinds import FakeApi, Run
from cli.texts.test_plan_text import lora, plan
from cli.texts.test_receipt_text import TOTALS, receipt
from cli.tiny import make_adapter, make_receipt
from regraft.errors import InputError, Problem
from regraft.merging.planning.report import CheckReport


class Called:
    """A function that notes its arguments and gives a fixed answer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.arguments: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Note and answer."""
        self.arguments, self.named = arguments, named
        return self.answer


# ---- merge


def test_merge_passes_everything_on_as_it_was_typed(run: Run, fake_api: FakeApi) -> None:
    merge = Called(receipt())
    fake_api(merge=merge)
    result = run(
        *("merge", "org/base", "a=0.5", "b", "-o", "out", "--dtype", "float16"),
        *("--shard-size", "5GB", "--max-memory", "1GiB", "--threads", "3", "--overwrite"),
        *("--token", "hf_secret"),
    )
    assert result.exit_code == 0
    assert merge.named == {
        "base": "org/base",
        "adapters": ["a=0.5", "b"],
        "out": "out",
        "dtype": "float16",
        "shard_size": "5GB",
        "max_memory": "1GiB",
        "threads": 3,
        "overwrite": True,
        "quantize": None,
        "rounding": None,
        "seed": 0,
        "double_quant": False,
        "method": "sum",
        "density": None,
        "trained_on": None,
        "peft_version": None,
        "undo": None,
        "keep_adapter": True,
        "reflink": "auto",
        "digest_cache": False,
        "token": "hf_secret",
        "progress": None,
        "command": "regraft merge org/base a=0.5 b --out out --dtype float16 --shard-size 5GB "
        "--max-memory 1GiB --threads 3",
    }


def test_the_recorded_command_quotes_and_leaves_defaults_out(run: Run, fake_api: FakeApi) -> None:
    merge = Called(receipt())
    fake_api(merge=merge)
    run("merge", "my base", "a", "-o", "out")
    assert merge.named["command"] == "regraft merge 'my base' a --out out"
    assert merge.named["max_memory"] == "512MiB"


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        (["--no-undo"], "--no-undo"),
        (["--undo", "--no-keep-adapter"], "--undo --no-keep-adapter"),
        (["--no-undo", "--keep-adapter", "--overwrite", "-q"], "--no-undo"),
        (["--undo", "--keep-adapter"], "--undo"),
        (["--threads", "2", "--no-undo"], "--threads 2 --no-undo"),
    ],
)
def test_the_recorded_command_says_the_same_when_it_is_typed(
    run: Run, fake_api: FakeApi, typed: list[str], recorded: str
) -> None:
    merge = Called(receipt())
    fake_api(merge=merge)
    run("merge", "base", "a", "-o", "out", *typed)
    first = merge.named
    assert first["command"] == f"regraft merge base a --out out {recorded}".rstrip()
    run(*shlex.split(first["command"])[1:])
    assert {**merge.named, "overwrite": first["overwrite"]} == first


def test_the_recorded_command_tells_arguments_from_options(run: Run, fake_api: FakeApi) -> None:
    merge = Called(receipt())
    fake_api(merge=merge)
    run("merge", "-o", "out", "--", "-base", "a")
    assert merge.named["command"] == "regraft merge --out out -- -base a"


def test_merge_prints_its_summary_on_stdout_and_nothing_else(run: Run, fake_api: FakeApi) -> None:
    fake_api(merge=Called(receipt()))
    result = run("merge", "base", "a", "-o", "out")
    assert "7 merged, 2 copied" in result.stdout
    assert result.stderr == ""


def test_merge_as_json_is_the_receipt(run: Run, fake_api: FakeApi) -> None:
    fake_api(merge=Called(replace(receipt(), totals=replace(TOTALS, relative_delta=float("nan")))))
    answer = json.loads(run("merge", "base", "a", "-o", "out", "--json").stdout)
    assert answer["totals"]["merged"] == 7
    assert answer["totals"]["relative_delta"] is None
    assert answer["quiet"] is False
    assert len(answer["tensors"]) == 8


def test_merge_when_quiet_prints_warnings_only(run: Run, fake_api: FakeApi) -> None:
    fake_api(merge=Called(replace(receipt(), warnings=("odd base",))))
    result = run("merge", "base", "a", "-o", "out", "-q")
    assert (result.stdout, result.stderr) == ("", "warning: odd base\n")


@pytest.mark.parametrize("flags", [[], ["-q"], ["--json"]])
def test_a_merge_that_changed_nothing_is_said_out_loud(
    run: Run, fake_api: FakeApi, flags: list[str]
) -> None:
    quiet = replace(receipt(), totals=replace(TOTALS, changed_share=0.0))
    fake_api(merge=Called(replace(quiet, warnings=(quiet.quiet_warning,))))
    result = run("merge", "base", "a", "-o", "out", *flags)
    assert result.exit_code == 0
    assert "THE MERGED MODEL IS (NEARLY) THE BASE" in result.stderr


def test_a_dry_run_prints_the_plan_and_needs_no_output(run: Run, fake_api: FakeApi) -> None:
    steps = [lora(f"l.{n}.w") for n in range(4)]
    answer = plan(steps, warnings=["odd base"])
    planned = Called(SimpleNamespace(to_json=lambda: answer))
    fake_api(plan=planned)
    result = run("merge", "base", "a", "--dry-run")
    assert planned.named == {
        "base": "base",
        "adapters": ["a"],
        "out": None,
        "dtype": None,
        "shard_size": None,
        "quantize": None,
        "rounding": None,
        "seed": 0,
        "double_quant": False,
        "method": "sum",
        "density": None,
        "peft_version": None,
        "max_memory": "512MiB",
        "threads": None,
        "overwrite": False,
        "reflink": "auto",
        "undo": None,
        "token": None,
    }
    assert "l.{0..3}.w" in result.stdout
    assert result.stderr == "warning: odd base\n"
    assert "l.2.w" in run("merge", "base", "a", "--dry-run", "-v").stdout
    assert json.loads(run("merge", "base", "a", "--dry-run", "--json").stdout) == answer


# ---- check


CHECK = "regraft.engines.checking.check"


def test_check_says_yes_with_0(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = {"tensors": 9, "merged": 7, "copied": 2, "bytes_written": 2_000_000, "memory": 2**28}
    check = Called(CheckReport(ok=True, warnings=("odd base",), summary=summary))
    monkeypatch.setattr(CHECK, check)
    result = run("check", "base", "a=2", "b", "--dtype", "float32")
    assert result.exit_code == 0
    assert result.stdout.startswith("ok: it would merge\n")
    assert "7 merged, 2 copied" in result.stdout
    assert "2.00 MB" in result.stdout
    assert "256 MiB at most" in result.stdout
    assert result.stderr == "warning: odd base\n"
    assert check.arguments == ("base", ["a=2", "b"])
    assert check.named == {
        "dtype": "float32",
        "method": "sum",
        "peft_version": None,
        "quantize": None,
        "max_memory": "512MiB",
        "token": None,
        "engine": None,
        "engine_options": {},
    }


def test_check_says_no_with_1_and_lists_every_problem_on_stdout(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = (Problem("first", where="x"), Problem("second"))
    monkeypatch.setattr(CHECK, Called(CheckReport(ok=False, problems=problems)))
    result = run("check", "base", "a")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout == "no: 2 problems\n  - x: first\n  - second\n"
    as_json = run("check", "base", "a", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == {
        "ok": False,
        "problems": [{"what": "first", "where": "x"}, {"what": "second"}],
        "warnings": [],
        "summary": {},
    }


def test_check_of_what_cannot_be_opened_is_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("is not a checkpoint")

    monkeypatch.setattr(CHECK, refuse)
    assert run("check", "base", "a").exit_code == 3


# ---- demo


def test_the_demo_tells_its_story_on_stdout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Called(SimpleNamespace(to_json=lambda: {"same_answers": 10}))
    monkeypatch.setattr("regraft.demo.run_demo", demo)
    result = run("demo", "--dir", "somewhere", "--fresh", "--hub-id", "org/model")
    assert (result.exit_code, result.stdout) == (0, "")
    assert demo.arguments == (Path("somewhere"),)
    assert (demo.named["fresh"], demo.named["hub_id"]) == (True, "org/model")
    story = Called(None)
    monkeypatch.setattr("regraft.cli.output._write", story)
    demo.named["say"]("once upon a time")
    assert story.arguments[1] == "once upon a time"


def test_the_demo_as_json_is_its_figures_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Called(SimpleNamespace(to_json=lambda: {"same_answers": 10}))
    monkeypatch.setattr("regraft.demo.run_demo", demo)
    result = run("demo", "--json")
    assert json.loads(result.stdout) == {"same_answers": 10}
    assert demo.named["as_json"] is True
    demo.named["say"]("nothing")


# ---- inspect


def test_inspect_tells_a_base_from_an_adapter(run: Run, base: Path, adapter: Path) -> None:
    result = run("inspect", base, adapter)
    assert (result.exit_code, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())
    assert f"{base}: a base model" in words
    assert "llama, LlamaForCausalLM" in words
    assert "2 layers, 16 hidden, 32 vocabulary" in words
    assert f"{adapter}: an adapter" in words
    assert "q_proj x2, v_proj x2" in words
    assert "2 (alpha/r, alpha 8)" in words
    assert "org/tiny-llama at abc123" in words


def test_inspect_tells_what_a_merged_model_was_made_of(run: Run, base: Path) -> None:
    words = " ".join(run("inspect", make_receipt(base)).stdout.split())
    assert "a merged model" in words
    assert "with ./style x 0.5" in words
    assert "|delta|/|W| 1.25%" in words


def test_inspect_as_json_is_one_object(run: Run, base: Path, adapter: Path) -> None:
    one = json.loads(run("inspect", base, "--json").stdout)
    assert one["kind"] == "base"
    both = json.loads(run("inspect", base, adapter, "--json").stdout)
    assert both["inspections"][0] == one
    assert both["inspections"][1]["adapter"]["ranks"] == {"4": 4}


def test_inspect_of_nothing_is_3_in_text_and_in_json(run: Run, tmp_path: Path) -> None:
    missing = tmp_path / "deep" / "nothing"
    result = run("inspect", missing, "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("InputError", 3)
    assert str(missing) in result.stderr
    assert run("inspect", missing).stdout == ""


def test_inspect_of_a_file_without_tensors_is_no_crash(run: Run, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "model.safetensors")
    result = run("inspect", tmp_path)
    assert result.exit_code == 0
    assert "0 parameters, 0 B in 1 file" in result.stdout


# ---- quiet


def test_targets_are_sorted_and_many_are_counted(run: Run, tmp_path: Path) -> None:
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(15, 0, -1)]
    shown = run("inspect", make_adapter(tmp_path / "many", target_modules=names)).stdout
    listed = next(line for line in shown.splitlines() if line.strip().startswith("targets"))
    assert listed.split()[1] == "model.layers.1.mlp.up_proj,"
    assert listed.endswith(", and 3 more")


def test_quiet_leaves_the_exit_code(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    assert run("inspect", adapter, "-q").stdout == ""
    found = run("check", base, adapter, "-q")
    assert (found.exit_code, found.stdout) == (run("check", base, adapter).exit_code, "")
    assert run("inspect", tmp_path / "nothing", "-q").exit_code == 3
