"""The small inputs that commands are run on while something happens to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import regraft

PREFIX = "base_model.model."


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value))


def write_base(folder: Path, weights: dict[str, np.ndarray], shards: int) -> None:
    """Write a base in several files, with a tokenizer."""
    folder.mkdir(parents=True)
    names, weight_map = list(weights), dict[str, str]()
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: weights[name] for name in names[number::shards]}
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {"model_type": "llama", "dtype": "bfloat16"})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1})


def write_adapter(folder: Path, weights: dict[str, np.ndarray], saved: str | None, seed: int,
                  rank: int = 4) -> None:  # fmt: skip
    """Write LoRA for all but every fifth of a base's tensors, and one tensor as a whole."""
    draw = np.random.default_rng(seed)
    factors, modules = {}, []
    for number, (name, weight) in enumerate(weights.items()):
        if number % 5 == 4 or name == saved:
            continue
        modules.append(name.removesuffix(".weight"))
        for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
            value = draw.normal(size=shape).astype(np.float32) / 8
            factors[f"{PREFIX}{modules[-1]}.lora_{side}.weight"] = value
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    if saved is not None:
        factors[PREFIX + saved] = draw.normal(size=weights[saved].shape).astype(np.float32)
        config["modules_to_save"] = [saved.removesuffix(".weight")]
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config)


def small_weights() -> dict[str, np.ndarray]:
    """Return a few tensors, some in bfloat16 and some in float32, of odd sizes."""
    draw = np.random.default_rng(7)
    kinds = [ml_dtypes.bfloat16, np.float32]
    shapes = [(37, 53), (64, 64), (9, 700), (128, 33), (50, 31), (3, 4096), (45, 60), (80, 24)]
    return {
        f"layers.{number}.weight": draw.normal(size=shape).astype(kinds[number % 3 == 2])
        for number, shape in enumerate(shapes)
    }


def write_small_inputs(folder: Path) -> None:
    """Write a base, two adapters, a merged model and an older one."""
    weights = small_weights()
    write_base(folder / "base", weights, 3)
    write_adapter(folder / "adapter", weights, "layers.6.weight", 1)
    write_adapter(folder / "other", weights, "layers.1.weight", 2)
    write_adapter(folder / "lora", weights, None, 3)
    regraft.merge(folder / "base", folder / "adapter", folder / "merged")
    regraft.merge(folder / "base", folder / "other", folder / "old", undo=False)
    (folder / "old" / "notes.txt").write_text("of the old one")
    regraft.quantize(folder / "base", folder / "nf4", "nf4", double_quant=True)
    shutil.rmtree(folder / "nf4" / "regraft")
    regraft.merge(folder / "nf4", folder / "lora", folder / "kept", quantize="keep")
