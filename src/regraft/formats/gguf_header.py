"""The head of a GGUF file, built from another one's: metadata as raw bytes, a table of other types.

Metadata and tokenizer travel as they are, byte for byte. One key comes after the others, which says
by which plan the file was made, and ``general.file_type`` may be given another number.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regraft.formats.files.reading import open_regular, read_at
from regraft.formats.gguf import GgufHead, gguf_package, read_head

PLAN_KEY = "regraft.plan"
"""The key that regraft adds: the digest of the plan that made the tensors, which a receipt of the
same merge is of."""

_FILE_TYPE = "general.file_type"
_UINT32, _TEXT = 4, 8


def raw_head(path: Path) -> bytes:
    """Return all bytes of a GGUF file before its tensors.

    Raises:
        RegraftError: it cannot be read, or is malformed.
    """
    size = read_head(path).size
    fd = open_regular(path)
    try:
        return read_at(fd, path, 0, size)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class BuiltHead:
    """A head, and where it says that tensors lie.

    Attributes:
        content: its bytes, up to where the data begin.
        offsets: where each tensor begins in the file, by name.
        size: bytes of the whole file; the last tensor is padded, too.
    """

    content: bytes
    offsets: dict[str, int]
    size: int


def build_head(
    head: GgufHead, types: Mapping[str, str], plan: str, file_type: int | None = None
) -> BuiltHead:
    """Return the head of a file with the same tensors in the same order.

    Args:
        head: the other file's.
        types: names of the ggml types of tensors that have another one here, by tensor.
        plan: value of :data:`PLAN_KEY`.
        file_type: value of ``general.file_type``, where the other file has one; None to leave it.
    """
    gguf = gguf_package()
    metadata, keys = _metadata(head, plan, file_type)
    kinds = {e.name: e.kind for e in head.entries}
    kinds |= {name: int(gguf.GGMLQuantizationType[type_]) for name, type_ in types.items()}
    places, end = dict[str, int](), 0
    for entry in sorted(head.entries, key=lambda entry: entry.offset):
        places[entry.name] = end
        elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kinds[entry.name])]
        end += math.prod(entry.dimensions) // elements * nbytes
        end = -(-end // head.alignment) * head.alignment
    table = b"".join(
        _entry(e.name, e.dimensions, kinds[e.name], places[e.name]) for e in head.entries
    )
    content = b"GGUF" + struct.pack("<IQQ", head.version, len(head.entries), keys)
    content += metadata + table
    content += bytes(-len(content) % head.alignment)
    begin = len(content)
    return BuiltHead(content, {n: begin + at for n, at in places.items()}, begin + end)


def _metadata(head: GgufHead, plan: str, file_type: int | None) -> tuple[bytes, int]:
    """Return the bytes of all keys, and their number; a key of an earlier merge is replaced."""
    metadata, keys = head.metadata, head.keys
    if file_type is not None:
        typed = _text(_FILE_TYPE) + struct.pack("<I", _UINT32)
        metadata = _replaced(metadata, typed, struct.pack("<I", file_type)) or metadata
    key, value = _text(PLAN_KEY) + struct.pack("<I", _TEXT), _text(plan)
    known = _replaced(metadata, key + value[:8], value[8:])
    return (known, keys) if known is not None else (metadata + key + value, keys + 1)


def _replaced(metadata: bytes, key: bytes, value: bytes) -> bytes | None:
    """Return metadata with another value, as long as the old one, after a key; None without it."""
    at = metadata.find(key)
    if at < 0:
        return None
    at += len(key)
    return metadata[:at] + value + metadata[at + len(value) :]


def _entry(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return _text(name) + sizes + struct.pack("<IQ", kind, offset)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
