"""Dialects that have PEFT's files, and some modules of their own in them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.form import Moved, NewFile, PlainAdapter
from regraft.adapters.dialects.shared.once import by_own_name
from regraft.adapters.dialects.shared.peft_config import (
    alpha_of,
    config_of,
    travelling,
    with_config,
)
from regraft.adapters.dialects.shared.torch_files import read_tensors
from regraft.adapters.dialects.writing import json_file, safetensors_file
from regraft.adapters.wrappers import PREFIX, plain_key
from regraft.errors import AdapterError, InputError, UnsupportedError
from regraft.formats.checkpoint import CONFIG_BYTES
from regraft.formats.files.json_file import read_json_object
from regraft.formats.layout import ADAPTER_CONFIG, ADAPTER_SAFE, ADAPTER_TORCH
from regraft.formats.problems import quoted
from regraft.formats.safetensors import read_header
from regraft.tensors import TensorSpec

FACTOR = re.compile(r"(?P<module>.+)\.(?P<what>lora_[AB])(\.weight)?")
"""The name of a factor, without PEFT's prefix."""

_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class PeftFiles:
    """The files of such an adapter.

    Attributes:
        weights: the file with the tensors.
        tensors: by name, without PEFT's prefix.
        scale: alpha / r, or alpha / sqrt(r), of all modules.
        base: what it calls its base.
        metadata: strings that travel with the tensors.
    """

    weights: Path
    tensors: Mapping[str, TensorSpec]
    scale: float
    base: str | None
    metadata: Mapping[str, str]


def open_files(path: Path) -> PeftFiles:
    """Open such an adapter.

    Raises:
        AdapterError: the config lacks rank or alpha.
        UnsupportedError: it has what these dialects do not have.
        RegraftError: a file cannot be read.
    """
    root = path if path.is_dir() else path.parent
    weights = path
    if path.is_dir():
        weights = root / (ADAPTER_SAFE if (root / ADAPTER_SAFE).is_file() else ADAPTER_TORCH)
    if not (root / ADAPTER_CONFIG).is_file():
        raise InputError(f"{ADAPTER_CONFIG} is missing", where=str(root),
                         expected="rank and alpha in it")  # fmt: skip
    config = read_json_object(root / ADAPTER_CONFIG, max_bytes=CONFIG_BYTES)
    tensors = by_own_name(read_tensors(weights), plain_key, weights)
    named = config.get("base_model_name_or_path")
    scale = _scale(root / ADAPTER_CONFIG, config)
    metadata = travelling(read_header(weights).metadata) if _is_safe(weights) else {}
    said = named if isinstance(named, str) and named else None
    return PeftFiles(weights, tensors, scale, said, metadata)


def _is_safe(weights: Path) -> bool:
    return weights.suffix == ".safetensors"


def _scale(path: Path, config: Mapping[str, Any]) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError("the rank is missing", where=str(path), expected="r: a whole number",
                           found=quoted(rank))  # fmt: skip
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError("alpha is missing", where=str(path), expected="lora_alpha: a number",
                           found=quoted(alpha))  # fmt: skip
    odd = [key for key in _PATTERNS if config.get(key)]
    odd += [key for key in ("use_dora", "lora_bias") if config.get(key)]
    if odd:
        raise UnsupportedError(
            "the config has what adapters in this layout do not have", where=str(path),
            found=", ".join(odd), hint="Export it to PEFT's format with the program that wrote it",
        )  # fmt: skip
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def new_files(
    adapter: PlainAdapter, tensors: Mapping[str, Moved], targets: Sequence[str]
) -> tuple[NewFile, ...]:
    """Return the files of an adapter whose modules have one rank and scale.

    Args:
        adapter: the adapter.
        tensors: by name, without PEFT's prefix.
        targets: the names of adapted modules.
    """
    first = adapter.modules[0]
    config = config_of(replace(adapter, config={}, metadata={})) | {
        "r": first.rank, "lora_alpha": alpha_of(first.scale, first.rank), "rank_pattern": {},
        "alpha_pattern": {}, "target_modules": sorted({t.rpartition(".")[2] for t in targets}),
    }  # fmt: skip
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    weights = safetensors_file(ADAPTER_SAFE, named, {**with_config(adapter), "format": "pt"})
    return json_file(ADAPTER_CONFIG, config), weights
