"""SentencePiece's BPE as llama.cpp's ``llama`` tokenizer, of either file that has it.

Both files have two neighbours joined at a time. A ``tokenizer.json`` takes the pair that is first
in its list of merges, a ``tokenizer.model`` the pair whose joined piece has the highest score. They
do the same where the list has every pair that makes up a piece, piece by piece, in the order of
scores. That is checked, so scores can be told from the merges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.exporting.tokens.form import (
    Tokenizer,
    TokenType,
    Vocabulary,
    put_added,
    refused,
)
from regraft.exporting.tokens.sentencepiece_file import BPE, read_sentencepiece
from regraft.formats.problems import quoted

SPACE = "\u2581"
"""What stands for a space in pieces."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = 256
_REPLACE = ("Replace", {"String": " "}, SPACE)
_PREPEND = ("Prepend", SPACE)

_EARLIER = (
    "the tokenizer puts no space before a text that begins with one; llama.cpp does, as "
    "SentencePiece itself"
)
_FIRST = (
    "the tokenizer puts a space before the first text only; llama.cpp does so after each special "
    "token"
)


def is_sentencepiece(rules: Mapping[str, Any]) -> bool:
    """Return whether a ``tokenizer.json`` is BPE that falls back to bytes."""
    model = rules.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and bool(
        model.get("byte_fallback")
    )  # fmt: skip


def spm_of_rules(rules: Mapping[str, Any], rows: int, where: str) -> Tokenizer:
    """Return what GGUF says of a ``tokenizer.json``, without its special tokens.

    Args:
        rules: the content of the file.
        rows: of the embedding.
        where: the file, for messages.

    Raises:
        UnsupportedError: llama.cpp would make other tokens.
        FormatError: its tokens do not fit the embedding.
    """
    prefix, notes = _prefix(rules, where)
    model, added = rules["model"], rules.get("added_tokens") or ()
    own = {str(token.get("content")) for token in added}
    scores = _scores(model, own, where)
    vocabulary = Vocabulary.unused(rows)
    for text, row in model["vocab"].items():
        kind = _type(text, model.get("unk_token"))
        vocabulary.put(row, text, kind, scores.get(text, -1e6), where)
    notes += put_added(vocabulary, added, where)
    for row in {
        token.get("id") for token in added if token.get("content") == model.get("unk_token")
    }:
        vocabulary.types[row] = int(TokenType.UNKNOWN)
    return _tokenizer(vocabulary, prefix, notes, where)


def spm_of_model(path: Path, rows: int, added: Sequence[Mapping[str, Any]]) -> Tokenizer:
    """Return what GGUF says of a ``tokenizer.model``, without its special tokens.

    Args:
        path: the file.
        rows: of the embedding.
        added: tokens that were added, as in a ``tokenizer.json``.

    Raises:
        UnsupportedError: llama.cpp would make other tokens.
        FormatError: it is malformed, or its tokens do not fit the embedding.
    """
    model, where = read_sentencepiece(path), str(path)
    trainer, normalizer = model.trainer, model.normalizer
    odd = {
        "another kind than BPE": trainer["model_type"] != BPE,
        "spaces as suffixes": trainer["whitespace_as_suffix"],
        "no bytes for unknown characters": not trainer["byte_fallback"],
        "characters that are replaced": normalizer["characters"],
        "spaces that are removed": normalizer["remove_extra_spaces"],
        "spaces that stay spaces": not normalizer["escape_spaces"],
    }
    found = ", ".join(name for name, is_so in odd.items() if is_so)
    if found:
        raise refused("llama.cpp has no such SentencePiece tokenizer", where, "BPE of plain texts",
                      found)  # fmt: skip
    vocabulary = Vocabulary.unused(rows)
    for row, piece in enumerate(model.pieces):
        vocabulary.put(row, piece.text, TokenType(piece.type), piece.score, where)
    notes = put_added(vocabulary, added, where)
    return _tokenizer(vocabulary, bool(normalizer["dummy_prefix"]), notes, where)


