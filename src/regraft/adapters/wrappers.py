"""Names without what training puts around a model and its modules.

torch.compile, FSDP, activation checkpointing and DataParallel wrap modules in others, whose
attributes become segments of every name below. The model that an adapter is used on has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PREFIX = "base_model.model."
"""Where PEFT keeps the model inside its own."""

WRAPPERS = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # torch's FullyShardedDataParallel
    "_checkpoint_wrapped_module",  # torch's and FairScale's activation checkpointing
    "_fpw_module",  # FairScale's FSDP
    "_forward_module",  # Lightning Fabric
)
"""Segments that no module of a model is called."""

PARALLEL = "module."
"""What DataParallel and DeepSpeed put before a name. A model can have a module of that name."""

_SEGMENT = rf"(?:{'|'.join(WRAPPERS)})"
_IN_TEXT = re.compile(rf"(?<![A-Za-z0-9_]){_SEGMENT}\\?\.|\\?\.{_SEGMENT}$")
_ABOVE = re.compile(rf"^(?:module\.)+(?={re.escape(PREFIX)})")
_LISTS = (
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_pattern",
)  # fmt: skip
_MAPPINGS = ("rank_pattern", "alpha_pattern", "trainable_token_indices")


def without_wrappers(text: str) -> str:
    """Return a name, or a regular expression for names, without the segments of wrappers.

    One that is nothing else stays as it is.
    """
    return _IN_TEXT.sub("", text) or text


def peft_key(key: str) -> str:
    """Return the key that PEFT gives a tensor on a model without wrappers."""
    return _ABOVE.sub("", without_wrappers(key))


def plain_key(key: str) -> str:
    """Return the same without PEFT's own prefix."""
    return peft_key(key).removeprefix(PREFIX)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose names of modules have no wrappers; values of odd kinds stay."""
    plain = dict(config)
    plain |= {name: _plain_names(config[name]) for name in _LISTS if config.get(name)}
    plain |= {
        name: {without_wrappers(key): value for key, value in config[name].items()}
        for name in _MAPPINGS
        if isinstance(config.get(name), dict)
    }
    return plain


def _plain_names(value: Any) -> Any:
    if isinstance(value, str):
        return without_wrappers(value)
    if isinstance(value, list):
        return [without_wrappers(item) if isinstance(item, str) else item for item in value]
    return value
