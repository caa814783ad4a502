"""Files of adapters, as names, sizes and pieces: whoever writes them reads tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from regraft.adapters.dialects.form import Moved, NewFile
from regraft.formats.files.reading import FilePool
from regraft.formats.safetensors import build_header
from regraft.tensors import DTYPES


def bytes_file(name: str, content: bytes) -> NewFile:
    """Return a file of bytes."""
    return NewFile(name, len(content), lambda _: iter([content]))


def json_file(name: str, value: Mapping[str, Any]) -> NewFile:
    """Return a file of JSON."""
    return bytes_file(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def safetensors_file(
    name: str, tensors: Mapping[str, Moved], metadata: Mapping[str, str]
) -> NewFile:
    """Return a safetensors file, in the reference library's order: wide dtypes first, then names.

    Raises:
        FormatError: a name cannot be one in such a file.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPES[item[1].dtype].bits, item[0]))
    header = build_header([(key, t.dtype, t.shape) for key, t in ordered], metadata)

    def pieces(files: FilePool) -> Iterator[bytes]:
        yield header
        for _, tensor in ordered:
            yield tensor.bits(files).tobytes()

    return NewFile(name, len(header) + sum(t.nbytes for _, t in ordered), pieces)
