"""Single IEEE operations that numba does not offer, as LLVM instructions.

Each gives the same bits on every CPU, which is what fixes the bytes of a merge. A processor without
fused multiply-add (x86-64 before v3) would call the C library for each element; there, float64 does
it (:func:`fused`). One that cannot convert float16 would need functions that no library has for
sure; there, integers do it (:func:`widened` and :func:`narrowed`). None of the three has a branch,
so that several elements are done at a time.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import config
from numba.extending import intrinsic


def _has(feature: str) -> bool:
    """Whether the processor that numba compiles for is known to have an instruction of x86.

    Where ``NUMBA_CPU_NAME`` or ``NUMBA_CPU_FEATURES`` narrow it, only the features named count.
    Other processors have what is asked for here.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if config.CPU_FEATURES is not None:
        return f"+{feature}" in config.CPU_FEATURES.split(",")
    return bool(binding.get_host_cpu_features().get(feature))


def fused(a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c`` of float32 with one rounding, by means of float64.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond 2008,
    "Emulation of FMA and correctly rounded sums"), so that float32 comes out as if rounded once.
    """
    product, other = np.float64(a) * np.float64(b), np.float64(c)
    total = product + other
    back = total - product
    lost = (product - (total - back)) + (other - back)  # Knuth: total + lost is the exact sum
    bits = double_bits(total)
    inexact = (lost > 0.0) | (lost < 0.0)  # NaN is neither
    outwards = (lost > 0.0) == (total > 0.0)
    step = np.int64(1) if outwards else np.int64(-1)
    odd = np.int64(bits) + (step if inexact & ((bits & np.uint64(1)) == 0) else np.int64(0))
    return np.float32(double_of(np.uint64(odd)))


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001
    """Return ``a * b + c`` with one rounding (float32)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not _has("fma"):
            return context.compile_internal(builder, fused, signature, args)
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the 32 bits of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:  # noqa: ARG001
    """Return the float32 that 32 bits stand for."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def shift_left(typingctx: Any, value: Any, count: Any) -> Any:  # noqa: ARG001
    """Return an int32 shifted by 0 to 31 places; numba's own shift takes 64 bits for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.shl(*args)

    return types.int32(types.int32, types.int32), codegen


def converts_halves() -> bool:
    """Whether the processor that numba compiles for is known to convert float16 itself."""
    return _has("f16c")


def widened(half: Any) -> Any:
    """Return the float32 equal to a float16, given as its bits; a NaN becomes a quiet one."""
    sign = np.uint32((np.uint32(half) & np.uint32(0x8000)) << np.uint32(16))
    size = np.uint32(np.uint32(half) & np.uint32(0x7FFF))
    moved = np.uint32(size << np.uint32(13))
    subnormal = bits_of(np.float32(np.int32(size)) * np.float32(2.0**-24))  # whole ones of 2^-24
    normal = np.uint32(moved + np.uint32(112 << 23))
    quiet = np.uint32(0x400000) if size > np.uint32(0x7C00) else np.uint32(0)
    special = np.uint32(moved | np.uint32(0x7F800000) | quiet)
    finite = subnormal if size < np.uint32(0x400) else normal
    return float_of(np.uint32(sign | (finite if size < np.uint32(0x7C00) else special)))


def narrowed(value: Any) -> Any:
    """Return the bits of a float32 rounded to float16, to nearest even; a NaN stays a NaN."""
    bits = bits_of(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    payload = np.uint32((size >> np.uint32(13)) & np.uint32(0x3FF))
    nan = np.uint32(payload | np.uint32(0x7E00))
    # Below 2^-14: float32 from 1/2 on has the step of subnormals.
    small = np.uint32(bits_of(float_of(size) + np.float32(0.5)) - np.uint32(0x3F000000))
    half = np.uint32(np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1)))
    normal = np.uint32(np.uint32(np.uint32(size - np.uint32(112 << 23)) + half) >> np.uint32(13))
    finite = small if size < np.uint32(0x38800000) else normal
    large = nan if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
    return np.uint16(sign | (finite if size < np.uint32(0x47800000) else large))  # below 2^16


@intrinsic
def half_to_float(typingctx: Any, bits: Any) -> Any:  # noqa: ARG001
    """Return the float32 equal to the float16 with these 16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not converts_halves():
            return context.compile_internal(builder, widened, signature, args)
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the 16 bits of a float32 rounded to float16, to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not converts_halves():
            return context.compile_internal(builder, narrowed, signature, args)
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


_ANY_ORDER = ("reassoc", "contract")


@intrinsic
def add_square(typingctx: Any, total: Any, value: Any) -> Any:  # noqa: ARG001
    """Return ``total + value * value`` (float64), in a loop to be added up in any order.

    For figures of the report alone: leaving the order to LLVM lets it keep several sums at a time.
    In float64 that shows in the last digits, which are not reported.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        square = builder.fmul(args[1], args[1], flags=_ANY_ORDER)
        return builder.fadd(args[0], square, flags=_ANY_ORDER)

    return types.float64(types.float64, types.float64), codegen


@intrinsic
def add_product(typingctx: Any, total: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Return ``total + a * b`` (float64), to be added up in any order; see :func:`add_square`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        product = builder.fmul(args[1], args[2], flags=_ANY_ORDER)
        return builder.fadd(args[0], product, flags=_ANY_ORDER)

    return types.float64(types.float64, types.float64, types.float64), codegen


@intrinsic
def double_bits(typingctx: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the 64 bits of a float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


@intrinsic
def double_of(typingctx: Any, bits: Any) -> Any:  # noqa: ARG001
    """Return the float64 that 64 bits stand for."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.uint64), codegen


@intrinsic
def leading_zeros(typingctx: Any, word: Any) -> Any:  # noqa: ARG001
    """Return how many bits of a uint64 are zero above its highest one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@intrinsic
def popcount(typingctx: Any, word: Any) -> Any:  # noqa: ARG001
    """Return how many bits of a uint64 are one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen
