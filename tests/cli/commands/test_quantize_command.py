"""Quantized models on the command line: dequantize, quantize, merge, and who looks at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.kinds import Run
from merging import toys
from merging.quantized_bases import write_quantized


@pytest.fixture
def nf4(tmp_path: Path) -> Path:
    """A llama in NF4; what it was made from lies in ``nf4-plain`` beside it."""
    return write_quantized(tmp_path / "nf4", "nf4")


@pytest.fixture
def plain(nf4: Path) -> Path:
    return nf4.with_name("nf4-plain")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return toys.write_adapter(tmp_path / "adapter")


def lines(run: Run, *arguments: Any) -> list[str]:
    """Return what a command that succeeds prints, each line with single blanks."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


def answer(run: Run, *arguments: Any) -> dict[str, Any]:
    """Return what a command that succeeds prints as JSON."""
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_dequantize_says_what_it_did(run: Run, nf4: Path, tmp_path: Path) -> None:
    text = lines(run, "dequantize", nf4, "-o", tmp_path / "out")
    assert text[:3] == [
        f"base {nf4}", "quantized nf4: dequantized", "tensors 21: 14 converted, 7 copied",
    ]  # fmt: skip
    assert f"written to {tmp_path / 'out'}" in text
    found = answer(run, "dequantize", nf4, "-o", tmp_path / "more", "--dtype", "float32")
    saved = json.loads((tmp_path / "more" / "regraft" / "receipt.json").read_text())
    assert found.items() <= saved.items()
    assert found["options"]["dtype"] == "float32"
    assert {record["dtype"] for record in found["tensors"]} == {"F32"}


def test_quantize_says_what_it_did(run: Run, plain: Path, tmp_path: Path) -> None:
    text = lines(run, "quantize", plain, "-o", tmp_path / "out", "--to", "int8")
    assert "tensors 49: 28 added, 14 converted, 7 copied" in text
    found = answer(run, "quantize", plain, "-o", tmp_path / "more", "--to", "nf4", "--double-quant",
                   "--rounding", "stochastic", "--seed", "5")  # fmt: skip
    wanted = {"quantize": "nf4", "rounding": "stochastic", "seed": 5, "double_quant": True}
    assert found["options"].items() >= wanted.items()
    assert sum(record["codes"] > 0 for record in found["tensors"]) == 14
    assert "regraft quantize" in (tmp_path / "more" / "README.md").read_text()


def test_a_merge_that_keeps_codes_says_what_survived(
    run: Run, nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    text = lines(run, "merge", nf4, adapter, "-o", tmp_path / "out", "--quantize", "keep")
    assert "quantized nf4: kept, rounded stochastic" in text
    assert any(line.startswith("survived ") and "of the delta, noise" in line for line in text)
    found = answer(run, "merge", nf4, adapter, "-o", tmp_path / "out2", "--quantize", "keep",
                   "--rounding", "nearest")  # fmt: skip
    merged = [record for record in found["tensors"] if record["action"] == "merge"]
    assert len(merged) == 4
    assert all(0 < record["survived"] < 2 for record in merged)
    assert found["totals"]["survived"] == pytest.approx(
        sum(r["survived"] * r["delta_norm"] ** 2 for r in merged)
        / sum(r["delta_norm"] ** 2 for r in merged),
        rel=1e-6,
    )


def test_a_merge_says_how_far_the_base_of_training_is(
    run: Run, nf4: Path, plain: Path, adapter: Path, tmp_path: Path
) -> None:
    text = lines(run, "merge", plain, adapter, "-o", tmp_path / "out", "--trained-on", nf4)
    assert f"trained on {nf4}" in text
    assert any("|delta| lies between the bases" in line for line in text)
    found = answer(run, "merge", plain, adapter, "-o", tmp_path / "out2", "--trained-on", nf4)
    assert found["trained_on"] == str(nf4)
    assert sum(record["base_gap"] is not None for record in found["tensors"]) == 4


def test_a_dry_run_writes_nothing(run: Run, nf4: Path, adapter: Path, tmp_path: Path) -> None:
    kept = ("merge", nf4, adapter, "-o", tmp_path / "out", "--quantize", "keep", "--dry-run")
    found = answer(run, *kept)
    assert found["quantized"] == ["nf4"]
    assert {step["action"] for step in found["steps"]} == {"merge", "copy"}
    assert [step["dtype"] for step in found["steps"] if step["action"] == "merge"] == ["U8"] * 4
    made = answer(run, *kept[:-2], "int8", "--dry-run")
    assert made["totals"]["added"] == 28
    assert lines(run, *kept)
    assert not (tmp_path / "out").exists()


def test_check_and_inspect_see_the_quantization(run: Run, nf4: Path, adapter: Path) -> None:
    assert "tensors 21: 4 merged, 10 converted, 7 copied" in lines(run, "check", nf4, adapter)
    assert "quantization bitsandbytes" in lines(run, "inspect", nf4)
    assert answer(run, "check", nf4, adapter)["ok"] is True


MERGE, QUANTIZE = ("merge", "nf4", "adapter"), ("quantize", "nf4-plain")
USAGE: dict[str, tuple[tuple[str, ...], str, int]] = {
    "rounding alone": ((*MERGE, "--rounding", "nearest"), "rounding to codes needs codes", 2),
    "seed alone": ((*MERGE, "--seed", "4"), "rounding to codes needs codes", 2),
    "a negative seed": ((*MERGE, "--quantize", "keep", "--seed", "-1"), "-1 is not in the", 2),
    "a seed too large": ((*QUANTIZE, "--to", "int8", "--seed", str(2**63)), "0 to 2^63 - 1", 2),
    "another rounding": ((*MERGE, "--quantize", "keep", "--rounding", "up"), "'up' is not one", 2),
    "another format": ((*MERGE, "--quantize", "gguf"), "'gguf' is not one of", 2),
    "no format": (QUANTIZE, "Choose from: nf4, fp4, int8, fp8", 2),
    "double int8": ((*QUANTIZE, "--to", "int8", "--double-quant"), "expected nf4 or fp4", 2),
    "double without codes": ((*MERGE, "--double-quant"), "--double-quant", 2),
    "nothing to keep": (("merge", "nf4-plain", "adapter", "--quantize", "keep"), "no format to", 3),
    "what it is": (("quantize", "nf4", "--to", "nf4"), "in this format already", 3),
    "plain": (("dequantize", "nf4-plain"), "the model is not quantized", 3),
}  # fmt: skip


@pytest.mark.usefixtures("nf4", "adapter")
@pytest.mark.parametrize("name", USAGE)
def test_what_cannot_be_is_refused(
    run: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, says, code = USAGE[name]
    before = toys.tree(tmp_path)
    done = run(*arguments, "-o", "out")
    assert done.exit_code == code, done.output
    assert says in " ".join(done.stderr.split())
    told = json.loads(run(*arguments, "-o", "out", "--json").stdout)["error"]
    assert told["exit_code"] == code
    assert toys.tree(tmp_path) == before
