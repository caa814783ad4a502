"""Single IEEE operations that numba does not offer, as LLVM instructions.

Each gives the same bits on every CPU that has the instruction in hardware (x86-64-v3, ARM64),
which is what fixes the bytes of a merge.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001
    """Return ``a * b + c`` with one rounding (float32)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
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


@intrinsic
def half_to_float(typingctx: Any, bits: Any) -> Any:  # noqa: ARG001
    """Return the float32 equal to the float16 with these 16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the 16 bits of a float32 rounded to float16, to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
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
