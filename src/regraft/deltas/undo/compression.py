"""Sections of an undo, compressed: a frame says its size, and is asked for no other.

zstandard would make room for whatever size a frame states, before it looks at a byte.
"""

from __future__ import annotations

import zstandard

_LEVEL = 3
_MARGIN = 512


def compress(content: bytes) -> bytes:
    """Return bytes as one frame, which says how many there are."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(content)


def most_compressed(size: int) -> int:
    """Return the most bytes that so many bytes are compressed to (ZSTD_COMPRESSBOUND, and more)."""
    return size + size // 128 + _MARGIN


def decompress(packed: bytes, size: int) -> bytes:
    """Return the bytes of a frame, of which there have to be ``size``.

    Raises:
        ValueError: it is no such frame, or says another size or none; nothing was allocated.
    """
    try:
        stated = zstandard.frame_content_size(packed)
        if stated != size:
            said = "no size" if stated < 0 else f"a size of {stated} bytes"
            raise ValueError(f"a frame that states {said}, where there should be {size}")
        content = zstandard.ZstdDecompressor().decompress(
            packed, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(content) != size:
        raise ValueError(f"{len(content)} bytes where there should be {size}")
    return content
