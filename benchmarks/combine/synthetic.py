"""Adapters and models of a 7B model's shapes, with random values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

RANK = 16


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        hidden: width.
        inner: width inside an MLP.
        layers: how many.
    """

    hidden: int
    inner: int
    layers: int

    def modules(self) -> Iterator[tuple[str, int, int]]:
        """Yield every linear layer: name, outputs, inputs."""
        for layer in range(self.layers):
            inside = f"model.layers.{layer}"
            for name in "qkvo":
                yield f"{inside}.self_attn.{name}_proj", self.hidden, self.hidden
            for name in ("gate", "up"):
                yield f"{inside}.mlp.{name}_proj", self.inner, self.hidden
            yield f"{inside}.mlp.down_proj", self.hidden, self.inner


def write_adapters(folder: Path, shape: Shape, count: int) -> list[Path]:
    """Write adapters of all linear layers, in float16."""
    return [write_adapter(folder / f"adapter-{n}", shape, n) for n in range(count)]


def write_adapter(folder: Path, shape: Shape, seed: int) -> Path:
    """Write one adapter."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, out, inputs in shape.modules():
        a, b = rng.standard_normal((RANK, inputs)), rng.standard_normal((out, RANK)) / 100
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name, _, _ in shape.modules()})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_models(folder: Path, shape: Shape) -> tuple[Path, Path]:
    """Write a llama in float32, and a fine-tune of it that falls off as real ones do."""
    rng = np.random.default_rng(0)
    vocabulary = 256
    vectors: dict[str, Any] = {
        f"model.layers.{layer}.{name}_layernorm.weight": np.ones(shape.hidden, np.float32)
        for layer in range(shape.layers)
        for name in ("input", "post_attention")
    }
    vectors["model.norm.weight"] = np.ones(shape.hidden, np.float32)
    for name in ("model.embed_tokens", "lm_head"):
        drawn = rng.standard_normal((vocabulary, shape.hidden)).astype(np.float32)
        vectors[f"{name}.weight"] = drawn / 50
    base, tuned = dict(vectors), dict(vectors)
    for name, out, inputs in shape.modules():
        weight = rng.standard_normal((out, inputs)).astype(np.float32) / 50
        base[f"{name}.weight"] = weight
        tuned[f"{name}.weight"] = weight + _difference(rng, out, inputs)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": vocabulary, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 512,
    }  # fmt: skip
    for place, tensors in ((folder / "base", base), (folder / "tuned", tuned)):
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(config))
    return folder / "base", folder / "tuned"


def _difference(rng: np.random.Generator, out: int, inputs: int) -> np.ndarray:
    """Return a matrix whose singular values fall, above a floor of noise."""
    rank = 256
    left = rng.standard_normal((out, rank)).astype(np.float32)
    right = rng.standard_normal((rank, inputs)).astype(np.float32)
    fall = (np.arange(1, rank + 1, dtype=np.float32)) ** -0.7
    noise = rng.standard_normal((out, inputs)).astype(np.float32)
    return np.asarray((left * fall) @ right / 1e4 + noise / 1e4, np.float32)
