"""A model of each family as GGUF: what regraft reads back, and what llama.cpp answers with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asking_llama_cpp import ask
from exporting.models import OWN, ROWS, own_logs, save_model
from regraft.exporting.verb import export
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.hub import Located
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.inputs.dequantized_view import virtual
from regraft.merging.inputs.gguf import open_gguf_base
from regraft.merging.inputs.source import FileSource

PROMPTS = [[1, 70, 300, 5], list(range(40, 64)), [600, 3, 3, 9, 200, 17, 41, 8, 90, 91, 92]]

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.5] * 8,
    "short_factor": [1.1, 1.0, 1.2, 1.3, 1.0, 1.0, 1.4, 1.0], "factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in OWN},
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": None}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biased MLP": ("llama", {"mlp_bias": True}),
    "llama, llama3's rotation": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2, linear rotation": (
        "qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "qwen3, YaRN": ("qwen3", {"rope_parameters": YARN}),
    "gemma3, its own rotations": ("gemma3", {"rope_parameters": GEMMA_ROPES}),
    "gemma3, six layers": ("gemma3", {"num_hidden_layers": 7, "layer_types": None}),
    "gemma2, another order of layers": (
        "gemma2", {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "phi3, a part rotated": (
        "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                     "partial_rotary_factor": 0.5}},
    ),
    "phi3, long": ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 2048,
                            "original_max_position_embeddings": 512}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "stablelm, tied": ("stablelm", {"tie_word_embeddings": True}),
    "nemotron, biased": ("nemotron", {"attention_bias": True}),
}  # fmt: skip


def exported(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    architecture, changes = CASES[case]
    model = save_model(folder / "model", architecture, dtype, **changes)
    export(model, folder / "out.gguf")
    return model, folder / "out.gguf"


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_answers_as_transformers_does(case: str, tmp_path: Path) -> None:
    model, out = exported(tmp_path, case)
    found = ask(out, tmp_path, prompts=PROMPTS, vocab=ROWS)["logs"]
    for logs, expected in zip(found, own_logs(model, PROMPTS), strict=True):
        answer = np.array([logs[str(token)] for token in range(ROWS)])
        error = np.abs(answer - expected).max() / np.ptp(expected)
        # llama.cpp takes GELU from a table of float16.
        gelu = CASES[case][0] in ("gemma2", "gemma3", "starcoder2")
        assert error <= (1e-3 if gelu else 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", OWN)
def test_what_is_read_back_has_the_same_bytes(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, out = exported(tmp_path, architecture, dtype)
    own = open_checkpoint(Located(model, str(model), None, None))
    back = open_gguf_base(out)
    assert back.config_is_made
    assert back.config["model_type"] == (own.config or {})["model_type"]
    centered = architecture in ("gemma2", "gemma3", "nemotron")
    with FilePool() as files:
        source = DequantizingSource(back.weights, FileSource(files))
        for name, spec in own.tensors.items():
            weight = back.weights[name]
            raw = np.empty(virtual(weight).nbytes, np.uint8)
            source.read(virtual(weight), 0, raw)
            expected = _floats(files.read_bytes(spec), spec.dtype)
            found = _floats(raw.tobytes(), weight.dtype)
            if centered and name.endswith("norm.weight"):  # 1 was added, and taken off
                assert np.abs(found - expected).max() <= 2**-23
                continue
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), name
            if len(spec.shape) == 2:
                assert raw.tobytes() == files.read_bytes(spec)


def _floats(raw: bytes, dtype: str) -> Any:
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.frombuffer(bytearray(raw), dtype=kinds[dtype]).float().numpy()
