"""Live models and adapters out of folders, and their bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import regraft
from faithful.harness import Case, Workshop
from regraft.runtime.in_place.merge import Merged, Weighted, exchange, prepared_merge
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter, adapter_of
from regraft.testing import zoo

Bits = dict[str, np.ndarray]
"""The bytes of each parameter, both sides of a tie, by name."""


def load(folder: Path, **settings: Any) -> Any:
    """Return the model in a folder as it is stored, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    settings = {"dtype": getattr(torch, config.get("dtype") or config["torch_dtype"])} | settings
    return zoo.model_class(folder).from_pretrained(folder, **settings).eval()


def live(folder: Path, name: str = "adapter") -> LiveAdapter:
    """Return the adapter in a folder, in memory."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return LiveAdapter(name, config, adapter_of(name, config, tensors), tensors)


def adapters_of(
    folders: Sequence[Path], weights: Sequence[float] | None = None
) -> list[tuple[LiveAdapter, float]]:
    """Return adapters out of folders with their weights."""
    lives = [live(folder, f"adapter{n}") for n, folder in enumerate(folders)]
    return list(zip(lives, weights or [1.0] * len(lives), strict=True))


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor's bytes."""
    plain = tensor.detach().as_subclass(torch.Tensor).contiguous()
    return plain.reshape(-1).view(torch.uint8).cpu().numpy().copy()


def bits(model: nn.Module) -> Bits:
    """Return the bytes of all parameters."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: bytes_of(parameter) for name, parameter in named}


def state_bits(model: nn.Module) -> Bits:
    """Return the bytes of all that a model saves."""
    return {name: bytes_of(tensor) for name, tensor in model.state_dict().items()}


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Fail unless the bytes are the same, name by name."""
    assert set(found) == set(expected)
    assert [n for n in expected if not np.array_equal(found[n], expected[n])] == []


def merged_files(case: Case, workshop: Workshop) -> Any:
    """Return the model that merging files gives, loaded."""
    base = workshop.base(case.architecture, case.dtype, case.sharded)
    folders = workshop.adapters(case)
    out = workshop.fresh("merged")
    pairs = list(zip(folders, case.weights or [1.0] * len(folders), strict=True))
    regraft.merge(base, pairs, out, undo=False)
    return load(out)


def identities(model: nn.Module) -> dict[str, int]:
    """Return which object each parameter is."""
    return {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}


def live_base(case: Case, workshop: Workshop) -> tuple[Any, LiveBase]:
    """Return the case's base as a live model."""
    model = load(workshop.base(case.architecture, case.dtype, case.sharded))
    return model, LiveBase(model)


def merge(base: LiveBase, adapters: Weighted, *, undo: bool = True, **choices: Any) -> Merged:
    """Merge adapters into a live model, and keep the way back or not."""
    merged = prepared_merge(base, adapters, **choices)
    try:
        merged.carry_out()
    except BaseException:
        if merged.is_merged:  # interrupted as it was done; nobody will have it
            merged.unmerge()
        raise
    if not undo:
        merged.forget()
    return merged


def swap(merged: Merged, adapters: Weighted) -> Merged:
    """Take what is merged out of a model, and merge other adapters the same way."""
    other = Merged(merged.base, adapters, merged.choices)
    exchange(merged, other)
    return other