def _tokenizer(vocabulary: Vocabulary, prefix: bool, notes: list[str], where: str) -> Tokenizer:
    vocabulary.check_apart(where)
    if vocabulary.types.count(int(TokenType.BYTE)) < _BYTES:
        raise refused("llama.cpp wants a token for each byte", where, "<0x00> to <0xFF>",
                      f"{vocabulary.types.count(int(TokenType.BYTE))} of them")  # fmt: skip
    return Tokenizer(
        "llama (SentencePiece)",
        {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": vocabulary.texts,
            "tokenizer.ggml.scores": vocabulary.scores,
            "tokenizer.ggml.token_type": vocabulary.types,
            "tokenizer.ggml.add_space_prefix": prefix,
        },
        tuple(notes),
    )  # fmt: skip


def _type(text: str, unknown: Any) -> TokenType:
    if text == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL


def _prefix(rules: Mapping[str, Any], where: str) -> tuple[bool, list[str]]:
    """Return whether a space is put before texts, and where llama.cpp differs in that."""
    steps = [_step(each) for each in _each(rules.get("normalizer"), "normalizers")]
    splits = [_split(each) for each in _each(rules.get("pre_tokenizer"), "pretokenizers")]
    known: tuple[tuple[list[Any], list[Any], bool, list[str]], ...] = (
        ([_PREPEND, _REPLACE], [], True, []),
        ([_REPLACE], [], False, []),
        ([_REPLACE], [("Split", {"String": " "})], False, []),  # which finds no space any more
        ([], [("Metaspace", "never")], False, []),
        ([], [("Metaspace", "always")], True, [_EARLIER]),
        ([], [("Metaspace", "first")], True, [_EARLIER, _FIRST]),
    )
    for normalizer, pre, prefix, notes in known:
        if (steps, splits) == (normalizer, pre):
            return prefix, list(notes)
    raise refused(
        "it is not known that llama.cpp prepares texts as this tokenizer does", where,
        "spaces that become U+2581, with one or none before the text, and nothing else",
        quoted(str((steps, splits))),
    )  # fmt: skip


def _each(rule: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if rule is None:
        return []
    return list(rule.get(inside) or ()) if rule.get("type") == "Sequence" else [rule]


def _step(rule: Mapping[str, Any]) -> Any:
    kind = rule.get("type")
    if kind == "Replace":
        return (kind, rule.get("pattern"), rule.get("content"))
    return (kind, rule.get("prepend")) if kind == "Prepend" else (kind,)


def _split(rule: Mapping[str, Any]) -> Any:
    kind = rule.get("type")
    if kind == "Metaspace":
        plain = rule.get("replacement") == SPACE and rule.get("split") is False
        return (kind, rule.get("prepend_scheme") if plain else "split")
    return (kind, rule.get("pattern"))


def _scores(model: Mapping[str, Any], added: set[str], where: str) -> dict[str, float]:
    """Return scores of pieces that have SentencePiece join what the merges join."""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if any(model.get(key) for key in ("dropout", "ignore_merges", "end_of_word_suffix",
                                      "continuing_subword_prefix")):  # fmt: skip
        raise refused("llama.cpp has no such BPE", where, "merges and bytes alone", "more rules")
    order: dict[str, int] = {}
    last = None
    for one, other in pairs:
        joined = one + other
        if joined != last and joined in order:
            raise refused("merges are in an order that no scores have", where,
                          "all merges to a piece one after the other", quoted(joined))  # fmt: skip
        order.setdefault(joined, len(order))
        last = joined
    _check_complete(model["vocab"], set(pairs), added, where)
    return {text: -float(rank) for text, rank in order.items()}


def _check_complete(
    vocab: Mapping[str, int], pairs: set[tuple[str, ...]], added: set[str], where: str
) -> None:
    """Refuse merges that lack a pair which SentencePiece would join."""
    for text in vocab:
        if text in added or _BYTE.fullmatch(text):
            continue
        for at in range(1, len(text)):
            one, other = text[:at], text[at:]
            if one in vocab and other in vocab and (one, other) not in pairs:
                raise refused("a merge is missing that llama.cpp would do", where,
                              "every pair of tokens that makes up a token",
                              f"no merge of {quoted(one)} and {quoted(other)}")  # fmt: skip
