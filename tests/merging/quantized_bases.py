"""Quantized bases of a few kilobytes, as bitsandbytes stores them in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def grouped(weight: torch.Tensor, groups: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Return codes 0 to 15 (in, out), zeros and scales (groups, out), of inputs in groups."""
    turned, count = weight.float().T, int(groups.max()) + 1
    ends = [turned[groups == g].aminmax(dim=0) for g in range(count)]
    low, high = torch.stack([e.min for e in ends]), torch.stack([e.max for e in ends])
    scales = ((high.clamp(min=0) - low.clamp(max=0)) / 15).half()
    zeros = (-low.clamp(max=0) / scales).round().clamp(1, 15)
    codes = (turned / scales[groups] + zeros[groups]).round().clamp(0, 15)
    return codes.int().numpy(), zeros.int().numpy(), scales.numpy()


def words(codes: np.ndarray, order: Sequence[int] = range(8)) -> torch.Tensor:
    """Return 4-bit codes in words along the last dimension, nibble by nibble."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)[..., list(order)].astype(np.uint32)
    packed = (eights << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32)
    return torch.from_numpy(packed.view(np.int32).copy())


def gptq(*, ordered: bool) -> Quantize:
    """Return what quantizes to GPTQ's 4 bits (v2), with groups of 8 inputs in order or not."""

    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        count = weight.shape[1]
        groups = torch.arange(count) // 8
        if not ordered:
            groups = groups[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        codes, zeros, scales = grouped(weight, groups)
        module = name.removesuffix(".weight")
        return {
            f"{module}.qweight": words(codes.T).T, f"{module}.qzeros": words(zeros),
            f"{module}.scales": torch.from_numpy(scales), f"{module}.g_idx": groups.int(),
        }  # fmt: skip

    return quantize


def awq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize to AWQ with groups of 8 inputs."""
    codes, zeros, scales = grouped(weight, torch.arange(weight.shape[1]) // 8)
    module, order = name.removesuffix(".weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{module}.qweight": words(codes, order), f"{module}.qzeros": words(zeros, order),
        f"{module}.scales": torch.from_numpy(scales),
    }  # fmt: skip


def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize to compressed-tensors' packed 4 bits with groups of 8 inputs."""
    codes, zeros, scales = grouped(weight, torch.arange(weight.shape[1]) // 8)
    return {
        f"{name}_packed": words(codes.T.copy()), f"{name}_zero_point": words(zeros).T,
        f"{name}_scale": torch.from_numpy(scales.T.copy()).bfloat16(),
        f"{name}_shape": torch.tensor(weight.shape),
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": False},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq-4bit": {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True,
                  "checkpoint_format": "gptq_v2"},
    "awq-4bit": {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"},
    "pack-quantized-4bit": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group",
            "group_size": 8}}},
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [8, 16], "activation_scheme": "dynamic"},
}  # fmt: skip

BASES: dict[str, tuple[str, Quantize]] = {
    "nf4": ("nf4", four_bit("nf4", nested=False)),
    "nf4, double": ("nf4", four_bit("nf4", nested=True)),
    "nf4, blocks of 128": ("nf4", four_bit("nf4", nested=False, blocksize=128)),
    "fp4, double": ("fp4", four_bit("fp4", nested=True)),
    "int8": ("int8", int8),
    "fp8": ("fp8", fp8),
    "gptq": ("gptq-4bit", gptq(ordered=True)),
    "gptq, any order": ("gptq-4bit", gptq(ordered=False)),
    "awq": ("awq-4bit", awq),
    "compressed-tensors": ("pack-quantized-4bit", packed),
}
"""Kinds of bases: the name of their config, and what quantizes a weight."""


def write_quantized(
    folder: Path, kind: str, extra: toys.Tensors | None = None, **config: Any
) -> Path:
    """Write the toy llama (with ``extra`` tensors) quantized, in two files with an index.

    The plain one is beside it. What is the same as before is not made anew.
    """
    plain = folder.parent / f"{folder.name}-plain"
    arrays = ((name, array.tobytes()) for name, array in sorted((extra or {}).items()))
    key = (kind, *arrays, repr(sorted(config.items())))
    if key not in _MADE:
        _write_quantized(folder, plain, kind, extra, config)
        _MADE[key] = [{p.name: p.read_bytes() for p in each.iterdir()} for each in (folder, plain)]
        return folder
    for place, files in zip((folder, plain), _MADE[key], strict=True):
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place / name).write_bytes(content)
    return folder


_MADE: dict[tuple[Any, ...], list[dict[str, bytes]]] = {}


def _write_quantized(
    folder: Path, plain: Path, kind: str, extra: toys.Tensors | None, config: dict[str, Any]
) -> None:
    method, quantize = BASES[kind]
    weights = toys.llama_tensors() | dict(extra or {})
    toys.write_base(plain, weights)
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
