"""Models and adapters for measuring live models: random weights, and PEFT's own files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.shared.synthetic import FACTOR_STD, LLAMA_1B, TINY, ModelShape, write_model

SMALL = ModelShape("llama", 256, 512, 4, 4, 2, 512, tied=False)
"""For a thousand adapters, and for thousands of calls."""

ALPHA = 4
"""With the factors of ``synthetic`` and rank 16 this makes |delta|/|W| 0.5%."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        shape: the model.
        rank: of its adapters.
        rounds: how often each thing is timed.
        slow_rounds: the same for merges and for loading whole models.
        prompts: batches and tokens of the forward passes over prompts.
        cached: tokens in the cache of the forward passes over one token.
        small: the model for the cache and the threads.
        cached_adapters: how many adapters the cache has to do with.
        requests: how often one of them is asked for.
        threads: threads, each with an adapter of its own.
        calls: forward passes of all threads together.
    """

    shape: ModelShape = LLAMA_1B
    rank: int = 16
    rounds: int = 7
    slow_rounds: int = 3
    prompts: tuple[tuple[int, int], ...] = ((1, 128), (4, 64))
    cached: int = 64
    small: ModelShape = SMALL
    cached_adapters: int = 1000
    requests: int = 5000
    threads: int = 16
    calls: int = 10_000


QUICK = Sizes(
    shape=TINY, rank=4, rounds=2, slow_rounds=2, prompts=((1, 8), (2, 4)), cached=4, small=TINY,
    cached_adapters=12, requests=40, threads=4, calls=40,
)  # fmt: skip


def base_folder(folder: Path, shape: ModelShape) -> Path:
    """Write a base of random bfloat16 weights."""
    write_model(folder, shape)
    return folder


def load_base(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """Return a base as transformers loads it, ready to answer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def sharing(model: Any) -> Any:
    """Return a second module tree over the very parameters of a model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def make_adapters(model: Any, folder: Path, names: Sequence[str], rank: int) -> dict[str, Path]:
    """Let PEFT make and save adapters of random factors on all linear layers of the blocks.

    Args:
        model: the base; PEFT gets a second module tree of it.
        folder: where each gets a folder of its name.
        names: what they are called; not ``"default"``, which PEFT saves elsewhere.
        rank: of every layer.
    """
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear",
                        task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    adapted: Any = get_peft_model(sharing(model), config, names[0])
    randomize(adapted, 0)
    adapted.save_pretrained(folder, selected_adapters=[names[0]])
    first = folder / names[0]
    for number, name in enumerate(names[1:], 1):
        another(first, folder / name, number)
    return {name: folder / name for name in names}


def randomize(adapted: Any, seed: int) -> None:
    """Give the factors of a PEFT model random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, FACTOR_STD, generator=generator)


def another(source: Path, folder: Path, seed: int) -> None:
    """Write an adapter like one that PEFT saved, with other values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "adapter_model.safetensors")
    for tensor in tensors.values():
        tensor.normal_(0.0, FACTOR_STD, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(source / "adapter_config.json", folder)


def peft_model(model: Any, adapters: dict[str, Path]) -> Any:
    """Return PEFT's model with adapters, on a second module tree of the base."""
    names = list(adapters)
    adapted = PeftModel.from_pretrained(sharing(model), adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(adapters[name], adapter_name=name)
    return adapted.eval()


def targets(adapter: Path) -> int:
    """Return how many modules an adapter is on."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    return sum(name.endswith("lora_A.weight") for name in header)


def prompt(shape: ModelShape, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids of shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, shape.vocab, (batch, length), generator=generator)
