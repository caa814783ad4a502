"""``adapter_config.json`` of an adapter that is written in PEFT's format.

Every module gets its rank and its scale. What PEFT's own config of the adapter says is kept where
it is known and still right, so that nothing changes that did not have to.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from regraft.adapters.dialects.form import PlainAdapter, origin_of
from regraft.adapters.pattern_making import patterns
from regraft.adapters.patterns import suffixes_of
from regraft.adapters.settings import LoraSettings, read_settings
from regraft.errors import RegraftError
from regraft.formats.checkpoint import CONFIG_BYTES, Checkpoint
from regraft.formats.files.json_file import json_object_in

KEPT = "regraft_peft_config"
"""The key under which PEFT's config travels in the header of a file in another dialect."""

_OF_STACKS = ("lora_B_layout", "unsloth_fused_expert_lora", "target_parameters")
"""Keys on how stacks of experts lie, which are written as single layers."""

_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def config_of(adapter: PlainAdapter, base: Checkpoint | None = None) -> dict[str, Any]:
    """Return ``adapter_config.json`` of an adapter.

    Args:
        adapter: the adapter.
        base: its model, where it is known: it says which short names select the same modules.
    """
    new = {**_scales(adapter), **_rest(adapter)}
    said = _said(adapter)
    settings = None if said is None else _settings(said)
    if said is None or settings is None:
        return new | {"target_modules": _targets(adapter, base)}
    kept = {key: value for key, value in said.items() if key not in _OF_STACKS}
    fresh = {key: new.get(key, False) for key in _not_right(adapter, said, settings)}
    found = new | kept | fresh
    if _selects(adapter, said, settings):
        return found
    for key in ("layers_to_transform", "layers_pattern"):
        found.pop(key, None)
    return found | {"target_modules": _targets(adapter, base), "exclude_modules": None}


def with_config(adapter: PlainAdapter) -> dict[str, str]:
    """Return an adapter's metadata with its config in PEFT's words, for a file without one."""
    if not adapter.config:
        return dict(adapter.metadata)
    return {**adapter.metadata, KEPT: json.dumps(adapter.config, sort_keys=True)}


def travelling(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the strings of a header that travel with an adapter into another dialect."""
    return {key: value for key, value in metadata.items() if key != "format"}


def _scales(adapter: PlainAdapter) -> dict[str, Any]:
    ranks = {module.name: module.rank for module in adapter.modules}
    alphas = {module.name: alpha_of(module.scale, module.rank) for module in adapter.modules}
    r, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "lora_alpha": alpha,
        "alpha_pattern": patterns(alphas, alpha),
        "r": r,
        "rank_pattern": patterns(ranks, r),
        "use_rslora": False,
    }


def _rest(adapter: PlainAdapter) -> dict[str, Any]:
    origins = {name: origin_of(name, tensor) for name, tensor in adapter.whole.items()}
    beside = {module.name for module in adapter.modules} | set(adapter.token_rows)
    owners = {name.rpartition(".")[0] for name, origin in origins.items() if origin == "saved"}
    return {
        "base_model_name_or_path": adapter.base,
        "bias": "all" if "bias" in origins.values() else "none",
        **({"ensure_weight_tying": True} if adapter.ensure_weight_tying else {}),
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": any(module.bias is not None for module in adapter.modules),
        "lora_dropout": 0.0,
        "modules_to_save": sorted(owners - beside) or None,
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "trainable_token_indices": {
            name: list(indices) for name, (indices, _) in adapter.token_rows.items()
        } or None,
        "use_dora": any(module.magnitude is not None for module in adapter.modules),
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


# -- what was said before --------------------------------------------------------------------------


def _said(adapter: PlainAdapter) -> Mapping[str, Any] | None:
    """Return PEFT's config of an adapter, as far as it, or the header of its file, has one."""
    if adapter.config or KEPT not in adapter.metadata:
        return adapter.config or None
    try:
        return json_object_in(adapter.metadata[KEPT], KEPT, max_bytes=CONFIG_BYTES)
    except RegraftError:
        return None  # a stranger's, and nothing depends on it


def _settings(said: Mapping[str, Any]) -> LoraSettings | None:
    try:
        return read_settings({"peft_type": "LORA", **said}, KEPT)
    except RegraftError:
        return None


def _not_right(
    adapter: PlainAdapter, said: Mapping[str, Any], settings: LoraSettings
) -> Iterable[str]:
    """Yield the keys of an earlier config that do not say what the adapter is."""
    yield "peft_type"
    if adapter.base is not None:
        yield "base_model_name_or_path"
    if any(
        (settings.rank_of(m.name), settings.scale_of(m.name)) != (m.rank, m.scale)
        for m in adapter.modules
    ):
        yield from _SCALES
    by_key = {"use_dora": settings.use_dora, "lora_bias": settings.lora_bias}
    new = _rest(adapter)
    yield from (key for key, value in by_key.items() if value != new[key])
    if settings.ensure_weight_tying != adapter.ensure_weight_tying:
        yield "ensure_weight_tying"
    if new["bias"] == "all" and settings.bias == "none":
        yield "bias"
    if new["modules_to_save"] and not all(
        settings.saves(name)
        for name, tensor in adapter.whole.items()
        if origin_of(name, tensor) == "saved"
    ):
        yield "modules_to_save"
    if any(_rows_said(name, said) != list(rows) for name, (rows, _) in adapter.token_rows.items()):
        yield "trainable_token_indices"


def _rows_said(module: str, said: Mapping[str, Any]) -> Any:
    """Return the rows of an embedding that a config names; a list is of the input's embedding."""
    listed = said.get("trainable_token_indices")
    if not isinstance(listed, Mapping):
        return listed
    return next((listed[name] for name in suffixes_of(module) if name in listed), None)


def _selects(adapter: PlainAdapter, said: Mapping[str, Any], settings: LoraSettings) -> bool:
    """Whether an earlier config selects the modules, one by one and not as parts of a stack."""
    if said.get("target_parameters") or not adapter.modules:
        return False
    return all(settings.targets(module.name) for module in adapter.modules)


# -- which modules are meant -----------------------------------------------------------------------


def _targets(adapter: PlainAdapter, base: Checkpoint | None) -> list[str]:
    """Return the modules of an adapter, by the ends of their names where the base is known."""
    names = {module.name for module in adapter.modules}
    if base is None:
        return sorted(names)
    known = {name.rpartition(".")[0] for name in base.tensors}
    return short_names(names, known) if names <= known else sorted(names)


def short_names(names: Collection[str], known: Iterable[str]) -> list[str]:
    """Return the shortest ends of names that no other module's name ends with.

    Args:
        names: of the modules that are meant.
        known: of all modules.
    """
    meant = set(names)
    others = {end for name in known if name not in meant for end in suffixes_of(name)}
    found = set()
    for name in meant:
        ends = sorted(suffixes_of(name), key=len)
        found.add(next((end for end in ends if end not in others), name))
    return sorted(found)


def place_of(parameter: str, adapter: PlainAdapter, adapted: Collection[str]) -> str:
    """Return PEFT's name of a tensor that takes the place of a parameter.

    PEFT puts its layers around an adapted module, whose own parameters are below ``base_layer``
    then: under their plain names it would not find them.

    Args:
        parameter: the parameter.
        adapter: the adapter.
        adapted: the names of its modules with factors.
    """
    module, _, leaf = parameter.rpartition(".")
    if module in adapter.token_rows:
        return f"{module}.token_adapter.base_layer.{leaf}"
    return f"{module}.base_layer.{leaf}" if module in adapted else parameter
