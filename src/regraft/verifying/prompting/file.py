"""A file of prompts: one a line as plain text, or JSON lines with prompts and chats."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import InputError, Problem
from regraft.formats.files.json_file import json_trouble, unique_object
from regraft.formats.files.reading import open_regular, read_at
from regraft.formats.problems import capped, quoted

MAX_BYTES = 64 * 2**20
"""The largest file accepted."""

_EXPECTED = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        line: the line of the file it stands in, from 1.
        text: the prompt; the last message of a chat.
        messages: the chat it is, for the model's chat template; empty for plain text.
    """

    line: int
    text: str
    messages: tuple[dict[str, str], ...] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file; blank lines are skipped.

    A file whose name ends in ``.jsonl`` holds an object per line, with either ``"prompt"`` or
    ``"messages"``; any other file is text, one prompt per line.

    Raises:
        InputError: there is no such file, a line cannot be read, or there is no prompt; names the
            lines.
        AccessError: the system refused to read it.
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            text = line.decode()
            if text.strip():
                prompts.append(_parsed(text, number, path))
        except (ValueError, RecursionError) as error:
            expected = _EXPECTED if path.suffix == ".jsonl" else "UTF-8 text"
            trouble = json_trouble(error)
            problems.append(Problem("is no prompt", f"{path}, line {number}", expected, trouble))
    if problems:
        raise InputError(capped(problems, path))
    if not prompts:
        raise InputError(
            "there is no prompt in it", where=str(path), expected="one prompt per line",
            found="nothing but blank lines" if path.stat().st_size else "an empty file",
        )  # fmt: skip
    return prompts


def _lines(path: Path) -> list[bytes]:
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_BYTES:
            raise InputError(
                "is too large for a file of prompts", where=str(path),
                expected=f"at most {MAX_BYTES} bytes", found=f"{size} bytes",
            )  # fmt: skip
        content = read_at(fd, path, 0, size)
    finally:
        os.close(fd)
    return content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")


def _parsed(text: str, number: int, path: Path) -> Prompt:
    if path.suffix != ".jsonl":
        return Prompt(number, text)
    value = json.loads(text, object_pairs_hook=unique_object)
    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError(quoted(text.strip()))
    if "prompt" in value:
        return Prompt(number, _text(value["prompt"], "prompt"))
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list, or an empty one")
    chat = tuple(map(_message, messages))
    return Prompt(number, chat[-1]["content"], chat)


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("a message is no object")
    return {key: _text(value.get(key), key) for key in ("role", "content")}


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} is no text, or an empty one")
    return value
