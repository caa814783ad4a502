"""The benchmarks' own parts: synthetic models are real ones, and the page keeps its text."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import regraft
from regraft.cli import main as regraft_main

ROOT = Path(__file__).resolve().parents[2]


def make(out: Path, *options: str) -> Path:
    script = str(ROOT / "benchmarks" / "shared" / "synthetic.py")
    subprocess.run([sys.executable, script, "--out", str(out), *options], check=True)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_synthetic_model_merges(tmp_path: Path) -> None:
    made = make(tmp_path / "tiny", "--shape", "tiny", "--rank", "4")
    receipt = regraft.merge(made / "base", made / "adapter", tmp_path / "out")
    assert receipt.totals.merged == 2 * 7
    assert receipt.totals.changed_share > 0.5


@pytest.mark.slow
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
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.shared import page as pages

    page = pages.replaced("# Title\n\ntext", "old")
    assert page.startswith("# Title\n\ntext\n\n")
    again = pages.replaced(page + "after", "new")
    assert again == page.replace("old", "new") + "after"


@pytest.fixture
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the modules of the benchmarks at hand."""
    monkeypatch.syspath_prepend(str(ROOT))


def run_here(command: Sequence[str], env: Mapping[str, str] | None = None) -> Any:
    """Do in this process, whose libraries are imported, what is measured in one of its own."""
    from benchmarks.shared.process import Sample

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        names = [Path(word).name for word in command[:3]]
        if "regraft" in names:
            patch.setattr(sys, "argv", list(command[names.index("regraft") :]))
            with pytest.raises(SystemExit) as ended:
                regraft_main()
            assert ended.value.code == 0
        else:
            patch.setattr(sys, "argv", list(command[1:]))
            runpy.run_path(command[1], run_name="__main__")
    return Sample(2.0, 3.0, 2**28)


@pytest.mark.slow
@pytest.mark.usefixtures("_benchmarks")
def test_work_on_four_bits_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.quantized import __main__ as quantized
    from benchmarks.shared import models

    for module in (models, quantized):
        monkeypatch.setattr(module, "measured", run_here)
    page = tmp_path / "page.md"
    options = ["--small", "--work", str(tmp_path / "work"), "--page", str(page)]
    assert quantized.main(options) == 0
    text = page.read_text("utf-8")
    assert "| merge out of 4 bits against" in text
    assert "| nf4 to bfloat16 on one thread |" in text
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.usefixtures("_benchmarks")
def test_a_process_is_measured_from_outside() -> None:
    from benchmarks.shared.process import ProcessFailedError, measured

    busy = (
        "import os; kept = bytearray(b'x') * 2**27; print(sum(range(3 * 10**6)), os.environ['X'])"
    )
    sample = measured([sys.executable, "-c", busy], {"X": "set"})
    assert sample.seconds >= 0.02
    assert sample.cpu_seconds >= 0.02
    assert sample.peak_bytes > 2**27
    with pytest.raises(ProcessFailedError, match="ended with 3:\nwhy"):
        measured([sys.executable, "-c", "print('why'); raise SystemExit(3)"])


@pytest.mark.slow
@pytest.mark.usefixtures("_benchmarks", "_what_is_there_is_frozen")
def test_live_models_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.live import __main__ as live
    from benchmarks.live import timing

    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)  # no figure that depends on it is looked at

    page, threads = tmp_path / "page.md", torch.get_num_threads()
    torch.set_num_threads(1)  # tests share the cores with others
    assert (
        live.main(
            ["--quick", "--rounds", "1", "--work", str(tmp_path / "work"), "--page", str(page)]
        )
        == 0
    )
    torch.set_num_threads(threads)
    text = page.read_text("utf-8")
    assert "| switch adapters (`set_adapter`) against PEFT, times faster |" in text
    assert "| wrong outputs of 4 threads with an adapter each, 40 calls | 0 | 0 | pass |" in text
    assert "| adapter cache: wrong answers | 0 | 0 | pass |" in text
    assert "| weights changed by 3 merges and un-merges | 0 | 0 | pass |" in text
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("_benchmarks")
def test_kinds_of_merges_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.merge import figures, measure

    monkeypatch.setattr(measure, "measured", run_here)
    passes = measure.measure_undo_speed(tmp_path, small=True)
    usual, *others = passes
    found = figures.undo_kind_figures(passes)
    assert [usual not in figure.name for figure in found] == [True] * len(others)
    doubled = {"a": {"keep": [1.0, 3.0], "restore": [2.0, 2.0]},
               "b": {"keep": [2.0, 6.0], "restore": [3.0, 1.0]}}  # fmt: skip
    (figure,) = figures.undo_kind_figures(doubled)
    assert (figure.value, figure.passed) == (1.0, True)
    assert "2.00 x, 4.00 ns against 2.00" in figure.detail
    assert not list(tmp_path.iterdir())
