"""What a folder or file looks like, by names and first bytes: for messages and ``inspect``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from regraft.errors import RegraftError
from regraft.formats.files.reading import open_regular
from regraft.formats.gguf import general_type
from regraft.formats.safetensors import read_header

Looks = Literal[
    "adapter", "checkpoint", "merged", "mlx-adapter", "gguf", "tokenizer", "empty", "unknown"
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_SAFE = "adapter_model.safetensors"
ADAPTER_TORCH = "adapter_model.bin"
NEW_EMBEDDINGS = "new_embeddings.safetensors"
"""Rows of added tokens beside an adapter, as vLLM reads them."""
MLX_WEIGHTS = "adapters.safetensors"
RECEIPT = "regraft/receipt.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth")

DESCRIPTIONS: dict[Looks, str] = {
    "adapter": "an adapter",
    "checkpoint": "a full model",
    "merged": "a full model that regraft merged",
    "mlx-adapter": "an MLX adapter",
    "gguf": "a GGUF model",
    "tokenizer": "a tokenizer without weights",
    "empty": "an empty folder",
    "unknown": "neither a model nor an adapter",
}

_TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}
_LORA_KEY = re.compile(
    r"(?:^|[._])lora_(?:A|B|a|b|up|down|embedding_A|embedding_B|unet|te\d?)(?:[._]|$)"
)


def looks_like(path: Path) -> Looks:
    """Return what ``path`` looks like; ``"unknown"`` also where it cannot be read."""
    try:
        if path.is_file():
            return _file_looks_like(path)
        names = {entry.name for entry in path.iterdir()}
        return _folder_looks_like(path, names) if names else "empty"
    except (OSError, ValueError):  # a name that no file can have
        return "unknown"


def _folder_looks_like(path: Path, names: set[str]) -> Looks:
    weights = any(map(is_model_weights, names))
    adapter_weights = bool(names & {ADAPTER_SAFE, ADAPTER_TORCH})
    signs: tuple[tuple[bool, Looks], ...] = (
        (weights and (path / RECEIPT).is_file(), "merged"),
        (adapter_weights and (ADAPTER_CONFIG in names or not weights), "adapter"),
        (MLX_WEIGHTS in names, "mlx-adapter"),
        (weights, _weights_look_like(path, names)),
        (ADAPTER_CONFIG in names, "adapter"),
        (any(name.endswith(".gguf") for name in names), _gguf_looks_like(path, names)),
        (bool(names & _TOKENIZER_FILES), "tokenizer"),
    )
    return next((looks for seen, looks in signs if seen), "unknown")


def _gguf_looks_like(path: Path, names: set[str]) -> Looks:
    files = [path / name for name in names if name.endswith(".gguf")]
    adapters = [file for file in files if general_type(file) == "adapter"]
    return "adapter" if adapters and len(adapters) == len(files) else "gguf"


def _weights_look_like(path: Path, names: set[str]) -> Looks:
    """Tell a lone LoRA file under a name of its own, as other trainers write it, from a model."""
    weights = [name for name in names if is_model_weights(name)]
    if len(weights) == 1 and "config.json" not in names and weights[0].endswith(".safetensors"):
        return _file_looks_like(path / weights[0])
    return "checkpoint"


def is_model_weights(name: str) -> bool:
    """Return whether a file name is one that weights of a full model have."""
    if name in (ADAPTER_SAFE, ADAPTER_TORCH, MLX_WEIGHTS):
        return False
    return name.endswith((".safetensors", ".safetensors.index.json")) or (
        name.startswith(("pytorch_model", "diffusion_pytorch_model"))
        and name.endswith((".bin", ".bin.index.json"))
    )


def _file_looks_like(path: Path) -> Looks:
    by_name: dict[str, Looks] = {
        ADAPTER_SAFE: "adapter",
        ADAPTER_TORCH: "adapter",
        MLX_WEIGHTS: "mlx-adapter",
    }
    if path.name in by_name:
        return by_name[path.name]
    if is_gguf(path):
        return "adapter" if general_type(path) == "adapter" else "gguf"
    if path.suffix in TORCH_SUFFIXES:
        return "checkpoint"
    return _safetensors_looks_like(path) if path.suffix == ".safetensors" else "unknown"


def _safetensors_looks_like(path: Path) -> Looks:
    try:
        names = read_header(path).tensors
    except RegraftError:
        return "unknown"
    return "adapter" if is_mostly_lora(names) else "checkpoint"


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES - {"tokenizer_config.json"})


def is_gguf(path: Path) -> bool:
    """Return whether a file is GGUF, by its suffix or its first four bytes."""
    if path.suffix == ".gguf":
        return True
    try:
        with os.fdopen(open_regular(path), "rb") as file:  # which waits for no pipe
            return file.read(4) == b"GGUF"
    except (OSError, RegraftError):
        return False


def record_of(path: Path) -> Path:
    """Return the folder beside a GGUF file that regraft keeps its receipt and undo in."""
    return path.with_name(f"{path.name}.regraft")


def records_of(model: Path) -> Path:
    """Return where receipt and undo of a merged model lie: in its folder, or beside a lone file."""
    return model / Path(RECEIPT).parent if model.is_dir() else record_of(model)


def receipt_path(model: Path) -> Path:
    """Return where the receipt of a merged model lies."""
    return records_of(model) / Path(RECEIPT).name


def is_mostly_lora(names: Iterable[str]) -> bool:
    """Return whether most of a file's tensors are LoRA factors, in any dialect's naming."""
    found = [_LORA_KEY.search(name) is not None for name in names]
    return sum(found) * 2 > len(found)
