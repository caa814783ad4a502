"""An adapter written in PEFT's format: its config, and its tensors under PEFT's names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from regraft.adapters.dialects.form import LoraModule, Moved, NewFile, PlainAdapter
from regraft.adapters.dialects.shared.experts import single_experts
from regraft.adapters.dialects.writing import json_file, safetensors_file
from regraft.adapters.lora_config import PEFT_LAYOUT
from regraft.adapters.pattern_making import patterns
from regraft.adapters.wrappers import PREFIX
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.layout import ADAPTER_CONFIG, ADAPTER_SAFE

_FACTORS = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "convolution": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}


def write(adapter: PlainAdapter, base: Checkpoint | None = None) -> tuple[NewFile, ...]:
    """Return the files of an adapter in PEFT's format; the base matters to stacks of experts.

    Raises:
        UsageError: there are such stacks, and no base to say how they lie.
        UnsupportedError: the base has no names for its experts one by one.
    """
    adapter = single_experts(adapter, base)
    weights = safetensors_file(
        ADAPTER_SAFE, tensors_of(adapter), {**adapter.metadata, "format": "pt"}
    )
    return json_file(ADAPTER_CONFIG, config_of(adapter)), weights


def tensors_of(adapter: PlainAdapter) -> dict[str, Moved]:
    """Return the tensors of an adapter by the names that PEFT saves them under.

    Experts are modules of their own here (``experts.3.gate_proj``), which needs no agreement on how
    a stack lies.
    """
    found: dict[str, Moved] = {}
    for module in adapter.modules:
        found |= {PREFIX + name: tensor for name, tensor in _of_module(module)}
    found |= {PREFIX + name: tensor for name, tensor in adapter.whole.items()}
    for name, (_, rows) in adapter.token_rows.items():
        found[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = rows
    return found


def _of_module(module: LoraModule) -> Iterator[tuple[str, Moved]]:
    a, b = _FACTORS[module.kind]
    yield module.name + a, module.a
    yield module.name + b, module.b
    if module.bias is not None:
        yield f"{module.name}{b.removesuffix('.weight')}.bias", module.bias
    if module.magnitude is not None:
        yield f"{module.name}.lora_magnitude_vector", module.magnitude


def config_of(adapter: PlainAdapter) -> dict[str, Any]:
    """Return ``adapter_config.json``: every module has its rank, and the scale that it had."""
    ranks = {module.name: module.rank for module in adapter.modules}
    alphas = {module.name: alpha_of(module.scale, module.rank) for module in adapter.modules}
    r, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "base_model_name_or_path": adapter.base,
        "bias": "all" if any(name.endswith(".bias") for name in adapter.whole) else "none",
        **({"ensure_weight_tying": True} if adapter.ensure_weight_tying else {}),
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "alpha_pattern": patterns(alphas, alpha),
        "lora_bias": any(module.bias is not None for module in adapter.modules),
        "lora_dropout": 0.0,
        "modules_to_save": sorted(
            {name.rpartition(".")[0] for name in adapter.whole if name.endswith(".weight")}
        ) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_LAYOUT,
        "r": r,
        "rank_pattern": patterns(ranks, r),
        "target_modules": sorted(ranks),
        "task_type": adapter.task_type,
        "trainable_token_indices": {
            name: list(indices) for name, (indices, _) in adapter.token_rows.items()
        } or None,
        "use_dora": any(module.magnitude is not None for module in adapter.modules),
        "use_rslora": False,
    }  # fmt: skip


def _most_common(values: dict[str, Any]) -> Any:
    """Return the value that most names have; of several, the largest."""
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value), default=8)


def alpha_of(scale: float, rank: int) -> float:
    """Return the alpha for which alpha / rank is a scale, to the last bit where there is one.

    A product is rounded, and so is the quotient that PEFT takes of it: where that misses the scale,
    a neighbour may hit it.
    """
    value = scale * rank
    near = (value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf))
    value = next((each for each in near if each / rank == scale), value)
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value
