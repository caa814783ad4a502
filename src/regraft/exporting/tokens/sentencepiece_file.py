"""Reading a SentencePiece model, ``tokenizer.model``: its pieces, and how it prepares texts.

The file is a protocol buffer, ``ModelProto`` of sentencepiece_model.proto. Only the fields that are
needed are taken: their numbers stand in :data:`_TRAINER` and :data:`_NORMALIZER`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import FormatError
from regraft.formats.files.inside import file_pieces
from regraft.formats.problems import DOWNLOAD_AGAIN

_MOST_BYTES = 64 * 2**20
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3

_TRAINER: dict[int, tuple[str, Any]] = {
    3: ("model_type", 1), 24: ("whitespace_as_suffix", 0), 35: ("byte_fallback", 0),
}  # fmt: skip
_NORMALIZER: dict[int, tuple[str, Any]] = {
    2: ("characters", b""), 3: ("dummy_prefix", 1), 4: ("remove_extra_spaces", 1),
    5: ("escape_spaces", 1),
}  # fmt: skip
"""Names and defaults of fields, by their number."""

BPE = 2
"""The ``model_type`` of byte-pair encoding."""


@dataclass(frozen=True)
class Piece:
    """A token: its text, its score, and SentencePiece's number of its type, which GGUF has too."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes:
        pieces: by id.
        trainer: ``model_type``, ``whitespace_as_suffix`` and ``byte_fallback``.
        normalizer: ``characters`` (a table of replacements), ``dummy_prefix``,
            ``remove_extra_spaces`` and ``escape_spaces``.
    """

    pieces: tuple[Piece, ...]
    trainer: dict[str, Any]
    normalizer: dict[str, Any]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Return the content of a ``tokenizer.model``.

    Raises:
        FormatError: it is none.
        InputError, AccessError: it cannot be read.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise _malformed(path, f"more than {_MOST_BYTES} bytes")
    content = b"".join(file_pieces(path))
    try:
        return _model(content)
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise _malformed(path, str(error) or "it is cut short") from None


def _model(content: bytes) -> SentencePieceModel:
    pieces = []
    trainer = dict(_TRAINER.values())
    normalizer = dict(_NORMALIZER.values())
    for number, value in _fields(content):
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number == _TRAINER_SPEC:
            trainer |= _named(value, _TRAINER)
        elif number == _NORMALIZER_SPEC:
            normalizer |= _named(value, _NORMALIZER)
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(tuple(pieces), trainer, normalizer)


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(bytes(fields.get(1, b"")).decode(), score, int(fields.get(3, 1)))


def _named(content: bytes, names: dict[int, tuple[str, Any]]) -> dict[str, Any]:
    return {names[number][0]: value for number, value in _fields(content) if number in names}


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a message: numbers, or bytes."""
    at = 0
    while at < len(content):
        tag, at = _number(content, at)
        wire = tag & 7
        if wire == 0:
            value, at = _number(content, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _number(content, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if at + length > len(content):
            raise ValueError("it is cut short")
        yield tag >> 3, content[at : at + length]
        at += length


def _number(content: bytes, at: int) -> tuple[int, int]:
    """Return the number in base 128 that begins at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _malformed(path: Path, found: str) -> FormatError:
    return FormatError("is no SentencePiece model", where=str(path), found=found,
                       hint=DOWNLOAD_AGAIN)  # fmt: skip
