"""Adapters that are to be shrunk, and what numpy says they should become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from merging import toys

Arrays = dict[str, np.ndarray[Any, Any]]

WIDTH = 24
MODULES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
LM_HEAD = f"{toys.PREFIX}lm_head"


def lowrank(modules: list[str] = MODULES, rank: int = 8, decay: float = 0.5) -> Arrays:
    """Return factors whose singular values fall, each module's at a pace of its own."""
    tensors: Arrays = {}
    for number, module in enumerate(modules):
        pace = decay ** (1 + number / 2)
        a = toys.draw(rank, WIDTH, seed=2 * number)
        b = toys.draw(WIDTH, rank, seed=2 * number + 1) * pace ** np.arange(rank)
        tensors[f"{toys.PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{toys.PREFIX}{module}.lora_B.weight"] = b.astype(np.float32)
    return tensors


def write_adapter(folder: Path, tensors: Arrays | None = None, **config: Any) -> Path:
    """Write an adapter of rank 8 and scale 1.5."""
    fields = {"r": 8, "lora_alpha": 12} | config
    return toys.write_adapter(folder, lowrank() if tensors is None else tensors, **fields)


def config_of(folder: Path) -> dict[str, Any]:
    """Return an adapter's config."""
    found: dict[str, Any] = toys.read_json(folder / "adapter_config.json")
    return found


def product(tensors: Arrays, module: str) -> np.ndarray[Any, Any]:
    """Return B A of a linear layer, in float64."""
    a, b = (tensors[f"{toys.PREFIX}{module}.lora_{x}.weight"] for x in "AB")
    return b.astype(np.float64) @ a.astype(np.float64)


def best(matrix: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    """Return numpy's best approximation of a whole matrix."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


EXPERTS, OUT, RANK = 3, 7, 6
STACK = "model.layers.0.mlp.experts"


def stack(rank: int = RANK, scale: float = 1.0) -> Arrays:
    """Return factors of a stack of experts."""
    key = f"{toys.PREFIX}{STACK}"
    a = toys.draw(EXPERTS * rank, WIDTH, seed=7) * scale
    b = toys.draw(OUT, rank * EXPERTS, seed=8)
    return {f"{key}.lora_A.weight": a.astype(np.float32), f"{key}.lora_B.weight": b}


def with_copies(
    folder: Path, change: float = 0.0, dtype: Any = np.float32, rows: int = toys.VOCAB
) -> Path:
    """Write an adapter of embed_tokens that brings copies of both embeddings of the toy llama."""
    base = toys.llama_tensors()
    embed = base[f"{toys.EMBED}.weight"].astype(np.float32)
    embed = np.resize(embed, (rows, toys.HIDDEN))
    embed[-1, -1] += change
    tensors = dict(toys.embedding(toys.EMBED, rows, toys.HIDDEN)) | {
        f"{toys.PREFIX}{toys.EMBED}.base_layer.weight": embed.astype(dtype),
        f"{LM_HEAD}.weight": base["lm_head.weight"].astype(dtype),
    }
    return toys.write_adapter(folder, tensors, target_modules=["embed_tokens"])
