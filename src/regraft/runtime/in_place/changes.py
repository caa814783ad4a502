"""Entries of a model's own tables that a merge replaces, and puts back."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

ABSENT: Any = object()
"""Stands for no entry."""


class Change:
    """An entry of a table (parameters or modules of a module, attributes of an object) replaced.

    Setting entries in the tables themselves keeps their order, and calls nothing of the model.
    """

    def __init__(self, table: MutableMapping[str, Any], key: str, new: Any) -> None:
        self._table, self._key, self._new = table, key, new
        self._old = table.get(key, ABSENT)

    def apply(self) -> None:
        """Put the new entry in."""
        self._put(self._new)

    def revert(self) -> None:
        """Put the old one back."""
        self._put(self._old)

    def _put(self, value: Any) -> None:
        if value is not ABSENT:
            self._table[self._key] = value
        else:
            with suppress(KeyError):
                del self._table[self._key]


def untied(model: nn.Module) -> list[Change]:
    """Return what says in a model's config that its embeddings are not tied."""
    config = getattr(model, "config", None)
    parts = [config, getattr(config, "text_config", None)]
    return [Change(vars(p), "tie_word_embeddings", False) for p in parts if hasattr(p, "__dict__")]


def dequantized(model: nn.Module) -> list[Change]:
    """Return what makes transformers take a model for a plain one."""
    gone = {"hf_quantizer": ABSENT, "quantization_method": ABSENT, "is_quantized": False}
    gone |= {"is_loaded_in_4bit": False, "is_loaded_in_8bit": False}
    changes = [Change(vars(model), k, v) for k, v in gone.items() if k in vars(model)]
    config = getattr(model, "config", None)
    if "quantization_config" in getattr(config, "__dict__", {}):
        changes.append(Change(vars(config), "quantization_config", ABSENT))
    conversions = vars(model).get("_weight_conversions")
    if conversions is not None:  # done backwards when the model is saved
        kept = [c for c in conversions if not _is_of_quantizer(c)]
        changes.append(Change(vars(model), "_weight_conversions", kept))
    return changes


def _is_of_quantizer(conversion: Any) -> bool:
    """Whether transformers' conversion of weights on loading is one of bitsandbytes."""
    operations = getattr(conversion, "operations", None) or ()
    return any(type(op).__module__.endswith(".bitsandbytes") for op in operations)


def plain_linear(layer: nn.Module, weight: nn.Parameter) -> nn.Linear:
    """Return a plain layer in the place of a quantized one: its bias, its hooks, another weight."""
    rows, columns = weight.shape
    with_bias = getattr(layer, "bias", None) is not None
    linear = nn.Linear(columns, rows, bias=with_bias, device="meta")
    linear._parameters["weight"] = weight
    if with_bias:
        linear._parameters["bias"] = layer._parameters["bias"]
    for name, table in vars(layer).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            vars(linear)[name] = table  # shared, so that whoever holds a hook can remove it
    linear.train(layer.training)
    return linear


def apply_all(changes: Sequence[Change]) -> None:
    """Put all new entries in."""
    for change in changes:
        change.apply()


def revert_all(changes: Sequence[Change]) -> None:
    """Put all old entries back, the last one first."""
    for change in reversed(changes):
        change.revert()
