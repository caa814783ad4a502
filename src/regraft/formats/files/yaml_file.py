"""YAML files a stranger made: limits on size and depth, no aliases, no key twice, typed errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from regraft.errors import FormatError
from regraft.formats.files.reading import open_regular, read_at
from regraft.formats.problems import DOWNLOAD_AGAIN, quoted

MAX_BYTES = 2**20
_MOST_LEVELS = 32


class LimitedLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML without aliases, which can stand for a million times their size.

    Of two equal keys neither is believed.
    """

    _levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node, unless it is an alias or too deep."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        self._levels += 1
        if self._levels > _MOST_LEVELS:
            raise yaml.YAMLError(f"more than {_MOST_LEVELS} levels")
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Return a mapping, unless a key occurs twice in it."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError("a key occurs twice")
        return super().construct_mapping(node, deep=deep)


def read_yaml_object(path: Path) -> dict[str, Any]:
    """Return the object in a UTF-8 YAML file of at most 1 MiB.

    Raises:
        FormatError: it holds anything else, or is malformed.
        InputError: there is no such file.
        AccessError: the system refused to read it.
    """
    fd = open_regular(path)
    try:
        content = read_at(fd, path, 0, MAX_BYTES + 1)
    finally:
        os.close(fd)
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        found = LimitedLoader(content.decode("utf-8-sig")).get_single_data()
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ValueError(f"a {type(found).__name__}")
    except Exception as error:  # PyYAML raises what its parts do: ValueError, KeyError, ...
        said = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
        raise FormatError(
            "cannot be read as YAML", where=str(path),
            expected=f"an object in UTF-8, no key twice, at most {_MOST_LEVELS} levels deep",
            found=quoted(said), hint=DOWNLOAD_AGAIN,
        ) from None  # fmt: skip
    return found
