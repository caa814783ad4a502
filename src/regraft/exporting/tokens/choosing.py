"""Which tokenizer a GGUF file gets: the folder's, where that is shown right, or another file's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.errors import FormatError
from regraft.exporting.tokens.bpe import byte_level_tokenizer, is_byte_level
from regraft.exporting.tokens.form import Tokenizer, refused
from regraft.exporting.tokens.like import tokenizer_like
from regraft.exporting.tokens.special import (
    added_ends,
    chat_templates,
    ends_metadata,
    special_metadata,
    special_tokens,
    template_metadata,
)
from regraft.exporting.tokens.spm import is_sentencepiece, spm_of_model, spm_of_rules
from regraft.formats.files.json_file import read_json_object
from regraft.formats.problems import DOWNLOAD_AGAIN, quoted


def tokenizer_of(
    folder: Path, config: Mapping[str, Any], rows: int, like: Path | None
) -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    Args:
        folder: the model's folder.
        config: the model's config.
        rows: of the embedding.
        like: a GGUF file of the same model, whose tokenizer is taken; None for the folder's own.

    Raises:
        UnsupportedError: the folder's cannot be shown right, or there is none.
        MismatchError: the other file's tokens are not the folder's.
        FormatError: files are malformed, or tokens do not fit the embedding.
    """
    if like is not None:
        return tokenizer_like(like, folder, rows)
    try:
        return _own(folder, config, rows)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(
            "the tokenizer's files do not describe a tokenizer", where=str(folder),
            expected="files as transformers saves them",
            found=f"{type(error).__name__}: {quoted(str(error))}", hint=DOWNLOAD_AGAIN,
        ) from None  # fmt: skip


def _own(folder: Path, config: Mapping[str, Any], rows: int) -> Tokenizer:
    """Return the folder's own tokenizer."""
    settings = _settings(folder)
    rules_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if rules_path.is_file():
        where, rules = str(rules_path), read_json_object(rules_path)
        found = _of_rules(rules, settings, rows, where)
        ids = _ids(rules)
        special = special_tokens(folder, config, settings, ids, rows)
        ends = added_ends(rules, special, where)
    elif model_path.is_file():
        added = _added(folder, settings)
        found = spm_of_model(model_path, rows, added)
        ids = {text: row for row, text in enumerate(found.metadata["tokenizer.ggml.tokens"])}
        special = special_tokens(folder, config, settings, ids, rows)
        ends = {name: bool(settings.get(f"add_{name}_token", name == "bos"))
                for name in ("bos", "eos")}  # fmt: skip
    else:
        raise refused("the folder has no tokenizer that is exported", str(folder),
                      "tokenizer.json or tokenizer.model", "none")  # fmt: skip
    more = (
        special_metadata(special) | ends_metadata(ends)
        | template_metadata(chat_templates(folder, settings))
    )  # fmt: skip
    return replace(found, metadata={**found.metadata, **more})


def _of_rules(
    rules: Mapping[str, Any], settings: Mapping[str, Any], rows: int, where: str
) -> Tokenizer:
    if is_sentencepiece(rules):
        return spm_of_rules(rules, rows, where)
    if is_byte_level(rules):
        cleans = settings.get("clean_up_tokenization_spaces") is True
        return byte_level_tokenizer(rules, rows, where, cleans=cleans)
    kind = (rules.get("model") or {}).get("type")
    raise refused("this kind of tokenizer is not exported", where,
                  "byte-level BPE, or SentencePiece's BPE", quoted(kind))  # fmt: skip


def _added(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens that were added to a ``tokenizer.model``."""
    path = folder / "added_tokens.json"
    plain = read_json_object(path) if path.is_file() else {}
    found = {row: {"id": row, "content": text} for text, row in plain.items()}
    for row, token in (settings.get("added_tokens_decoder") or {}).items():
        found[int(row)] = {**token, "id": int(row)}
    return list(found.values())


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def _ids(rules: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each token by its text; added ones come first."""
    vocab = (rules.get("model") or {}).get("vocab") or {}
    added = {str(each.get("content")): each.get("id") for each in rules.get("added_tokens") or ()}
    return {**vocab, **added}
