"""What a model's card says of licence and language: YAML of a stranger's, read within limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.formats.files.inside import head_of, why_not
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.files.text import plain_text
from regraft.formats.files.yaml_file import LimitedLoader
from regraft.formats.problems import quoted
from regraft.merging.files.side_files import CARD

_HEAD = 2**16
"""Bytes of a card in which its metadata has to end."""

_MOST_LETTERS, _MOST_ITEMS = 10_000, 1_000
_KEPT = (
    "license",
    "license_name",
    "license_link",
    "language",
    "pipeline_tag",
    "extra_gated_prompt",
)
_BLOCK = re.compile(r"---\r?\n(.*?)\n---", re.DOTALL)


@dataclass(frozen=True)
class Metadata:
    """What a card says.

    Attributes:
        fields: of licence and language.
        trouble: why it says less than it holds, in a sentence; "" if it does not.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    trouble: str = ""


def read_metadata(folder: Path) -> Metadata:
    """Return what a folder's card says of licence and language.

    A card that cannot be read says nothing, and that is told.

    Raises:
        AccessError: the system refused to read it.
    """
    path = folder / CARD
    with typed_os_errors(path):
        if not path.exists():
            return Metadata()
        why = why_not(path, folder)
        if why and "larger" not in why:
            return Metadata({}, _told(path, why))
    text = head_of(path, _HEAD).decode("utf-8", "replace")
    match = _BLOCK.match(text)
    if match is None:
        endless = text.startswith("---") and len(text) > _HEAD // 4
        return Metadata({}, _told(path, "without an end in its first 64 KiB") if endless else "")
    try:
        found = _Loader(match[1]).get_single_data()
        return _kept(path, found if isinstance(found, dict) else {})
    except Exception as error:  # PyYAML raises what its parts do: ValueError, KeyError, ...
        said = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
        return Metadata({}, _told(path, f"no YAML that can be read ({said})"))


def _told(path: Path, why: str) -> str:
    place = plain_text(str(path))
    return f"The metadata of {place} is {why}: licence and language are not handed on"


def _kept(path: Path, found: Mapping[Any, Any]) -> Metadata:
    fields = {key: found[key] for key in _KEPT if key in found}
    odd = [key for key, value in fields.items() if value is not None and not _is_plain(value)]
    good = {key: value for key, value in fields.items() if key not in odd and value is not None}
    listed = ", ".join(map(quoted, odd))
    said = f"In {plain_text(str(path))}, {listed} is neither text nor a list of it"
    return Metadata(good, f"{said}, and is not handed on" if odd else "")


def _is_plain(value: object) -> bool:
    """Whether a value is one that these fields have: text, or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= _MOST_ITEMS and all(
        isinstance(text, str) and len(text) <= _MOST_LETTERS for text in texts
    )


class _Loader(LimitedLoader):
    """Reads YAML in which ``no`` is a language, and no truth value."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own way)
        first: [(tag, regex) for tag, regex in resolvers if not tag.endswith(":bool")]
        for first, resolvers in LimitedLoader.yaml_implicit_resolvers.items()
    }
