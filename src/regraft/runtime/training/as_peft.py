"""An adapter's tensors as the parameters of PEFT's model: their names there, and their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from regraft.adapters.wrappers import PREFIX
from regraft.runtime.model.matching import LiveAdapter

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""In the order in which a layer of PEFT's has them, after what the layer itself has."""

_LEAVES = ("weight", "bias")
_NAMED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|trainable_tokens_delta)(?=\.|$)")
_MAGNITUDE = ".lora_magnitude_vector"


def in_order_of_peft(keys: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Return an adapter's keys in the order of the parameters of PEFT's model.

    Args:
        keys: as in PEFT's file.
        modules: paths of the base's modules, in the order of its tree.
    """
    number = {path: at for at, path in enumerate(modules)}
    return sorted(keys, key=lambda key: _place(key.removeprefix(PREFIX), number))


def _place(name: str, number: dict[str, int]) -> tuple[int, int, int, int, str]:
    path, rest = name, list[str]()
    while path and path not in number:
        path, _, leaf = path.rpartition(".")
        rest.insert(0, leaf)
    inner = rest.count("base_layer")  # a wrapper's own layer comes before what it adds
    factor = next((at + 1 for at, each in enumerate(_FACTORS) if each in rest), 0)
    last = _LEAVES.index(rest[-1]) if rest and rest[-1] in _LEAVES else len(_LEAVES)
    return number.get(path, len(number)), -inner, factor, last, name


def names_in_peft(adapter: LiveAdapter, name: str = "default") -> dict[str, str]:
    """Return what PEFT's model calls an adapter's tensors, by their key in PEFT's file.

    Args:
        adapter: the adapter.
        name: as PEFT knows it.
    """
    copied = tuple(adapter.config.get("modules_to_save") or ())
    adapted = {key.partition(".lora_")[0] for key in adapter.tensors if ".lora_" in key}
    return {key: _name(key, name, copied, adapted) for key in adapter.tensors}


def _name(key: str, name: str, copied: Sequence[str], adapted: set[str]) -> str:
    if key.endswith(_MAGNITUDE):
        return f"{key}.{name}.weight"
    if _NAMED.search(key):
        return _NAMED.sub(rf".\1.{name}", key)
    for module in copied:
        before, found, leaf = key.rpartition(f".{module}.")
        if found:
            return f"{before}.{module}.modules_to_save.{name}.{leaf}"
    owner, _, leaf = key.rpartition(".")
    return f"{owner}.base_layer.{leaf}" if owner in adapted else key
