"""The digest of a file that regraft wrote, without what differs from run to run.

Weight files count by their bytes. Of an undo patch the names and the bytes of its tensors count,
decompressed: how they are compressed is zstd's affair. Of JSON and text what counts is left after
dropping times, versions, folders, digests of files that have these in them, and all but six digits
of figures that may be added up in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

import regraft

_PATCH = "patch.safetensors"
_COMPRESSED = ("/units", "/planes")
_DROPPED = frozenset(("regraft", "created", "digest", "seconds", "peak_memory", "threads", "files",
                      "undo_bytes"))  # fmt: skip
"""Keys of a receipt. Its list of other files is dropped, since each of them counts itself."""


def digests_of(folder: Path, world: Path) -> Iterator[tuple[str, str]]:
    """Yield the path in a folder and the digest of each file in it; ``world`` is where all lies."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), _digest(_content(path, world))


def _digest(content: bytes) -> str:
    return str(blake3(content).hexdigest(length=16))


def _content(path: Path, world: Path) -> bytes:
    """Return what of a file counts."""
    raw = path.read_bytes()
    if path.name == _PATCH:
        return _patch(raw)
    if path.suffix == ".safetensors" or path.suffix == ".gguf":
        return raw
    text = raw.decode().replace(str(world), "").replace(f" {regraft.__version__},", "")
    if path.name == "receipt.json":
        return json.dumps(_without(json.loads(text))).encode()
    return text.encode()


def _without(value: Any) -> Any:
    """Return JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in _DROPPED}
    if isinstance(value, list):
        return [_without(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _patch(raw: bytes) -> bytes:
    """Return the names and digests of a patch's sections, decompressed."""
    end = 8 + int.from_bytes(raw[:8], "little")
    lines = []
    for name, entry in sorted(json.loads(raw[8:end]).items()):
        if name == "__metadata__" or name.endswith("/chunks"):
            continue
        low, high = entry["data_offsets"]
        section = raw[end + low : end + high]
        if name.endswith(_COMPRESSED) or name.startswith("file:"):
            section = _decompressed(section)
        lines.append(f"{name} {_digest(section)}")
    return "\n".join(lines).encode()


def _decompressed(section: bytes) -> bytes:
    """Return what one frame of zstd, or several, hold."""
    reader = zstandard.ZstdDecompressor().stream_reader(section, read_across_frames=True)
    content = reader.read()
    assert isinstance(content, bytes)
    return content
