"""What a dialect has to know of the base: its type, its heads, its ties."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.errors import AdapterError, UsageError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.problems import quoted
from regraft.names import NameMap

_LANGUAGE = re.compile(
    r"(^|\.)(language_model|text_model)\.|^(model\.)?(lm_head|layers|embed_tokens)\b"
)
"""What the names of a language model's modules have in them, where the model has other parts."""


@dataclass(frozen=True)
class Heads:
    """How an attention's rows are divided.

    Attributes:
        query: heads of q.
        key: heads of k and v.
        size: rows of one head.
    """

    query: int
    key: int
    size: int


class BaseNeededError(UsageError):
    """An adapter cannot be read or written without its base, and there is none.

    Attributes:
        why: what the base would say, as the end of a sentence.
    """

    def __init__(self, why: str) -> None:
        """Say what the base would say."""
        super().__init__(f"the base is needed: {why}", where="base",
                         hint="Name the base, as a folder or a Hub id")  # fmt: skip
        self.why = why


def text_config(base: Checkpoint) -> Mapping[str, Any]:
    """Return the config of a base's language model."""
    config = base.config or {}
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def model_type(base: Checkpoint | None) -> str:
    """Return the ``model_type`` of a base's language model; ``""`` where it is not known."""
    found = text_config(base).get("model_type") if base is not None else None
    return found if isinstance(found, str) else ""


def has_parts(base: Checkpoint | None) -> bool:
    """Whether a model is known to have other parts beside its language model, as one that sees."""
    return base is not None and isinstance((base.config or {}).get("text_config"), Mapping)


def is_other_part(module: str, base: Checkpoint | None) -> bool:
    """Whether a module is no part of the language model of a base that has other parts."""
    return has_parts(base) and not _LANGUAGE.search(module)


def needed(base: Checkpoint | None, why: str) -> Checkpoint:
    """Return the base.

    Raises:
        BaseNeededError: there is none.
    """
    if base is None:
        raise BaseNeededError(why)
    return base


def heads_of(base: Checkpoint | None, why: str) -> Heads:
    """Return how the attention of a base is divided.

    Args:
        base: the base.
        why: what for, as the end of a sentence.

    Raises:
        BaseNeededError: there is no base.
        AdapterError: its config does not say.
    """
    config = text_config(needed(base, why))
    query = _count(config, "num_attention_heads")
    key = _count(config, "num_key_value_heads", query)
    size = _count(config, "head_dim", _count(config, "hidden_size") // query)
    return Heads(query, key, size)


def hidden_size(base: Checkpoint) -> int:
    """Return the width of a base.

    Raises:
        AdapterError: its config does not say.
    """
    return _count(text_config(base), "hidden_size")


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    found = config.get(key)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise AdapterError("the base's config lacks a number that is needed", where="config.json",
                           expected=f"{key}: a whole number", found=quoted(found))  # fmt: skip
    return found


def tied_sides(base: Checkpoint | None) -> tuple[str, str] | None:
    """Return the modules of input and output embedding where the base ties them; None else."""
    names = NameMap.for_config(base.config if base is not None else None)
    pairs = {
        k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in names.tied_now.items()
    }
    given = (names.output_embedding, names.input_embedding)
    for output, source in pairs.items():
        if names.output_embedding in (None, output):
            return source, output
        if source == given[0]:
            return output, source
    return None
