"""``regraft verify`` as a command: what it passes on, prints, and ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import regraft
from cli.kinds import Run
from cli.tiny import base_tensors, make_adapter, make_base
from merging import toys
from merging.processes import python, regraft_command
from regraft.cli.texts import verify as verify_text
from regraft.verifying.report import Difference, TensorVerdict, VerifyReport

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def merged(base: Path, adapter: Path, tmp_path: Path) -> Path:
    """A merge of the two."""
    regraft.merge(base, adapter, tmp_path / "merged")
    return tmp_path / "merged"


def damage(folder: Path) -> None:
    """Change a tensor's last byte."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_is_as_it_was_written_ends_with_0(run: Run, merged: Path) -> None:
    result = run("verify", merged)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "ok: exact"
    assert "the files are those of the receipt" in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_a_difference_ends_with_1_and_is_named(run: Run, merged: Path) -> None:
    damage(merged)
    (merged / "evil.py").touch()
    result = run("verify", merged)
    assert result.exit_code == 1
    assert "  - evil.py: a file that the merge did not write" in result.stdout
    assert "  - model.safetensors, tensor " in result.stdout


def test_without_a_receipt_it_ends_with_3_and_says_what_to_give(run: Run, merged: Path) -> None:
    shutil.rmtree(merged / "regraft")
    result = run("verify", merged)
    assert result.exit_code == 3
    assert "--base BASE --adapter ADAPTER" in result.stderr


