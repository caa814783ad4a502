"""Side files that other libraries read whole, looked at before these get them.

Python's JSON takes many times a file's size, and whatever depth and time a file asks for.
"""

from __future__ import annotations

from pathlib import Path

from regraft.errors import FormatError, Problem
from regraft.formats.files.inside import LARGEST
from regraft.formats.files.json_file import read_json
from regraft.formats.files.reading import typed_os_errors

_SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_TABLES = ("*.model", "*.tiktoken", "tokenizer.json", "vocab.*", "merges.txt")
_TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
_LIMITS = dict.fromkeys(_TABLES, LARGEST) | dict.fromkeys(_TEMPLATES, 4 * 2**20)
"""The most bytes, by the pattern of a file's name."""


def check_parsed(folder: Path) -> None:
    """Refuse a model's folder whose side files are too large, too deep, or no JSON.

    Raises:
        FormatError: there are such; lists them.
        AccessError: the system refused to read one.
    """
    problems: list[Problem] = []
    with typed_os_errors(folder):
        for name in _SETTINGS:
            if (folder / name).is_file():
                problems += _trouble(folder / name)
        for pattern, limit in _LIMITS.items():
            problems += [
                Problem("is too large", str(path), f"at most {limit} bytes", f"{size} bytes")
                for path in folder.glob(pattern)
                if path.is_file() and (size := path.stat().st_size) > limit
            ]
    if problems:
        raise FormatError(problems)


def _trouble(path: Path) -> tuple[Problem, ...]:
    try:
        read_json(path, unique=False)
    except FormatError as error:
        return error.problems
    return ()
