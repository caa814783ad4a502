"""The table that ``scripts/names/generate.py`` writes, read when it is first needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, cast

Facts = Mapping[str, Any]


@cache
def load() -> Facts:
    """Return the whole table: ``transformers`` (a version), ``tasks``, ``auto``, and so on."""
    path = resources.files(__package__).joinpath("transformers.json")
    return cast(Facts, json.loads(path.read_bytes()))


def architecture(class_name: str) -> Facts | None:
    """Return the facts of a model class, None when the table does not have it."""
    return cast("Facts | None", _entry("architectures", class_name))


def mapping(key: str) -> list[Facts] | None:
    """Return the transforms that stand under a class name or model type, None without an entry."""
    return cast("list[Facts] | None", _entry("mappings", key))


def _entry(section: str, key: str) -> Any:
    """Return one entry; a string there names the entry that holds the same."""
    found = load()[section].get(key)
    return load()[section][found] if isinstance(found, str) else found


def auto_class(auto: str, model_type: str) -> str | None:
    """Return the class that ``auto``, such as ``AutoModel``, builds for a model type."""
    return cast("str | None", load()["auto"].get(auto, {}).get(model_type))


def class_for_task(task_type: str, model_type: str) -> str | None:
    """Return the class that PEFT's task type means for a model type, such as ``SEQ_CLS``.

    None when transformers has no such class, or the task type is not one that names a class.
    """
    for auto in load()["tasks"].get(task_type, ()):
        if found := auto_class(auto, model_type):
            return found
    return None


def classes_of(model_type: str) -> list[str]:
    """Return every class of a model type, in the order of their names."""
    types = ((name, architecture(name)) for name in sorted(load()["architectures"]))
    return [name for name, facts in types if facts and facts.get("type") == model_type]
