"""What a base looks like, in a few hundred bytes that travel with an adapter.

An adapter is a difference to one base, and on another it is noise. Names and shapes do not tell
bases of one family apart, so a few of the weights themselves are kept: of at most 16 of the adapted
parameters, 32 values each, as float32, at places that follow from the shape alone. Only these are
read, and of quantized weights only these are decoded.

The same base in another precision differs by rounding. What was measured on
normally distributed weights, as ‖a - b‖ / ‖a‖ over the values that are kept:

=======================================  ======
the same base, float32 to bfloat16       0.0016
float32 to float16                       0.0002
8 bits (bitsandbytes)                    0.0071
NF4 in blocks of 64                      0.091
the same, scales quantized too           0.091
FP4                                      0.12
fine-tuned, by 1% of the weights' norm   0.01
another base of the same shapes          1.4
=======================================  ======

So a base is "another" where a plain weight is off by more than a step of bfloat16 (2^-8 of the
value) in more than 2% of the places, and a quantized one where the norm is off by more than 0.5. By
the first rule a fine-tuned descendant is told from its ancestor; changes of 0.3% of the norm still
show. Behind the noise of 4 bits it is not.

Here is what a fingerprint is and what two sets of values say. Taking values is done by
:mod:`regraft.merging.another_base` from files, by :mod:`regraft.runtime.model.fingerprint` from a
running model.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from regraft.adapters.model import FINGERPRINT
from regraft.errors import FormatError
from regraft.formats.files.json_file import json_object_in

KEY = FINGERPRINT

Verdict = Literal["same", "other precision", "another", "unknown"]
"""What a base is to the one that a fingerprint was taken of.

``"same"``: the values are equal. ``"other precision"``: they differ by rounding. ``"unknown"``: too
few of them can be compared, or this is no fingerprint that this version knows. ``"another"``:
anything else.
"""

PARAMETERS, VALUES = 16, 32
STEP = 2.0**-8
"""A step of bfloat16, relative to the value."""

TINY = 2.0**-24
"""A step of the smallest float16 values, which have no exponent to spare."""

SHARE_OFF = 0.02
CODED = 0.5

_VERSION = 1
_GOLDEN = 0.6180339887498949  # places k * golden mod 1 are spread evenly for any number of them


@dataclass(frozen=True)
class Fingerprint:
    """What a base's values were.

    Attributes:
        shapes: of the sampled parameters, by name.
        values: float32, of each parameter at :func:`places_of` its shape.
        coded: whether one of them was quantized.
    """

    shapes: Mapping[str, tuple[int, ...]]
    values: tuple[np.ndarray, ...]
    coded: bool

    def to_text(self) -> str:
        """Return it as it stands in an adapter's header: compact JSON."""
        taken = np.concatenate(self.values)
        fields = {
            "version": _VERSION,
            "coded": self.coded,
            "sampled": {name: list(shape) for name, shape in self.shapes.items()},
            "values": base64.b64encode(taken.astype("<f4").tobytes()).decode(),
        }
        return json.dumps(fields, separators=(",", ":"))


def parsed(text: str) -> Fingerprint | None:
    """Return the fingerprint in a header; None for what is none: it comes from strangers."""
    try:
        fields = json_object_in(text, KEY)
        version, shapes = fields["version"], dict(fields["sampled"])
        raw = np.frombuffer(base64.b64decode(fields["values"], validate=True), "<f4")
        counts = [min(VALUES, math.prod(shape)) for shape in shapes.values()]
        coded = bool(fields["coded"])
    except (FormatError, KeyError, TypeError, ValueError, OverflowError):
        return None
    good = all(isinstance(count, int) and count > 0 for count in counts)
    if version != _VERSION or not counts or not good or sum(counts) != raw.size:
        return None
    sizes = {str(name): tuple(shape) for name, shape in shapes.items()}
    return Fingerprint(sizes, tuple(np.split(raw, np.cumsum(counts)[:-1])), coded)


def verdict(there: np.ndarray, here: np.ndarray, *, coded: bool) -> Verdict:
    """Return what values of one base are to those of another at the same places.

    Args:
        there: float32 ``(n,)``.
        here: the same.
        coded: whether one of the bases is quantized.
    """
    if np.array_equal(there, here):
        return "same"
    a, b = there.astype(np.float64), here.astype(np.float64)
    if coded:
        close = float(np.linalg.norm(a - b)) <= CODED * max(float(np.linalg.norm(a)), TINY)
    else:
        off = np.abs(a - b) > STEP * np.maximum(np.abs(a), np.abs(b)) + TINY
        close = float(off.mean()) <= SHARE_OFF
    return "other precision" if close else "another"


def spread(names: Sequence[str], count: int = PARAMETERS) -> list[str]:
    """Return some of the names, evenly spread."""
    if len(names) <= count:
        return list(names)
    return [names[i * (len(names) - 1) // (count - 1)] for i in range(count)]


def places_of(numel: int, count: int = VALUES) -> np.ndarray:
    """Return where values are taken from a weight of ``numel``: int64 ``(min(count, numel),)``."""
    if numel <= count:
        return np.arange(numel, dtype=np.int64)
    steps = (np.arange(1, count + 1) * _GOLDEN) % 1.0
    return np.minimum((steps * numel).astype(np.int64), numel - 1)


def grown(shape: Sequence[int], here: Sequence[int]) -> np.ndarray | None:
    """Return which places of a weight are in one with more or fewer rows: a vocabulary that grew.

    Args:
        shape: the weight's.
        here: that of the other one.

    Returns:
        bool ``(n,)``, for each of :func:`places_of`; None where shapes differ in more than rows.
    """
    if len(shape) != len(here) or tuple(shape[1:]) != tuple(here[1:]):
        return None
    width = math.prod(shape[1:])
    found: np.ndarray = places_of(math.prod(shape)) < here[0] * width if shape else np.array([True])
    return found


def mismatch(adapter: str, trained_on: str | None, here: str) -> str:
    """Return what to say of an adapter on another base than the one it was trained on.

    Args:
        adapter: its name.
        trained_on: what its config calls its base.
        here: what the base at hand is called.
    """
    return (
        f"adapter {adapter!r} was trained on other weights than this model has: on "
        f"{trained_on or 'another base'}, and this is {here}. It may answer nonsense here"
    )
