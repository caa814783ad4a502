"""Byte-level BPE of a ``tokenizer.json``, as llama.cpp's ``gpt2`` tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regraft.exporting.tokens.form import Tokenizer, TokenType, Vocabulary, put_added, refused
from regraft.exporting.tokens.pretokenizers import KNOWN, find, steps_of
from regraft.formats.problems import quoted

_ODD = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Keys of the model that llama.cpp knows no counterpart of."""

_NFC = (
    "the tokenizer brings text into Unicode's form NFC first, and llama.cpp does not: text in "
    "another form becomes other tokens there"
)


def is_byte_level(rules: Mapping[str, Any]) -> bool:
    """Return whether a ``tokenizer.json`` is byte-level BPE."""
    steps = steps_of(rules.get("pre_tokenizer"))
    return _model(rules).get("type") == "BPE" and any(step[0] == "ByteLevel" for step in steps)


def byte_level_tokenizer(
    rules: Mapping[str, Any], rows: int, where: str, *, cleans: bool
) -> Tokenizer:
    """Return what GGUF says of a byte-level BPE tokenizer, without its special tokens.

    Args:
        rules: the content of ``tokenizer.json``.
        rows: of the embedding.
        where: the file, for messages.
        cleans: whether the model's tokenizer removes spaces before punctuation.

    Raises:
        UnsupportedError: llama.cpp has no pre-tokenizer that is known to split as it does.
        FormatError: its tokens do not fit the embedding.
    """
    model = _model(rules)
    _check(model, where)
    steps, ignores = steps_of(rules.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    pre = find(steps, ignores_merges=ignores, cleans=cleans)
    if pre is None:
        known = ", ".join(each.name for each in KNOWN)
        found = f"{quoted(str(steps))}, ignore_merges {ignores}"
        raise refused("it is not known that llama.cpp splits texts as this tokenizer does", where,
                      f"the pre_tokenizer of {known}", found)  # fmt: skip
    notes = _normalized(rules, where)
    vocabulary = Vocabulary.unused(rows)
    for text, row in model["vocab"].items():
        vocabulary.put(row, text, TokenType.NORMAL, 0.0, where)
    notes += put_added(vocabulary, rules.get("added_tokens") or (), where)
    vocabulary.check_apart(where)
    return Tokenizer(
        f"gpt2 ({pre.name})",
        {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre.name,
            "tokenizer.ggml.tokens": vocabulary.texts,
            "tokenizer.ggml.token_type": vocabulary.types,
            "tokenizer.ggml.merges": _merges(model.get("merges") or (), where),
        },
        tuple(notes),
    )  # fmt: skip


def _model(rules: Mapping[str, Any]) -> Mapping[str, Any]:
    model = rules.get("model")
    return model if isinstance(model, dict) else {}


def _check(model: Mapping[str, Any], where: str) -> None:
    odd = [key for key in _ODD if model.get(key)]
    if odd:
        found = ", ".join(odd)
        raise refused("llama.cpp has no such byte-level BPE", where, "none of these", found)


def _normalized(rules: Mapping[str, Any], where: str) -> list[str]:
    kind = (rules.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC"):
        raise refused("llama.cpp does not normalize texts as this tokenizer does", where,
                      "no normalizer, or NFC", quoted(kind))  # fmt: skip
    return [_NFC] if kind else []


def _merges(merges: Sequence[Any], where: str) -> list[str]:
    """Return merges as GGUF has them: both parts, with a space between them."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    odd = next((p for p in pairs if len(p) != 2 or any(" " in part for part in p)), None)
    if odd is not None:
        raise refused("a merge has a space in it, which GGUF cannot say", where,
                      "two parts without spaces", quoted(str(odd)))  # fmt: skip
    return [f"{one} {other}" for one, other in pairs]
