"""Facts shown in the engines themselves, where their Python is: llama.cpp and mlx-lm.

vLLM wants an environment of its own, whose Python REGRAFT_VLLM_PYTHON names. ``make engines`` makes
one (``.engines/vllm/bin/python``), and shows all facts in all engines.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from engine_python import LLAMA_CPP, MLX, Engine, python_of
from regraft.engines.llama_cpp import scale_of

ROOT = Path(__file__).parents[2]
PEFT_AND_TORCH = ("peft", "torch", "gguf")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PEFT_AND_TORCH),
        reason="the live model to hold engines against needs peft, torch and gguf",
    ),
]

VLLM = os.environ.get("REGRAFT_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    not VLLM, reason="vLLM: REGRAFT_VLLM_PYTHON names no Python that has it"
)

Script = Callable[[str], Any]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return what imports a module of scripts/engines."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: import_module(f"engines.{name}")


def answer(script: Script, engine: Engine, job: dict[str, Any], folder: Path) -> Any:
    """Return what an engine says of a job; the test is skipped where there is none."""
    running, name = script("running"), {LLAMA_CPP: "llama.cpp", MLX: "mlx"}[engine]
    runner = next(each for each in running.RUNNERS if each.name == name)
    return running.run(runner, Path(python_of(engine)), [job], folder)[0]


def adapted(fixtures: Any, folder: Path, **config: Any) -> tuple[Path, Path]:
    """Return a small llama and an adapter of one module of each layer."""
    base = fixtures.make_base("llama", folder / "base")
    usual = {"target_modules": ["down_proj"]} | config
    return base, fixtures.make(fixtures.Fixture("", config=usual), base, folder)


def apart(told: Any, true: list[float]) -> float:
    """Return the largest difference between an engine's log-probabilities and the true ones."""
    assert "logprobs" in told, told
    assert len(told["logprobs"]) > 300
    return max(abs(true[int(token)] - value) for token, value in told["logprobs"].items())


def as_gguf_lora(adapter: Path, file: Path, alpha: float) -> Path:
    """Write an adapter's factors as llama.cpp's converter does, with one alpha."""
    from safetensors.numpy import load_file

    from regraft.testing import gguf_files

    tensors = {}
    for name, values in load_file(adapter / "adapter_model.safetensors").items():
        layer, which = name.split(".")[4], "lora_a" if "lora_A" in name else "lora_b"
        stored = np.ascontiguousarray(values, np.float32)
        tensors[f"blk.{layer}.ffn_down.weight.{which}"] = (stored, "F32")
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    return gguf_files.write(file, "llama", metadata, tensors)


@pytest.mark.parametrize(("alpha", "rank"), [(6.0, 4), (0.0, 4), (9.0, 3)])
def test_llama_cpp_divides_one_alpha_by_the_rank(
    script: Script, tmp_path: Path, alpha: float, rank: int
) -> None:
    """An alpha of 0 is none, which is a scale of 1."""
    fixtures, running = map(script, ("fixtures", "running"))
    as_it_scales = scale_of(alpha, rank) * rank
    base, adapter = adapted(fixtures, tmp_path, r=rank, lora_alpha=as_it_scales)
    running.as_gguf(base, tmp_path / "base.gguf")
    file = as_gguf_lora(adapter, tmp_path / "adapter.gguf", alpha)
    job = running._job(tmp_path / "base.gguf", file)
    true = fixtures.answers(base, adapter)
    assert apart(answer(script, LLAMA_CPP, job, tmp_path), true) < 0.01
    assert max(map(abs, np.subtract(true, fixtures.answers(base, None)))) > 0.1


def test_llama_cpp_answers_otherwise_with_rslora_as_check_says(
    script: Script, tmp_path: Path
) -> None:
    fixtures, running = map(script, ("fixtures", "running"))
    base, adapter = adapted(fixtures, tmp_path, use_rslora=True)
    running.as_gguf(base, tmp_path / "base.gguf")
    file = as_gguf_lora(adapter, tmp_path / "adapter.gguf", 6.0)
    job = running._job(tmp_path / "base.gguf", file)
    told = answer(script, LLAMA_CPP, job, tmp_path)
    assert apart(told, fixtures.answers(base, adapter)) > 0.1
    report = regraft.check(base, adapter, engine="llama.cpp").engine
    assert report is not None
    assert {finding.applied for finding in report.findings} == {1.5}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.0": 3}, "rank_pattern": {"layers.1.mlp.down_proj": 7}},
        {"use_dora": True},
    ],
)
def test_mlx_answers_as_trained(script: Script, tmp_path: Path, config: dict[str, Any]) -> None:
    fixtures, running = map(script, ("fixtures", "running"))
    base, adapter = adapted(fixtures, tmp_path, **config)
    job = running.for_mlx(fixtures.Fixture(""), base, adapter, tmp_path)
    assert regraft.check(base, adapter, engine="mlx").ok
    assert apart(answer(script, MLX, job, tmp_path), fixtures.answers(base, adapter)) < 1e-3


def test_mlx_refuses_a_peft_folder(script: Script, tmp_path: Path) -> None:
    fixtures, running = map(script, ("fixtures", "running"))
    base, adapter = adapted(fixtures, tmp_path)
    assert "refused" in answer(script, MLX, running._job(base, adapter), tmp_path)
    report = regraft.check(base, adapter, engine="mlx").engine
    assert report is not None
    assert "--to mlx" in report.notes[0]


@needs_vllm
def test_vllm_answers_as_the_base_as_check_says(script: Script, tmp_path: Path) -> None:
    """It loads adapters whose names belong to nothing, and says nothing."""
    fixtures, running = map(script, ("fixtures", "running"))
    runner = next(each for each in running.RUNNERS if each.name == "vllm")
    by_name = {each.name: each for each in fixtures.FIXTURES}
    names = ("as PEFT saves it", "names of another class")
    base = fixtures.make_base("llama", tmp_path / "base")
    served = [fixtures.make(by_name[name], base, tmp_path / name) for name in names]
    jobs = [runner.job(by_name[name], base, folder, tmp_path)
            for name, folder in zip(names, served, strict=True)]  # fmt: skip
    acts, silent = running.run(runner, Path(str(VLLM)), jobs, tmp_path)
    trained = fixtures.answers(base, tmp_path / names[0] / "adapter")
    assert apart(acts, trained) < 1e-3
    assert apart(silent, fixtures.answers(base, None)) < 1e-3
    assert apart(silent, trained) > 0.1
    reports = [regraft.check(base, folder, engine="vllm") for folder in served]
    assert [report.ok for report in reports] == [True, False]
