"""One merge of bare matrices, without a model around them: what the arithmetic is tested on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import regraft
from merging import toys

Adapter = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]
"""An adapter's tensors by key, and the fields of its config."""


def merge(
    weights: Mapping[str, np.ndarray], *adapters: Adapter, **options: Any
) -> dict[str, np.ndarray]:
    """Merge adapters into a base that is nothing but tensors; return the tensors written.

    ``by`` is a factor on each adapter; the other options are those of ``regraft.merge``.
    """
    factors = options.pop("by", [1.0] * len(adapters))
    with TemporaryDirectory() as name:
        folder = Path(name)
        toys.write_base(folder / "base", weights, None)
        sources = []
        for number, (tensors, config) in enumerate(adapters):
            fields = {"target_modules": [n.removesuffix(".weight") for n in weights], **config}
            sources.append(toys.write_adapter(folder / f"adapter{number}", tensors, **fields))
        named = list(zip(sources, factors, strict=True))
        regraft.merge(folder / "base", named, folder / "out", **options)
        return toys.load(folder / "out")


def pair(module: str, left: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    """Return factors B (out, r) and A (r, in) by the keys of a linear layer."""
    key = f"{toys.PREFIX}{module}"
    return {f"{key}.lora_A.weight": right, f"{key}.lora_B.weight": left}


def add_one(weight: np.ndarray, delta: np.ndarray, dtype: str | None = None) -> np.ndarray:
    """Return a vector of weights with a float32 delta added to each, as a merge does it.

    The vector is a column and the delta is B, with A and the scale 1, so that it is added as it is.
    """
    factors = pair("m", delta.reshape(-1, 1), np.ones((1, 1), np.float32))
    config = {"r": 1, "lora_alpha": 1}
    return merge({"m.weight": weight.reshape(-1, 1)}, (factors, config), dtype=dtype)["m.weight"]
