"""``merge`` and ``check`` from the command line to the files, on real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cli import tiny
from cli.kinds import Launch, Run
from cli.test_startup import WITHOUT_TORCH

Q0 = "model.layers.0.self_attn.q_proj.weight"


def merged_by_hand(name: str, weight: float = 1.0) -> np.ndarray:
    """Return a weight plus its delta, in float64."""
    factors = tiny.adapter_tensors()
    key = f"base_model.model.{name.removesuffix('.weight')}"
    delta = factors[f"{key}.lora_B.weight"].astype(float) @ factors[f"{key}.lora_A.weight"]
    return tiny.base_tensors()[name] + weight * 2.0 * delta  # alpha 8 over rank 4


def test_a_merge_writes_the_weights_and_sums_up(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("merge", base, adapter, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    written = load_file(out / "model.safetensors")
    assert written.keys() == tiny.base_tensors().keys()
    np.testing.assert_allclose(written[Q0], merged_by_hand(Q0), rtol=1e-5, atol=1e-6)
    words = " ".join(result.stdout.split())
    assert "21: 4 merged, 17 copied" in words
    assert f"AutoModelForCausalLM.from_pretrained({str(out)!r})" in words
    assert result.stdout.count("self_attn") == 4  # the four tensors that moved


def test_json_is_the_receipt_that_was_written(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    result = run("merge", base, adapter, "-o", tmp_path / "out", "--json")
    answer = json.loads(result.stdout)
    written = json.loads((tmp_path / "out" / "regraft" / "receipt.json").read_text())
    assert answer.pop("quiet") is False
    assert answer["tensors"] == written["tensors"]
    assert written["command"] == f"regraft merge {base} {adapter} --out {tmp_path / 'out'}"


def test_a_weight_scales_the_adapter(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", base, f"{adapter}=-0.5", "-o", tmp_path / "out").exit_code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(written[Q0], merged_by_hand(Q0, -0.5), rtol=1e-5, atol=1e-6)


def test_an_output_that_exists_is_refused_and_then_overwritten(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    command = ("merge", base, adapter, "-o", tmp_path / "out")
    assert run(*command).exit_code == 0
    refused = run(*command, "--json")
    assert refused.exit_code == 3
    assert json.loads(refused.stdout)["error"]["type"] == "OutputExistsError"
    assert "--overwrite" in refused.stderr
    assert run(*command, "--overwrite").exit_code == 0


def test_a_dry_run_writes_nothing_and_groups_layers(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run("merge", base, adapter, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
    row = r"model\.layers\.\{0\.\.1\}\.self_attn\.q_proj\.weight +merge +lora x 2 .* x2$"
    assert re.search(row, result.stdout, re.MULTILINE)
    assert "needed" in result.stdout


def test_a_dry_run_as_json_is_the_plan(run: Run, base: Path, adapter: Path) -> None:
    answer = json.loads(run("merge", base, adapter, "--dry-run", "--json").stdout)
    actions = {step["name"]: step["action"] for step in answer["steps"]}
    assert actions[Q0] == "merge"
    assert actions["model.norm.weight"] == "copy"
    assert answer["totals"]["merged"] == 4


def test_an_untrained_adapter_is_said_out_loud(run: Run, base: Path, tmp_path: Path) -> None:
    tensors = tiny.adapter_tensors()
    untrained = {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}
    adapter = tiny.make_adapter(tmp_path / "untrained", untrained)
    result = run("merge", base, adapter, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "(NEARLY) THE BASE" in result.stderr


def test_every_misfit_is_listed_and_nothing_is_written(
    run: Run, base: Path, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tmp_path / "other", tiny.adapter_tensors(("q_prog", "v_prog")))
    result = run("merge", base, adapter, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 3
    assert len(json.loads(result.stdout)["error"]["problems"]) >= 4
    assert "q_proj" in result.stderr  # the nearest name
    assert not (tmp_path / "out").exists()


def test_check_says_yes_or_lists_what_stands_in_the_way(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert run("check", base, adapter).exit_code == 0
    other = tiny.make_adapter(tmp_path / "other", tiny.adapter_tensors(("q_prog", "v_prog")))
    refused = run("check", base, other, "--json")
    assert refused.exit_code == 1
    answer = json.loads(refused.stdout)
    assert answer["ok"] is False
    assert len(answer["problems"]) >= 4


def test_check_of_a_truncated_base_is_3(run: Run, base: Path, adapter: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert run("check", base, adapter).exit_code == 3


def test_a_weight_that_is_no_number_is_wrong_usage(run: Run, base: Path, adapter: Path) -> None:
    result = run("check", base, f"{adapter}=much")
    assert result.exit_code in (2, 3)
    assert "much" in result.stderr


@pytest.mark.slow
def test_check_and_merge_work_without_torch(
    launch: Launch, base: Path, adapter: Path, tmp_path: Path
) -> None:
    checked = launch("-c", WITHOUT_TORCH, "check", base, adapter, "--json")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert json.loads(checked.stdout)["ok"] is True
    merged = launch("-c", WITHOUT_TORCH, "merge", base, adapter, "-o", tmp_path / "out", "-q")
    assert (merged.returncode, merged.stdout, merged.stderr) == (0, "", "")
    assert (tmp_path / "out" / "model.safetensors").exists()
