"""Which of llama.cpp's pre-tokenizers splits texts as a ``tokenizer.json`` does.

llama.cpp's converter tells a pre-tokenizer by the tokens of one text. Here the rules themselves are
compared, which holds for any vocabulary. Each row of :data:`KNOWN` was held against the engine,
token by token. Not among them are ``tekken`` and ``gpt-4o``, where llama.cpp takes marks that
combine with letters otherwise than transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = (
    _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Step = tuple[Any, ...]


def _split(pattern: str) -> Step:
    return ("Split", pattern, "Isolated", False)


def _bytes(*, regex: bool) -> Step:
    return ("ByteLevel", False, regex)


_DIGITS: Step = ("Digits", True)


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp splits texts.

    Attributes:
        name: ``tokenizer.ggml.pre``.
        steps: what a ``tokenizer.json`` with the same splits has.
        ignores_merges: whether a word that is a token becomes that token, whatever the merges.
        cleans: whether it removes spaces before punctuation when it turns tokens into text.
    """

    name: str
    steps: tuple[Step, ...]
    ignores_merges: bool = False
    cleans: bool = False


KNOWN = (
    PreTokenizer("gpt-2", (_bytes(regex=True),), cleans=True),
    PreTokenizer("smollm", (_DIGITS, _bytes(regex=True))),
    PreTokenizer("starcoder", (_DIGITS, _bytes(regex=True)), cleans=True),
    PreTokenizer("llama-bpe", (_split(_LLAMA3), _bytes(regex=False)), ignores_merges=True),
    PreTokenizer("dbrx", (_split(_LLAMA3), _bytes(regex=False)), cleans=True),
    PreTokenizer("qwen2", (_split(_QWEN2), _bytes(regex=False))),
    PreTokenizer("stablelm2", (_split(_QWEN2), _bytes(regex=False)), cleans=True),
    PreTokenizer("qwen35", (_split(_QWEN35), _bytes(regex=False))),
)
"""Those that are shown right. Of two that split alike, one that cleans as the model does is taken,
else the first."""


def steps_of(rule: Mapping[str, Any] | None) -> tuple[Step, ...]:
    """Return the steps of a ``pre_tokenizer``, without what does not change the splits."""
    return tuple(_steps(rule)) if rule else ()


def _steps(rule: Mapping[str, Any]) -> Iterator[Step]:
    kind = rule.get("type")
    if kind == "Sequence":
        for each in rule.get("pretokenizers") or ():
            yield from _steps(each)
    elif kind == "Split":
        pattern = rule.get("pattern") or {}
        yield (kind, pattern.get("Regex", pattern), rule.get("behavior"),
               bool(rule.get("invert")))  # fmt: skip
    elif kind == "Digits":
        yield (kind, bool(rule.get("individual_digits")))
    elif kind == "ByteLevel":
        yield (kind, bool(rule.get("add_prefix_space")), bool(rule.get("use_regex", True)))
    else:
        yield (kind,)


def find(steps: tuple[Step, ...], *, ignores_merges: bool, cleans: bool) -> PreTokenizer | None:
    """Return what splits like these steps; None if nothing is known to."""
    alike = [
        each for each in KNOWN if each.steps == steps and each.ignores_merges == ignores_merges
    ]
    return next((each for each in alike if each.cleans == cleans), alike[0] if alike else None)
