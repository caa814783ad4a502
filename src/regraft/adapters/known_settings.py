"""Which keys of ``adapter_config.json`` are known, and which unknown ones are switched on.

A key that is not known may change what the factors mean, as ``use_rslora`` and ``use_dora`` did
when they were new. Most such keys are only notes of a trainer, so they are named and not refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.formats.problems import quoted

_OF_PEFT = frozenset((
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "merge_weights", "modules_to_save", "monteclora_config", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "use_rslora", "velora_config", "enable_lora",
))  # fmt: skip
"""Every field that PEFT's ``LoraConfig`` has had, from 0.1 to 0.21."""

_OF_TRAINERS = frozenset((
    "lora_B_layout", "unsloth_fused_expert_lora",  # Unsloth: read in adapters.expert_layout
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",  # ms-swift: how it trained
    "library_name", "model_type", "name", "description", "license", "tags", "version", "created_at",
    "_name_or_path", "_commit_hash", "transformers_version", "trl_version", "unsloth_version",
))  # fmt: skip
"""Keys that other programs write, and that are read elsewhere or change nothing."""

_SHOWN = 20


def unknown_settings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a config that are switched on and that nobody here knows, sorted.

    Switched on is every value but null, false, zero, ``"none"`` and what is empty.
    """
    names = (name for name in config if name not in _OF_PEFT and name not in _OF_TRAINERS)
    return tuple(sorted(name for name in names if _is_on(config[name])))


def _is_on(value: object) -> bool:
    return bool(value) and not (isinstance(value, str) and value.lower() in ("none", "false"))


def unknown_note(label: str, names: tuple[str, ...]) -> list[str]:
    """Return the warning that names the unknown settings of an adapter, none where there are none.

    Args:
        label: how messages name the adapter.
        names: its unknown settings.
    """
    if not names:
        return []
    listed = ", ".join(map(quoted, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    note = (
        f"{label}: adapter_config.json has settings that regraft does not know: {listed}. They are "
        "not heeded; if one of them changes what the factors mean, the result is wrong. Look them "
        "up in the program that trained the adapter"
    )
    return [note]
