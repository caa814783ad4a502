"""Telling one run of values from another: their difference as integers, byte plane by byte plane.

For weights whose merge cannot be computed backwards: replaced ones, and those that only changed
their dtype. Where the two are near each other the upper planes are almost all zero and compress.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.deltas.undo import compression
from regraft.numerics.arrays import Bytes

CHUNK = 65536
"""Elements that are compressed together."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def compress(values: Bytes, prediction: Bytes, item: int) -> bytes:
    """Return what tells ``values`` from ``prediction``, nothing if they are equal.

    Args:
        values, prediction: bytes of as many elements, at most :data:`CHUNK`.
        item: bytes of an element; of anything but 1, 2, 4 and 8, single bytes are compared.
    """
    difference = _zigzag(values, prediction, item)
    if not difference.any():
        return b""
    planes = np.ascontiguousarray(difference.view(np.uint8).reshape(-1, difference.itemsize).T)
    return compression.compress(planes.tobytes())


def restore(kept: bytes, prediction: Bytes, item: int) -> Bytes:
    """Return the values that :func:`compress` was given.

    Raises:
        ValueError: ``kept`` is none of its results for so many elements.
    """
    if not kept:
        return prediction
    kind = _UNSIGNED.get(item, np.uint8)
    count = prediction.size // np.dtype(kind).itemsize
    raw = compression.decompress(kept, prediction.size)
    planes = np.frombuffer(raw, np.uint8).reshape(-1, count)
    coded = np.ascontiguousarray(planes.T).view(kind).ravel()
    one = coded.dtype.type(1)
    difference = (coded >> one) ^ (~(coded & one) + one)
    restored: Bytes = (prediction.view(kind) + difference).view(np.uint8)
    return restored


def _zigzag(values: Bytes, prediction: Bytes, item: int) -> Any:
    """Return differences as unsigned integers that are small where the values are near."""
    kind = _UNSIGNED.get(item, np.uint8)
    difference = values.view(kind) - prediction.view(kind)
    sign = np.array(8 * difference.itemsize - 1, kind)
    one = np.array(1, kind)
    return (difference << one) ^ (~(difference >> sign) + one)