def test_a_damaged_receipt_ends_with_3(run: Run, merged: Path) -> None:
    receipt = merged / "regraft" / "receipt.json"
    receipt.write_bytes(receipt.read_bytes().replace(b"q_proj", b"Q_proj", 1))
    result = run("verify", merged, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["type"] == "FormatError"


def test_it_says_which_tensors_are_not_the_merge(
    run: Run, base: Path, adapter: Path, merged: Path
) -> None:
    shutil.rmtree(merged / "regraft")
    result = run("verify", merged, "--base", base, "--adapter", adapter)
    assert result.exit_code == 0
    assert "every tensor is the merge, bit for bit" in result.stdout
    tensors = toys.load(merged) | {Q: base_tensors()[Q]}
    toys.save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    result = run("verify", merged, "--base", base, "--adapter", adapter)
    assert result.exit_code == 1
    assert f"the delta is missing in {Q}" in result.stdout
    assert "model.norm.weight" not in result.stdout
    result = run("verify", merged, "--base", base, "--adapter", adapter, "--verbose")
    assert "model.norm.weight" in result.stdout


def test_adapters_and_weights_are_passed_on_in_order(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    chosen = [f"{adapter}=0.5", f"{make_adapter(tmp_path / 'other')}=-2"]
    out = tmp_path / "both"
    regraft.merge(base, chosen, out)
    given = [word for adapter in chosen for word in ("--adapter", adapter)]
    result = run("verify", out, "--base", base, *given, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["verdict"] == "exact"
    assert answer["counts"] == {"exact": len(answer["tensors"])}


def test_a_base_alone_is_a_wrong_call_without_a_receipt(run: Run, base: Path, merged: Path) -> None:
    result = run("verify", base, "--base", base)
    assert result.exit_code == 2
    assert "together" in result.stderr
    result = run("verify", merged, "--base", base)
    assert result.exit_code == 0
    assert f"the merge was done again with {base} and" in result.stdout


def test_what_the_receipt_names_is_used_and_said(run: Run, base: Path, merged: Path) -> None:
    result = run("verify", merged)
    assert "by the merge" in result.stdout
    assert f"the merge was done again with {base} and" in result.stdout
    assert "which the receipt names" in result.stdout
    result = run("verify", merged, "--receipt-only")
    assert result.exit_code == 0
    assert "by the merge" not in result.stdout
    shutil.rmtree(base)
    result = run("verify", merged)
    assert result.exit_code == 0
    assert "the base that the receipt names is not here" in result.stdout


def test_what_cannot_be_compared_ends_with_3(
    run: Run, base: Path, adapter: Path, merged: Path
) -> None:
    shutil.rmtree(merged / "regraft")
    tensors = toys.load(merged)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("float64")
    toys.save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    result = run("verify", merged, "--base", base, "--adapter", adapter)
    assert result.exit_code == 3
    assert "cannot be judged" in result.stdout
    assert "stored as F64" in result.stdout


def test_quiet_leaves_the_exit_code(run: Run, merged: Path) -> None:
    assert run("verify", merged, "-q").stdout == ""
    damage(merged)
    result = run("verify", merged, "-q")
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.slow
def test_it_needs_no_torch_and_by_the_receipt_no_numba(merged: Path) -> None:
    code = "import sys, regraft; assert regraft.verify(sys.argv[1], receipt_only=True).ok"
    done = python(code, merged, without=("torch", "transformers", "peft", "numba", "llvmlite"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_stays_under_the_memory_cap(tmp_path: Path) -> None:
    shape = (4096, 2048)
    weights = {f"layers.{i}.q_proj.weight": toys.draw(*shape, seed=i) for i in range(4)}
    base = toys.write_base(tmp_path / "base", weights, None)
    factors = {
        key: value
        for name in weights
        for key, value in toys.lora(name.removesuffix(".weight"), *shape, rank=16).items()
    }
    adapter = toys.write_adapter(tmp_path / "adapter", factors, r=16, target_modules=["q_proj"])
    regraft.merge(base, adapter, tmp_path / "out", dtype="float16")
    other = {name: (1.1 * weight).astype("float16") for name, weight in weights.items()}
    toys.write_base(tmp_path / "other", other, None)
    code = (
        "import sys, regraft\n"
        "from regraft.system.memory import peak_memory\n"
        "base, adapter, *outs = sys.argv[1:]\n"
        "for out in outs:\n"
        "    report = regraft.verify(out, base=base, adapters=adapter, max_memory='256MiB')\n"
        "    print(report.verdict, peak_memory())"
    )
    done = python(code, base, adapter, tmp_path / "out", tmp_path / "other")
    found = [line.split() for line in done.stdout.splitlines()]
    assert [verdict for verdict, _ in found] == ["exact", "different"], done.stderr
    assert all(int(peak) <= 256 * 2**20 for _, peak in found)


@pytest.mark.slow
def test_a_path_that_is_not_there_ends_with_3(merged: Path) -> None:
    done = regraft_command("verify", merged / "nothing")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


# The text


def test_long_lists_are_cut_and_counted() -> None:
    differences = tuple(Difference(f"file{n}", "", "the file is missing") for n in range(30))
    tensors = tuple(TensorVerdict(f"t{n}", "missing", 3.0, 0.0, "gone") for n in range(25))
    report = VerifyReport("m", False, "different", ("said",), differences, tensors)
    text = verify_text.render(report)
    assert "file19" in text
    assert "file20" not in text
    assert "and 10 more; --verbose lists them" in text
    assert "and 5 more; --verbose lists them" in text
    text = verify_text.render(report, verbose=True)
    assert "file29" in text
    assert "more" not in text


def test_counts_are_told_at_the_end() -> None:
    checked = {"files": 1, "headers": 2, "tensors": 3, "bytes": 4_000_000, "judged": 3}
    tensors = (TensorVerdict("a", "exact", 0.0), TensorVerdict("b", "rounding", 1.5))
    report = VerifyReport("m", True, "rounding", (), (), tensors, checked)
    lines = verify_text.render(report).splitlines()
    assert lines[0] == "ok: within rounding"
    assert lines[-2:] == [
        "by the receipt  3 tensors, 2 headers, 1 other file, 4.00 MB",
        "by the merge    2 tensors: 1 exact, 1 rounding",
    ]


def test_the_base_of_the_tests_is_not_a_merge(run: Run, tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "b"), make_adapter(tmp_path / "a")
    result = run("verify", base, "--base", base, "--adapter", adapter)
    assert result.exit_code == 1
    assert "this is the base: there is no delta anywhere" in result.stdout
