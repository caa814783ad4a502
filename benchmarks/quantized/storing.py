"""Random weights in the formats that no library writes on a CPU: round to nearest, plain numpy.

GGUF's types with scales of scales are rounded as ggml's own first guess has it: the scale of a part
from its largest value, or from its ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[Any]
Tensors = dict[str, Array]

GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


# -- words of 32 bits ------------------------------------------------------------------------------


def words(codes: Array, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Array:
    """Return 4-bit codes in words along the last dimension."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)[..., list(order)].astype(np.uint32)
    shifts = 4 * np.arange(8, dtype=np.uint32)
    packed: Array = np.bitwise_or.reduce(eights << shifts, axis=-1).view(np.int32)
    return packed


def grouped(weight: Floats, groups: Array) -> tuple[Array, Array, Array]:
    """Return codes (in, out), zeros and scales (groups, out)."""
    order = np.argsort(groups, kind="stable")
    turned = weight.T[order].reshape(-1, GROUP, weight.shape[0])
    low, high = turned.min(1).clip(max=0), turned.max(1).clip(min=0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.rint(-low / scales.astype(np.float32)).clip(1, 15)
    each = scales[groups].astype(np.float32)
    codes = np.rint(weight.T / each + zeros[groups]).clip(0, 15)
    return codes.astype(np.uint8), zeros.astype(np.uint8), scales


def gptq(*, ordered: bool) -> Callable[[str, Floats], Tensors]:
    """Return what stores a weight as GPTQ's 4 bits, its groups in order or not."""

    def store(module: str, weight: Floats) -> Tensors:
        groups = np.arange(weight.shape[1]) // GROUP
        if not ordered:
            groups = np.random.default_rng(0).permutation(groups)
        codes, zeros, scales = grouped(weight, groups)
        return {
            f"{module}.qweight": np.ascontiguousarray(words(np.ascontiguousarray(codes.T)).T),
            f"{module}.qzeros": words(zeros), f"{module}.scales": scales,
            f"{module}.g_idx": groups.astype(np.int32),
        }  # fmt: skip

    return store


def awq(module: str, weight: Floats) -> Tensors:
    """Store a weight as AWQ does."""
    codes, zeros, scales = grouped(weight, np.arange(weight.shape[1]) // GROUP)
    return {
        f"{module}.qweight": words(codes, AWQ_ORDER),
        f"{module}.qzeros": words(zeros, AWQ_ORDER), f"{module}.scales": scales,
    }  # fmt: skip


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def mxfp4(name: str, weight: Floats) -> Tensors:
    """Store a stack (experts, out, in) as gpt-oss does: a power of two for 32 inputs."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    scaled = blocks / np.exp2(exponents)[..., None]
    codes = np.searchsorted((E2M1[1:] + E2M1[:-1]) / 2, np.abs(scaled)).astype(np.uint8)
    codes |= (scaled < 0).astype(np.uint8) << 3
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).astype(np.uint8)}


# -- GGUF ------------------------------------------------------------------------------------------


def _halves(values: Floats) -> Array:
    """Return float16 values as two bytes each, in a last dimension."""
    return np.ascontiguousarray(values, np.float16)[..., None].view(np.uint8)


def _rounded(values: Floats) -> Floats:
    """Return values as float16 has them."""
    return values.astype(np.float16).astype(np.float32)


def _ends(parts: Floats, top: int) -> tuple[Floats, Floats]:
    """Return step and lowest value (made positive) of each part."""
    low = parts.min(-1).clip(max=0)
    return (parts.max(-1).clip(min=0) - low) / top, -low


def _over(values: Floats, scale: Floats) -> Floats:
    return np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)


def k4(weight: Floats, *, five: bool = False) -> Array:
    """Q4_K and Q5_K: eight parts of 32, step and offset in 6 bits each."""
    parts = weight.reshape(-1, 8, 32)
    top = 31 if five else 15
    step, low = _ends(parts, top)
    d, m = (_rounded(x.max(-1) / 63) for x in (step, low))
    steps, lows = (np.rint(_over(x, y[:, None])).clip(0, 63) for x, y in ((step, d), (low, m)))
    scale, offset = (d[:, None] * steps)[..., None], (m[:, None] * lows)[..., None]
    codes = np.rint(_over(parts + offset, np.broadcast_to(scale, parts.shape))).clip(0, top)
    codes, steps, lows = (x.astype(np.uint8) for x in (codes, steps, lows))
    scales = np.zeros((len(parts), 12), np.uint8)
    scales[:, 0:4] = steps[:, :4] | ((steps[:, 4:] >> 4) << 6)
    scales[:, 4:8] = lows[:, :4] | ((lows[:, 4:] >> 4) << 6)
    scales[:, 8:12] = (steps[:, 4:] & 15) | ((lows[:, 4:] & 15) << 4)
    pairs = codes.reshape(-1, 4, 2, 32) & 15
    quants = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    high = np.bitwise_or.reduce((codes >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    found = [_halves(d), _halves(m), scales, *([high] if five else []), quants]
    return np.concatenate(found, -1).reshape(weight.shape[0], -1)


def k6(weight: Floats) -> Array:
    """Q6_K: sixteen parts of 16, a scale in 8 bits each."""
    parts = weight.reshape(-1, 16, 16)
    far = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
    step = -far / 32
    largest = np.take_along_axis(step, np.abs(step).argmax(-1)[:, None], -1)[:, 0]
    d = _rounded(-largest / 128)
    scales = np.rint(_over(step, np.broadcast_to(d[:, None], step.shape))).clip(-128, 127)
    whole = np.broadcast_to((d[:, None] * scales)[..., None], parts.shape)
    codes = (np.rint(_over(parts, whole)).clip(-32, 31) + 32).astype(np.uint8)
    codes = codes.reshape(-1, 2, 4, 32)
    low = np.concatenate([(codes[:, :, i] & 15) | ((codes[:, :, i + 2] & 15) << 4) for i in (0, 1)],
                         -1)  # fmt: skip
    high = np.bitwise_or.reduce((codes >> 4) << (2 * np.arange(4, dtype=np.uint8))[:, None], axis=2)
    found = [low.reshape(len(parts), -1), high.reshape(len(parts), -1),
             scales.astype(np.int8).view(np.uint8), _halves(d)]  # fmt: skip
    return np.concatenate(found, -1).reshape(weight.shape[0], -1)


def by_package(kind: str) -> Callable[[Floats], Array]:
    """Return the quantizer of the ``gguf`` package for a type."""

    def store(weight: Floats) -> Array:
        import gguf

        of_kind: Any = gguf.GGMLQuantizationType[kind]
        stored: Array = gguf.quants.quantize(weight, of_kind)
        return stored

    return store


GGUF: dict[str, Callable[[Floats], Array]] = {
    **{kind: by_package(kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "Q4_K": k4, "Q5_K": lambda weight: k4(weight, five=True), "Q6_K": k6,
}  # fmt: skip
"""What stores a weight (out, in) as rows of blocks, by type."""
