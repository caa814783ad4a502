"""What a GGUF file says of a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from regraft.errors import FormatError, UnsupportedError
from regraft.formats.problems import DOWNLOAD_AGAIN, quoted

LIKE = "Give --like BASE.gguf, a GGUF file of the same model, to take its tokenizer"


class TokenType(IntEnum):
    """GGUF's numbers of what a token is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as a GGUF file has it.

    Attributes:
        kind: what it is to llama.cpp, such as ``gpt2 (qwen2)``.
        metadata: values by their whole key.
        notes: where llama.cpp will differ from transformers.
    """

    kind: str
    metadata: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass
class Vocabulary:
    """The tokens of a model, one for each row of its embedding.

    Attributes:
        texts, scores, types: by id.
    """

    texts: list[str]
    scores: list[float]
    types: list[int] = field(default_factory=list)

    @classmethod
    def unused(cls, rows: int) -> Vocabulary:
        """Return one that has no token yet: names as llama.cpp's converter gives them."""
        texts = [f"[PAD{row}]" for row in range(rows)]
        return cls(texts, [-10000.0] * rows, [int(TokenType.UNUSED)] * rows)

    def put(self, row: int, text: str, kind: TokenType, score: float, where: str) -> None:
        """Set a token.

        Raises:
            FormatError: the embedding has no such row.
        """
        if not 0 <= row < len(self.texts):
            raise FormatError(
                "the tokenizer has a token without a row of the embedding", where=where,
                expected=f"ids from 0 to {len(self.texts) - 1}", found=f"{row} for {quoted(text)}",
                hint="Resize the model's embedding to its tokenizer "
                "(model.resize_token_embeddings), and save it again",
            )  # fmt: skip
        self.texts[row], self.types[row], self.scores[row] = text, int(kind), score

    def check_apart(self, where: str) -> None:
        """Refuse two rows with one text, of which llama.cpp would see one.

        Raises:
            FormatError: there are such.
        """
        text, times = Counter(self.texts).most_common(1)[0]
        if times > 1:
            raise FormatError("two tokens have one text", where=where, found=quoted(text),
                              hint=DOWNLOAD_AGAIN)  # fmt: skip


def added_type(content: str, *, special: bool) -> TokenType:
    """Return what an added token is to llama.cpp.

    Some models mark tokens that steer them as not special; llama.cpp's converter tells these by
    their form (``does_token_look_special``).
    """
    looks = content in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        content.startswith(begin) and content.endswith(end)
        for begin, end in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    )
    return TokenType.CONTROL if special or looks else TokenType.USER_DEFINED


def put_added(vocabulary: Vocabulary, added: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """Set the added tokens of a ``tokenizer.json``; return where llama.cpp differs on them."""
    strips = []
    for token in added:
        content, special = str(token.get("content")), bool(token.get("special"))
        kind = added_type(content, special=special)
        text = content if kind is TokenType.CONTROL else content.replace("\u2581", " ")
        vocabulary.put(int(token.get("id", -1)), text, kind, -1000.0, where)
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            strips.append(content)
    if not strips:
        return []
    shown = ", ".join(map(quoted, strips[:3])) + ", ..." * (len(strips) > 3)
    return [f"{shown} take in the space beside them in transformers, and not in llama.cpp"]


def refused(what: str, where: str, expected: str, found: str) -> UnsupportedError:
    """Return the error for a tokenizer that cannot be shown right."""
    return UnsupportedError(what, where=where, expected=expected, found=found, hint=LIKE)
