"""Quantized bases of a few kilobytes, as bitsandbytes stores them in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional
from safetensors.numpy import load_file
from safetensors.torch import save_file

from merging import toys
from merging.toys import write_json

Quantize = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
"""Turns a weight into the tensors that store it."""


def is_linear(name: str) -> bool:
    """Whether a tensor of the toy llama is what gets quantized."""
    return name.endswith("_proj.weight")


def four_bit(kind: str, *, nested: bool, blocksize: int = 64) -> Quantize:
    """Return what quantizes to NF4 or FP4."""

    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, state = functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type=kind, compress_statistics=nested
        )
        found = {name: packed}
        found |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        return found

    return quantize


def int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize to LLM.int8."""
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    module = name.removesuffix(".weight")
    return {name: codes, f"{module}.SCB": scales, f"{name}_format": torch.tensor(0).byte()}


def fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize to E4M3 in blocks of 8 by 16; those at the ends may be short."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 8) * 8, -(-columns // 16) * 16)
    padded[:rows, :columns] = weight
    blocks = padded.unflatten(1, (-1, 16)).unflatten(0, (-1, 8))
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(padded.shape)
    return {name: codes[:rows, :columns], f"{name}_scale_inv": scales}


CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": False},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [8, 16], "activation_scheme": "dynamic"},
}  # fmt: skip

BASES: dict[str, tuple[str, Quantize]] = {
    "nf4": ("nf4", four_bit("nf4", nested=False)),
    "nf4, double": ("nf4", four_bit("nf4", nested=True)),
    "nf4, blocks of 128": ("nf4", four_bit("nf4", nested=False, blocksize=128)),
    "fp4, double": ("fp4", four_bit("fp4", nested=True)),
    "int8": ("int8", int8),
    "fp8": ("fp8", fp8),
}
"""Kinds of bases: the name of their config, and what quantizes a weight."""


def write_quantized(
    folder: Path, kind: str, extra: toys.Tensors | None = None, **config: Any
) -> Path:
    """Write the toy llama (with ``extra`` tensors) quantized, in two files with an index."""
    method, quantize = BASES[kind]
    weights = toys.llama_tensors() | dict(extra or {})
    plain = toys.write_base(folder.parent / f"{folder.name}-plain", weights)
    tensors: dict[str, torch.Tensor] = {}
    for name, array in load_file(plain / "model.safetensors").items():
        weight = torch.from_numpy(np.asarray(array, np.float32)).bfloat16()
        tensors |= quantize(name, weight) if is_linear(name) else {name: weight}
    folder.mkdir()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    weight_map = {}
    for number, half in enumerate(halves):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({k: v.contiguous() for k, v in half.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    write_json(folder / toys.INDEX, {"metadata": {}, "weight_map": weight_map})
    settings = toys.CONFIG | {"quantization_config": CONFIGS[method] | config}
    write_json(folder / "config.json", settings)
    return folder
