"""A llama-like base and a PEFT-like adapter, made by hand: no torch, a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INTER, VOCAB, LAYERS, RANK = 16, 24, 32, 2, 4

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}

ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/tiny-llama",
    "revision": "abc123",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": None,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "peft_version": "0.18.0",
}


def _layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"
    }
    shapes |= {f"mlp.{name}_proj.weight": (INTER, HIDDEN) for name in ("gate", "up")}
    shapes["mlp.down_proj.weight"] = (HIDDEN, INTER)
    shapes |= {f"{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def base_tensors(dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Return all tensors of the base; the same on every call."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= _layer_shapes(layer)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    draw = np.random.default_rng(1)
    return {n: draw.normal(size=s).astype(dtype) for n, s in shapes.items()}


def make_base(folder: Path, dtype: type = np.float32, **config: Any) -> Path:
    """Write the base as one file and return its folder."""
    folder.mkdir(parents=True)
    save_file(base_tensors(dtype), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def make_sharded_base(folder: Path) -> Path:
    """Write the base as two shards with an index and return its folder."""
    folder.mkdir(parents=True)
    tensors = base_tensors()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:8]}
    halves["model-00002-of-00002.safetensors"] = names[8:]
    for file, held in halves.items():
        save_file({n: tensors[n] for n in held}, folder / file, {"format": "pt"})
    weight_map = {n: file for file, held in halves.items() for n in held}
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter_tensors(targets: tuple[str, ...] = ("q_proj", "v_proj")) -> dict[str, np.ndarray]:
    """Return the LoRA factors of attention modules in every layer."""
    draw = np.random.default_rng(2)
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{key}.lora_A.weight"] = draw.normal(size=(RANK, HIDDEN)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = draw.normal(size=(HIDDEN, RANK)).astype(np.float32)
    return tensors


def make_adapter(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """Write an adapter and return its folder."""
    folder.mkdir(parents=True)
    weights = adapter_tensors() if tensors is None else tensors
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))
    return folder


def make_receipt(folder: Path) -> Path:
    """Put a receipt into a base's folder, as a merge does, and return the folder."""
    named = {"revision": None, "tensors": {}}
    receipt = {
        "receipt": 1,
        "regraft": "0.1.0",
        "created": "2025-01-02T03:04:05Z",
        "base": {"source": "org/base@main", "weight": None, **named, "revision": "f" * 40},
        "adapters": [{"source": "./style", "weight": 0.5, **named}],
        "totals": {"relative_delta": 0.0125, "changed_share": 0.75},
    }
    (folder / "regraft").mkdir()
    (folder / "regraft" / "receipt.json").write_text(json.dumps(receipt))
    return folder
