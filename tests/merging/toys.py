"""Bases and adapters of a few kilobytes, of any dtype and shape, written without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from regraft.merging.files.receipt import read_receipt, receipt_bytes

Tensors = Mapping[str, np.ndarray]

BF16 = ml_dtypes.bfloat16
PREFIX = "base_model.model."
INDEX = "model.safetensors.index.json"

HIDDEN, INTER, VOCAB, LAYERS, RANK = 16, 24, 40, 2, 3
ALPHA = 6
Q0 = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""Of the base that :func:`llama_tensors` makes; transformers loads it."""


def draw(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Return random numbers, the same for the same arguments."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def llama_tensors(dtype: Any = BF16) -> dict[str, np.ndarray]:
    """Return every tensor of an untied llama of two layers."""
    shapes: dict[str, tuple[int, ...]] = {f"{EMBED}.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        within = f"model.layers.{layer}."
        shapes |= {f"{within}self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"{within}mlp.{n}_proj.weight": (INTER, HIDDEN) for n in ("gate", "up")}
        shapes[f"{within}mlp.down_proj.weight"] = (HIDDEN, INTER)
        shapes |= {f"{within}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {n: draw(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text())


def write_base(
    folder: Path,
    tensors: Tensors | None = None,
    config: Mapping[str, Any] | None = CONFIG,
    shards: Sequence[Iterable[str]] = (),
) -> Path:
    """Write a base, in one file or in the shards whose tensors are named; return its folder."""
    tensors = llama_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_json(folder / "config.json", config)
    if not shards:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held = {name: tensors[name] for name in names}
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return folder


def write_sharded_base(folder: Path, count: int = 3) -> Path:
    """Write the llama with its tensors dealt out to several shards."""
    names = sorted(llama_tensors())
    return write_base(folder, shards=[names[start::count] for start in range(count)])


def lora(module: str, out: int, inputs: int, rank: int = RANK, seed: int = 1) -> dict[str, Any]:
    """Return the two factors of a linear layer, by their keys in PEFT's file."""
    key = f"{PREFIX}{module}"
    return {
        f"{key}.lora_A.weight": draw(rank, inputs, seed=seed) / 4,
        f"{key}.lora_B.weight": draw(out, rank, seed=seed + 1) / 4,
    }


def dora(module: str, out: int, inputs: int, rank: int = RANK, seed: int = 1) -> dict[str, Any]:
    """Return the factors of a linear layer and its magnitudes."""
    magnitude = 4 + draw(out, seed=seed + 2) / 4
    key = f"{PREFIX}{module}.lora_magnitude_vector"
    return {**lora(module, out, inputs, rank, seed), key: magnitude}


def embedding(module: str, rows: int, width: int, rank: int = RANK, seed: int = 1) -> Tensors:
    """Return the two factors of an embedding."""
    key = f"{PREFIX}{module}"
    return {
        f"{key}.lora_embedding_A": draw(rank, rows, seed=seed) / 4,
        f"{key}.lora_embedding_B": draw(width, rank, seed=seed + 1) / 4,
    }


def attention(rank: int = RANK, seed: int = 1) -> dict[str, Any]:
    """Return factors for every q_proj and v_proj of the llama."""
    modules = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(LAYERS) for n in "qv"]
    return {
        key: value
        for number, module in enumerate(modules)
        for key, value in lora(module, HIDDEN, HIDDEN, rank, seed + 2 * number).items()
    }


def write_adapter(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """Write an adapter in PEFT's format and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = attention() if tensors is None else tensors
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", adapter_config(**config))
    return folder


def adapter_config(**fields: Any) -> dict[str, Any]:
    """Return a LoraConfig as PEFT writes it, short of what is at its default."""
    targets = ["q_proj", "v_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    return config | fields


def load(folder: Path) -> dict[str, np.ndarray]:
    """Return every tensor in the safetensors files of a folder, as the reference library reads."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not tensors.keys() & found.keys(), "a tensor is in two files"
        tensors |= found
    return tensors


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder: a file's content, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def reseal(model: Path) -> None:
    """Let the receipt speak of the undo's files as they are, as somebody could who means harm."""
    receipt = read_receipt(model / "regraft/receipt.json")
    there = [path for path in (model / "regraft/undo").rglob("*") if path.is_file()]
    digests = {
        path.relative_to(model).as_posix(): blake3(path.read_bytes()).hexdigest() for path in there
    }
    changed = replace(receipt, files={**receipt.files, **digests})
    (model / "regraft/receipt.json").write_bytes(receipt_bytes(changed))
