"""Numbers, bases and adapters of odd shapes; the same on any machine.

Numbers are sums of whole fractions, so no function of a mathematical library takes part in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

BF16 = ml_dtypes.bfloat16
DTYPES: dict[str, Any] = {"bfloat16": BF16, "float16": np.float16, "float32": np.float32}
"""The dtypes that are merged into and that ``dtype=`` takes, by their names."""
FP8 = ml_dtypes.float8_e4m3fn
_NAMES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8_e4m3fn": "F8_E4M3",
    "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8",
}  # fmt: skip
PREFIX = "base_model.model."
INDEX = "model.safetensors.index.json"


def draw(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Return numbers around 0 with a variance of 1/3, the same for the same arguments."""
    rng = np.random.default_rng([seed, *shape])
    total = rng.random(shape) + rng.random(shape) + rng.random(shape) + rng.random(shape)
    return np.asarray(total - 2, np.float32).astype(dtype)


def raw(*shape: int, seed: int = 0, dtype: Any = np.uint8) -> Array:
    """Return random bits."""
    item = np.dtype(dtype).itemsize
    bits = np.random.default_rng([seed, *shape]).integers(0, 256, (*shape, item), dtype=np.uint8)
    values: Array = bits.view(dtype)[..., 0]
    return values


def save_file(tensors: Mapping[str, Array], path: Path) -> None:
    """Write a safetensors file, the tensors in the order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in sorted(tensors.items()):
        places = [end, end + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": array.shape,
                        "data_offsets": places}  # fmt: skip
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in sorted(tensors.items()):
            file.write(np.ascontiguousarray(array).tobytes())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_base(
    folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None,
    shards: Sequence[Iterable[str]] = (),
) -> Path:  # fmt: skip
    """Write a base, in one file or in the shards whose tensors are named; return its folder."""
    folder.mkdir(parents=True)
    if config is not None:
        write_json(folder / "config.json", config)
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held = {name: tensors[name] for name in names}
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return folder


def write_adapter(folder: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    """Write an adapter in PEFT's format; return its folder."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    chosen = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": []} | config
    write_json(folder / "adapter_config.json", chosen)
    return folder


def lora(
    module: str, out: int, inputs: int, rank: int = 3, seed: int = 1, share: float = 0.25
) -> Tensors:
    """Return the factors of a linear layer, A (rank, inputs) and B (out, rank)."""
    key = f"{PREFIX}{module}"
    return {
        f"{key}.lora_A.weight": draw(rank, inputs, seed=seed) * np.float32(share),
        f"{key}.lora_B.weight": draw(out, rank, seed=seed + 1) * np.float32(share),
    }


def dora(module: str, out: int, inputs: int, rank: int = 3, seed: int = 1) -> Tensors:
    """Return the factors of a linear layer and its magnitudes (out)."""
    magnitude = 4 + draw(out, seed=seed + 2) / 4
    return lora(module, out, inputs, rank, seed) | {
        f"{PREFIX}{module}.lora_magnitude_vector": magnitude
    }


def embedding(module: str, rows: int, width: int, rank: int = 3, seed: int = 1) -> Tensors:
    """Return the factors of an embedding, A (rank, rows) and B (width, rank)."""
    key = f"{PREFIX}{module}"
    return {
        f"{key}.lora_embedding_A": draw(rank, rows, seed=seed) / 4,
        f"{key}.lora_embedding_B": draw(width, rank, seed=seed + 1) / 4,
    }


def experts(
    module: str, count: int, out: int, inputs: int, rank: int = 3, seed: int = 1
) -> Tensors:
    """Return the factors of a stack of experts: A (count rank, inputs), B (out, rank count)."""
    return lora(module, out, inputs, rank * count, seed)
