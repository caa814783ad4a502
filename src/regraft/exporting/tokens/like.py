"""The tokenizer of another GGUF file of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.errors import MismatchError, Problem
from regraft.exporting.tokens.form import Tokenizer
from regraft.formats.files.json_file import read_json_object
from regraft.formats.gguf import GgufArray, GgufFile, find_gguf, open_gguf
from regraft.formats.problems import capped, quoted

_PREFIX = "tokenizer."


def tokenizer_like(path: Path, folder: Path, rows: int) -> Tokenizer:
    """Return the tokenizer of a GGUF file, as it says it.

    Args:
        path: the file, or a folder that holds one.
        folder: the model's own folder, whose vocabulary is held against it where there is one.
        rows: of the model's embedding.

    Raises:
        MismatchError: it has no tokens, another number of them, or other ones than the folder.
        FormatError, InputError, AccessError: it cannot be read.
    """
    file = open_gguf(find_gguf(path))
    keys = {key: _plain(value) for key, value in file.metadata.items() if key.startswith(_PREFIX)}
    texts = keys.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or len(texts) != rows:
        raise MismatchError(
            "the GGUF file is of another model", where=str(file.paths[0]),
            expected=f"{rows} tokens, one for each row of the embedding",
            found=f"{len(texts)}" if isinstance(texts, list) else "none",
            hint="Give a GGUF file of the model that this one was trained from",
        )  # fmt: skip
    _check_vocabulary(file, texts, folder)
    kind, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    shown = f"{kind} ({pre})" if pre else str(kind)
    return Tokenizer(f"{shown}, of {file.paths[0].name}", keys)


def _plain(value: Any) -> Any:
    if isinstance(value, GgufArray):
        return value.values()
    return list(value) if isinstance(value, tuple) else value


def _check_vocabulary(file: GgufFile, texts: list[str], folder: Path) -> None:
    rules = folder / "tokenizer.json"
    if not rules.is_file():
        return
    content = read_json_object(rules)
    vocab = (content.get("model") or {}).get("vocab")
    own = dict(vocab) if isinstance(vocab, dict) else {}
    own |= {str(each.get("content")): each.get("id") for each in content.get("added_tokens") or ()}
    problems = [
        Problem("a token is another one", f"{file.paths[0]}, token {row}", quoted(text),
                quoted(texts[row]) if row < len(texts) else "none",
                "Give a GGUF file of the model that this one was trained from")
        for text, row in own.items()
        if not (isinstance(row, int) and row < len(texts) and _same(texts[row], text))
    ]  # fmt: skip
    if problems:
        raise MismatchError(capped(problems, folder))


def _same(one: str, other: str) -> bool:
    """Whether two tokens are one; llama.cpp's converter writes spaces in some."""
    return one == other or one.replace("\u2581", " ") == other.replace("\u2581", " ")
