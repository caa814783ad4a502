"""``regraft export``: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporting.models import save_model
from regraft.cli.app import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("export") / "model", "qwen2")


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(["export", *map(str, arguments)])
    return int(str(caught.value.code or 0))


def test_a_summary_says_what_was_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "-o", tmp_path / "out.gguf", "--type", "q8_0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tokenizer  gpt2 (gpt-2)" in lines
    assert any(line.startswith("tensors") and "Q8_0" in line for line in lines)
    assert lines[-1] == f"written: {tmp_path / 'out.gguf'}"


def test_json_holds_the_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "-o", tmp_path / "out", "--for", "mlx", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["changes"]) == ("mlx", ["rope_theta"])


def test_what_the_engine_does_otherwise_is_a_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "-o", tmp_path / "out", "--for", "ollama", "-q") == 0
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "no chat template" in streams.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-o", "out.bin"], 2, "ends in .gguf"),
        (["-o", "out.gguf", "--type", "q4_k_m"], 2, "llama-quantize"),
        (["-o", "out", "--for", "vllm"], 2, "vllm"),
        (["-o", "out.gguf", "--like", "nothing.gguf"], 3, "no such file"),
    ],
)
def test_refusals_end_with_their_code(
    arguments: list[str], code: int, said: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(model, *arguments) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
