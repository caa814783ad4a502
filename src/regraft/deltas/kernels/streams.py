"""The streams of an undo: what a merged weight and its delta do not tell of the base's weight.

A merged value and its delta leave few values that the weight may have had: those of the base's
dtype that, with the delta added, round to the merged value. Usually there is one, and nothing has
to be kept. Where there are several (the merged value is larger than the weight, so that its dtype
is coarser there) the number of the right one is kept, in as few bits as their count needs. Whatever
rounding in between makes unforeseen is kept as an exception. So the outcome is exact however
rough the prediction was; docs/arithmetic.md states the format.

A matrix is cut into *units* of consecutive elements, each with a stream of its own, whatever the
tiles it is worked on in: the bytes kept do not depend on the tiles. In a unit's room bits grow
upwards and exceptions downwards; where they would meet, positions go on without anything being
written, and the unit is kept as plain weights instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.deltas.kernels.inner import ONE, THREE, TWO, ZERO
from regraft.deltas.matrix_units import UNIT_COLUMNS
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import (
    BF16,
    ENTRY,
    F16,
    F32,
    INNER,
    bfloat16_bits,
)
from regraft.numerics.intrinsics import (
    bits_of,
    double_bits,
    double_of,
    float_of,
    float_to_half,
    half_to_float,
    leading_zeros,
    popcount,
)

AT, HOLD, HELD, TAIL, NEXT, END = range(6)
"""State of a unit, as int64. While it is written: the next byte of its bits; bits that are not yet
a byte, and how many; where its exceptions begin, which grow down from END; NEXT is where its room
begins. While it is read: the next byte, bits and their number likewise; where the bits end; the
next exception, and where exceptions end."""

STATE = 6

PLAIN = 0xFFFFFFFF
"""Stands for the length of a unit that is kept as the bytes of its weights."""

PLAIN_WIDTH = 99
"""Stands for the width of a weight that is kept itself, its candidates being too many."""

_ALWAYS: dict[str, Any] = INNER | {"forceinline": True}

_EIGHT = np.uintp(8)


# -- candidates ------------------------------------------------------------------------------------


@njit(**_ALWAYS)
def _mantissa(kind: Any) -> Any:
    return 23 if kind == F32 else (7 if kind == BF16 else 10)


@njit(**_ALWAYS)
def power(exponent: Any) -> Any:
    """Return 2 ** exponent, for exponents of normal float64 numbers."""
    return double_of(np.uint64(exponent + 1023) << np.uint64(52))


@njit(**_ALWAYS)
def _exponent(value: Any) -> Any:
    """Return floor(log2(|value|)); -1023 of zero, 1024 of infinity and NaN."""
    return np.int64((double_bits(value) >> np.uint64(52)) & np.uint64(0x7FF)) - 1023


@njit(**_ALWAYS)
def _spacing(value: Any, kind: Any) -> Any:
    """Return the exponent of the distance between the numbers of a dtype around ``value``."""
    lowest = -14 if kind == F16 else -126
    return max(_exponent(value), lowest) - _mantissa(kind)


@njit(**_ALWAYS)
def half_spacing(value: Any, kind: Any) -> Any:
    """Return by how much a number of a dtype may differ from what was rounded to it."""
    return power(_spacing(value, kind) - 1)


@njit(**_ALWAYS)
def _candidates(prediction: Any, radius: Any, spacing: Any) -> Any:
    """Return the lowest candidate, in units of the spacing, and the bits of a candidate's number.

    More bits than any dtype's mantissa has mean that there are too many to be numbered. There is no
    branch in it, so that several weights are done at a time.
    """
    inverse = power(-spacing)
    low = np.ceil((prediction - radius) * inverse)
    count = np.floor((prediction + radius) * inverse) - low + 1.0
    few = (count < 1e9) & (abs(prediction) < 1e300) & (abs(radius) < 1e300)
    lowest = np.rint(prediction * inverse) if count < 1.0 else low
    bits = _exponent(count - 1.0) + 1 if count >= 2.0 else 0
    return (lowest if few else 0.0), (bits if few else 64)


# -- the weights that need more than a prediction --------------------------------------------------
#
# Functions that take arrays are called for a row of a block and not for a weight: numba counts the
# references of each array at each call, which takes longer than the work. So there are three
# passes over the listed weights: their numbers and widths, the bits, and, on the way back, values.


@njit(**INNER)
def select(need: Any, need64: Any, first: Any, index: Any, n: Any) -> Any:
    """List the places (from ``first``, a multiple of 8) where ``need`` is set; count them.

    The places are few and nowhere in particular, so a branch on each would mostly be guessed wrong.
    Words that have any are listed first, without one; most of them have a single place.

    Args:
        need: a byte per weight.
        need64: the same memory.
    """
    for j in range(first + n, first + (n + np.uintp(7)) // _EIGHT * _EIGHT):
        need[j] = 0
    word0, words, found = first // _EIGHT, ZERO, ZERO
    for w in range((n + np.uintp(7)) // _EIGHT):
        word = need64[word0 + w]
        index[words] = w
        words += np.uintp(word != 0)
        found += np.uintp(popcount(word))
    # Backwards, since the list of places takes the room of the list of words.
    at = found
    for i in range(words):
        w = index[words - ONE - i]
        word = need64[word0 + w]
        while word:
            at -= ONE
            last = np.uintp(63) - np.uintp(leading_zeros(word))
            index[at] = w * _EIGHT + (last >> THREE)
            word &= ~(np.uint64(1) << np.uint64(last))
    return found


@njit(**INNER)
def write(
    number: Any, width: Any, index: Any, found: Any, x16: Any, x32: Any, kind: Any, start: Any,
    state: Any, unit: Any, stream: Any, place: Any,
) -> None:  # fmt: skip
    """Write numbers in so many bits; a negative width w is an exception after ``-1 - w`` bits."""
    s = np.uintp(unit) * np.uintp(STATE)
    size = 4 if kind == F32 else 2
    hold, held = np.uint64(state[s + np.uintp(HOLD)]), state[s + np.uintp(HELD)]
    at, tail = state[s + np.uintp(AT)], state[s + np.uintp(TAIL)]
    for i in range(found):
        bits = width[i] if width[i] >= 0 else -1 - width[i]
        hold |= number[i] << np.uint64(held)
        held += bits
        while held >= 32:
            if at + 4 <= tail:
                to = np.uintp(at)
                stream[to] = np.uint8(hold & np.uint64(0xFF))
                stream[to + ONE] = np.uint8((hold >> np.uint64(8)) & np.uint64(0xFF))
                stream[to + TWO] = np.uint8((hold >> np.uint64(16)) & np.uint64(0xFF))
                stream[to + THREE] = np.uint8((hold >> np.uint64(24)) & np.uint64(0xFF))
            hold >>= np.uint64(32)
            held -= 32
            at += 4
        if width[i] < 0:
            j = index[i]
            plain = np.uint64(bits_of(x32[start + j])) if kind == F32 else np.uint64(x16[start + j])
            tail -= 2 + size
            if tail >= at:
                record = (np.uint64(place) + np.uint64(j)) | (plain << np.uint64(16))
                for b in range(2 + size):
                    stream[np.uintp(tail + b)] = np.uint8(record & np.uint64(0xFF))
                    record >>= np.uint64(8)
    state[s + np.uintp(HOLD)], state[s + np.uintp(HELD)] = np.int64(hold), held
    state[s + np.uintp(AT)], state[s + np.uintp(TAIL)] = at, tail


@njit(**INNER)
def read(
    number: Any, width: Any, found: Any, plain_bits: Any, state: Any, unit: Any, stream: Any
) -> None:
    """Read the numbers that :func:`write` wrote; past the end of the stream they are zero.

    A width of :data:`PLAIN_WIDTH` stands for one bit and, if that is 0, ``plain_bits`` more.
    """
    s = np.uintp(unit) * np.uintp(STATE)
    hold, held = np.uint64(state[s + np.uintp(HOLD)]), state[s + np.uintp(HELD)]
    at, tail = state[s + np.uintp(AT)], state[s + np.uintp(TAIL)]
    for i in range(found):
        bits = width[i]
        if bits == PLAIN_WIDTH:
            bits = 1
        for _ in range(2):
            while held < bits:
                if at < tail:
                    hold |= np.uint64(stream[np.uintp(at)]) << np.uint64(held)
                at += 1
                held += 8
            number[i] = hold & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
            hold >>= np.uint64(bits)
            held -= bits
            if width[i] != PLAIN_WIDTH or bits != 1:
                break
            if number[i] != 0:  # it says: the weight is zero
                number[i] = 0
                break
            bits = plain_bits
    state[s + np.uintp(HOLD)], state[s + np.uintp(HELD)] = np.int64(hold), held
    state[s + np.uintp(AT)] = at


@njit(**INNER)
def put_exceptions(
    state: Any, unit: Any, stream: Any, place: Any, x16: Any, x32: Any, kind: Any, start: Any,
    n: Any,
) -> None:  # fmt: skip
    """Put the exceptions of a row of a block in their places."""
    s = np.uintp(unit) * np.uintp(STATE)
    size = 4 if kind == F32 else 2
    following, end = state[s + np.uintp(NEXT)], state[s + np.uintp(END)]
    while following + 2 + size <= end:
        record = np.uint64(0)
        for b in range(2 + size):
            record |= np.uint64(stream[np.uintp(following + b)]) << np.uint64(8 * b)
        position, bits = record & np.uint64(0xFFFF), record >> np.uint64(16)
        if position < np.uint64(place) or position >= np.uint64(place) + np.uint64(n):
            break
        j = start + np.uintp(position - np.uint64(place))
        if kind == F32:
            x32[j] = float_of(np.uint32(bits))
        else:
            x16[j] = np.uint16(bits)
        following += 2 + size
    state[s + np.uintp(NEXT)] = following


# -- listed weights of a row of a block, any case --------------------------------------------------


@njit(**INNER)
def _list(
    x16: Any, x32: Any, kind: Any, start: Any, index: Any, found: Any, plain: Any, value: Any
) -> None:
    """Put the listed weights one after the other, as bits and as float32."""
    if kind == F32:
        for i in range(found):
            value[i] = x32[start + index[i]]
            plain[i] = np.uint64(bits_of(value[i]))
    else:
        for i in range(found):
            bits = x16[start + index[i]]
            value[i] = _value16(bits, kind)
            plain[i] = np.uint64(bits)


@njit(**INNER)
def _number(
    prediction: Any, radius: Any, value: Any, kind: Any, found: Any, number: Any, width: Any
) -> None:
    """Turn the bits of each listed weight into its number, and set how many bits that takes.

    A negative width w stands for an exception after ``-1 - w`` bits.
    """
    size, mantissa = np.int64(32 if kind == F32 else 16), np.int64(_mantissa(kind))
    none, one = np.uint64(0), np.uint64(1)
    for i in range(found):
        spacing = _spacing(prediction[i], kind)
        low, bits = _candidates(prediction[i], radius[i], spacing)
        plain, weight = number[i], np.float64(value[i])
        which = weight * power(-spacing) - low
        inside = (which >= 0.0) & (which < power(bits)) & (which == np.floor(which))
        fits = inside & ((weight != 0.0) | (plain == none))  # -0 would read back as +0
        itself = bits > mantissa
        coded = np.uint64(np.int32(which if fits & (not itself) else 0.0))
        in_bits = bits if fits else np.int64(-1) - bits
        itself_in = one + np.uint64(size) if plain != none else one
        number[i] = (plain << one if plain != none else one) if itself else coded
        width[i] = np.int64(itself_in) if itself else in_bits


@njit(**INNER)
def _width(prediction: Any, radius: Any, kind: Any, found: Any, width: Any) -> None:
    for i in range(found):
        _, bits = _candidates(prediction[i], radius[i], _spacing(prediction[i], kind))
        width[i] = PLAIN_WIDTH if bits > _mantissa(kind) else bits


@njit(**INNER)
def _set(
    prediction: Any, radius: Any, x16: Any, x32: Any, kind: Any, start: Any, index: Any,
    found: Any, number: Any, width: Any,
) -> None:  # fmt: skip
    for i in range(found):
        j = start + index[i]
        spacing = _spacing(prediction[i], kind)
        low, _ = _candidates(prediction[i], radius[i], spacing)
        which = np.float64(np.int32(number[i]))  # of a plain weight, anything
        value = np.float32((low + which) * power(spacing) + 0.0)
        if kind == F32:
            x32[j] = float_of(np.uint32(number[i])) if width[i] == PLAIN_WIDTH else value
        elif width[i] == PLAIN_WIDTH:
            x16[j] = np.uint16(number[i])
        else:
            x16[j] = bfloat16_bits(value) if kind == BF16 else float_to_half(value)


@njit(**_ALWAYS)
def _value16(bits: Any, kind: Any) -> Any:
    return float_of(np.uint32(bits) << np.uint32(16)) if kind == BF16 else half_to_float(bits)


@njit(**INNER)
def keep_listed(
    prediction: Any, radius: Any, x16: Any, x32: Any, kind: Any, at: Any, state: Any, stream: Any,
    unit: Any, place: Any, value: Any, number: Any, width: Any, index: Any, found: Any,
) -> None:  # fmt: skip
    """Keep what is needed of listed weights, given float64 predictions and their radius.

    Of a weight that is its only candidate nothing is needed; to list it does no harm.
    """
    _list(x16, x32, kind, at, index, found, number, value)
    _number(prediction, radius, value, kind, found, number, width)
    write(number, width, index, found, x16, x32, kind, at, state, unit, stream, place)


@njit(**INNER)
def restore_listed(
    prediction: Any, radius: Any, x16: Any, x32: Any, kind: Any, at: Any, state: Any, stream: Any,
    unit: Any, number: Any, width: Any, index: Any, found: Any,
) -> None:  # fmt: skip
    """Restore listed weights of which :func:`keep_listed` kept what is needed."""
    _width(prediction, radius, kind, found, width)
    read(number, width, found, 32 if kind == F32 else 16, state, unit, stream)
    _set(prediction, radius, x16, x32, kind, at, index, found, number, width)


# -- a tile ----------------------------------------------------------------------------------------


@njit(**_ALWAYS)
def unit_of(
    unit_row: Any, row: Any, column: Any, columns: Any, rows_per_unit: Any, units_per_row: Any
) -> Any:
    """Return the unit (from the tile's first) that an element lies in, and its place there.

    Args:
        unit_row: rows between the first row of the tile's first unit and the row counted from.
        column: from the first column of the tile, which begins a unit.
    """
    line = np.uint64(unit_row) + np.uint64(row)
    if units_per_row > 1:
        along = np.uint64(column)
        unit = line * np.uint64(units_per_row) + along // np.uint64(UNIT_COLUMNS)
        return np.uintp(unit), along % np.uint64(UNIT_COLUMNS)
    place = (line % np.uint64(rows_per_unit)) * np.uint64(columns) + np.uint64(column)
    return np.uintp(line // np.uint64(rows_per_unit)), place


@njit(**ENTRY)
def gather(
    state: Any, stream: Any, unit_bytes: Any, weights: Any, item: int, out: Any, lengths: Any,
    counts: Any,
) -> int:  # fmt: skip
    """Lay the streams of a tile's units out one after the other; return how many bytes they take.

    Args:
        state, stream: as the units were written; a negative TAIL asks for plain weights.
        unit_bytes: int64, the bytes that each unit's weights take.
        weights: uint8, the tile's weights.
        item: bytes of one weight.
        out: uint8, as long as the weights.
        lengths: uint32 per unit, set to the bytes of its bits; :data:`PLAIN` for plain weights.
        counts: uint16 per unit, set to the number of its exceptions.
    """
    record = item + 2
    done = begin = 0
    for unit in range(lengths.shape[0]):
        s, room = unit * STATE, unit_bytes[unit]
        first, at, tail, end = state[s + NEXT], state[s + AT], state[s + TAIL], state[s + END]
        hold, held = np.uint64(state[s + HOLD]), state[s + HELD]
        while held > 0:
            if at < tail:
                stream[at] = np.uint8(hold & np.uint64(0xFF))
            hold >>= np.uint64(8)
            held -= 8
            at += 1
        if at > tail:
            for j in range(room):
                out[done + j] = weights[begin + j]
            lengths[unit], counts[unit] = PLAIN, 0
            done += room
        else:
            for j in range(at - first):
                out[done + j] = stream[first + j]
            done += at - first
            number = (end - tail) // record
            for e in range(number):
                for j in range(record):
                    out[done + j] = stream[end - (e + 1) * record + j]
                done += record
            lengths[unit], counts[unit] = at - first, number
        begin += room
    return done
