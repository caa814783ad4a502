"""Every example runs as its first lines say, and does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from safetensors import safe_open

import regraft
from docs import world

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("_what_is_there_is_frozen"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and four adapters of it."""
    root = tmp_path_factory.mktemp("examples")
    world.write_base(root / "base")
    for name, seed in (("a", 1), ("b", 2), ("many/c", 3), ("many/d", 4)):
        world.write_adapter(root / name, seed)
    return root


def run(name: str, *arguments: object, **changes: object) -> object:
    """Call an example's ``main`` with words of a command line."""
    spec = util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for key, value in changes.items():
        setattr(module, key, value)
    return module.main(*map(str, arguments))


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [path.stem for path in EXAMPLES.glob("*.py") if path.stem not in text] == []


@pytest.mark.slow
def test_an_example_runs_from_the_command_line(place: Path, tmp_path: Path) -> None:
    words = ["merge_with_progress.py", place / "base", place / "a", tmp_path / "out"]
    command = [sys.executable, EXAMPLES / words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "100.0%" in done.stdout
    assert "q_proj" in done.stdout
    assert "tensors merged" in done.stdout


def test_two_adapters_are_merged(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("merge_two_adapters", place / "base", place / "a", place / "b", tmp_path / "out")
    assert regraft.verify(tmp_path / "out").ok
    assert "q_proj" in capsys.readouterr().out


def test_a_merge_is_swapped_and_taken_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("undo_and_swap", place / "base", place / "a", place / "b", tmp_path)
    assert "the base, byte for byte" in capsys.readouterr().out


def test_a_quantized_base_is_merged_into(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("quantized", place / "base", place / "a", tmp_path)
    said = capsys.readouterr().out
    assert "in 4 bits: 4 tensors merged" in said
    assert "in 16 bits: 4 tensors merged" in said


def test_rows_have_adapters_of_their_own(place: Path) -> None:
    answers = run("serve_rows", place / "base", place / "a", place / "b")
    assert isinstance(answers, list)
    assert len(answers) == 4


def test_more_adapters_than_fit_are_served(place: Path) -> None:
    stats = run("many_adapters", place / "base", place / "many", "100KiB")
    assert isinstance(stats, regraft.CacheStats)
    assert stats.hits + stats.misses == 4
    assert stats.peak_bytes <= 100 * 2**10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_with_trainer", "train_with_sft"])
def test_an_adapter_is_trained_and_saved(name: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "sql"
    run(name, place / "base", out, 3)
    with safe_open(out / "adapter_model.safetensors", "np") as saved:
        assert any("lora_B" in key for key in saved.keys())  # noqa: SIM118  (it is no dict)
    assert regraft.check(place / "base", out).ok
