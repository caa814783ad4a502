"""A model for mlx-lm: the same weights, and a config that says what transformers 5 moved away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_python import MLX, asked
from exporting.models import own_logs, save_model
from regraft.errors import OutputExistsError, UnsupportedError, UsageError
from regraft.exporting.mlx import mlx_config
from regraft.exporting.verb import export

PROMPTS = [[1, 70, 300, 5], list(range(40, 64))]

_PROGRAM = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
asked = json.load(open(sys.argv[1]))
model, _ = load_model(Path(asked["model"]))
def logs(ids):
    logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
    return (logits - mx.logsumexp(logits)).tolist()
json.dump([logs(ids) for ids in asked["prompts"]], open(sys.argv[2], "w"))
"""

THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": False, **THETA}),
    "qwen2": ("qwen2", THETA),
    "qwen2, untied": ("qwen2", THETA | {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", THETA),
    "gemma2": ("gemma2", THETA | {"sliding_window": 64}),
    "gemma3": ("gemma3", {"num_hidden_layers": 4, "layer_types": [
        "sliding_attention", "full_attention"] * 2, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
    "phi3": ("phi3", THETA),
    "starcoder2": ("starcoder2", THETA),
    "stablelm": ("stablelm", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    "llama, linear": ("llama", {"attention_bias": False, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
}  # fmt: skip


def answers(model: Path) -> list[list[float]]:
    question = {"model": str(model), "prompts": PROMPTS}
    found: list[list[float]] = asked(MLX, _PROGRAM, question, model.parent)
    return found


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_answers_as_transformers_does(case: str, tmp_path: Path) -> None:
    architecture, changes = CASES[case]
    model = save_model(tmp_path / "model", architecture, **changes)
    export(model, tmp_path / "out", engine="mlx")
    for found, expected in zip(answers(tmp_path / "out"), own_logs(model, PROMPTS), strict=True):
        assert np.abs(np.array(found) - expected).max() <= 1e-4 * np.ptp(expected)


def test_without_the_export_mlx_lm_answers_otherwise_in_silence(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", **CASES["llama"][1])
    expected = np.array(own_logs(model, PROMPTS))
    error = np.abs(np.array(answers(model)) - expected).max()
    assert error >= 1e-2 * np.ptp(expected)


def test_weights_and_side_files_are_the_same_bytes(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2", **THETA)
    report = export(model, tmp_path / "out", engine="mlx")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(report.files) == names >= {"model.safetensors", "tokenizer.json"}
    for name in names - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    own = json.loads((model / "config.json").read_text())
    assert config == own | {"rope_theta": 500.0}
    assert report.changes == ("rope_theta",)


def test_what_a_config_says_stays_and_what_it_lacks_is_added() -> None:
    moe = {"num_local_experts": 8, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}
    assert mlx_config(moe, has_head=True) == moe | {
        "tie_word_embeddings": False, "num_experts": 8,
    }  # fmt: skip
    inner = {"text_config": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 9.0, "factor": 2.0,
    }}, "tie_word_embeddings": True}  # fmt: skip
    found = mlx_config(inner, has_head=False)["text_config"]
    assert found["rope_theta"] == 9.0
    assert found["rope_scaling"] == {"type": "llama3", "rope_type": "llama3", "factor": 2.0}
    with pytest.raises(UnsupportedError, match="which layers look back"):
        mlx_config({"model_type": "gemma3_text", "layer_types": [
            "full_attention", "sliding_attention"]}, has_head=False)  # fmt: skip


def test_a_window_that_mlx_lm_does_not_keep_to_is_told(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gemma2")
    report = export(model, tmp_path / "out", engine="mlx")
    assert "looks back 8 tokens" in " ".join(report.notes)


def test_what_mlx_lm_would_not_read_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2")
    with pytest.raises(UsageError, match="stay as they are"):
        export(model, tmp_path / "out", engine="mlx", type="q8_0")
    with pytest.raises(UsageError, match="cannot export for 'tpu'"):
        export(model, tmp_path / "out", engine="tpu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(OutputExistsError):
        export(model, tmp_path / "out", engine="mlx", overwrite=True)
    (model / "model.safetensors").rename(model / "weights.safetensors")
    with pytest.raises(UnsupportedError, match=r"model\*.safetensors"):
        export(model, tmp_path / "new", engine="mlx")
    assert not (tmp_path / "new").exists()
