"""The benchmarks' own parts: synthetic models are real ones, and the page keeps its text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import regraft

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def make(out: Path, *options: str) -> Path:
    script = str(BENCHMARKS / "synthetic.py")
    subprocess.run([sys.executable, script, "--out", str(out), *options], check=True)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_synthetic_model_merges(tmp_path: Path) -> None:
    made = make(tmp_path / "tiny", "--shape", "tiny", "--rank", "4")
    receipt = regraft.merge(made / "base", made / "adapter", tmp_path / "out")
    assert receipt.totals.merged == 2 * 7
    assert receipt.totals.changed_share > 0.5


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (make(tmp_path / name, "--shape", "tiny") for name in ("a", "b"))
    assert contents(first) == contents(second)


def test_headers_of_a_large_model_take_up_no_room(tmp_path: Path) -> None:
    made = make(tmp_path / "large", "--shape", "llama-70b", "--headers", "30")
    files = list((made / "base").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) > 140e9
    assert sum(f.stat().st_blocks * 512 for f in files) < 2**20
    assert regraft.check(made / "base", made / "adapter").ok


def test_a_new_table_replaces_the_old_one_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    page = report.replaced("# Title\n\ntext", "old")
    assert page.startswith("# Title\n\ntext\n\n")
    again = report.replaced(page + "after", "new")
    assert again == page.replace("old", "new") + "after"


def test_work_on_four_bits_is_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    script = str(BENCHMARKS / "quantized.py")
    options = ["--small", "--work", str(tmp_path / "work"), "--page", str(page)]
    subprocess.run([sys.executable, script, *options], check=True, stdout=subprocess.DEVNULL)
    text = page.read_text("utf-8")
    assert "| merge out of 4 bits against" in text
    assert "| nf4 to bfloat16 on one thread |" in text
    assert not list((tmp_path / "work").iterdir())


def test_live_models_are_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    script = str(BENCHMARKS / "live.py")
    options = ["--quick", "--work", str(tmp_path / "work"), "--page", str(page)]
    asleep = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # tests share the cores with others
    command = [sys.executable, script, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=asleep)
    text = page.read_text("utf-8")
    assert "| switch adapters (`set_adapter`) against PEFT, times faster |" in text
    assert "| wrong outputs of 4 threads with an adapter each, 40 calls | 0 | 0 | pass |" in text
    assert "| adapter cache: wrong answers | 0 | 0 | pass |" in text
    assert "| weights changed by 3 merges and un-merges | 0 | 0 | pass |" in text
    assert not list((tmp_path / "work").iterdir())
