"""What stands in for instructions that some processors lack: fused sums, float16 conversions."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest

from deltas import reference
from regraft.numerics import intrinsics
from regraft.numerics.intrinsics import (
    float_of,
    float_to_half,
    fma,
    fused,
    half_to_float,
    narrowed,
    widened,
)

ALL_HALVES = np.arange(2**16, dtype=np.uint16)
_widened, _narrowed, _fused = numba.njit(widened), numba.njit(narrowed), numba.njit(fused)


@numba.njit
def widen_all(halves: Any, out: Any, other: Any) -> None:
    for i in range(halves.size):
        out[i] = _widened(halves[i])
        other[i] = half_to_float(halves[i])


@numba.njit
def narrow_all(bits: Any, out: Any, other: Any) -> None:
    for i in range(bits.size):
        out[i] = _narrowed(float_of(bits[i]))
        other[i] = float_to_half(float_of(bits[i]))


@numba.njit
def add_all(a: Any, b: Any, c: Any, out: Any, other: Any) -> None:
    for i in range(a.size):
        out[i] = _fused(a[i], b[i], c[i])
        other[i] = fma(a[i], b[i], c[i])


def near_ties() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return factors and summands of which many sums lie at or beside a tie, of every size."""
    rng = np.random.default_rng(0)
    count = 2**18
    ones = (1 + rng.integers(0, 2**12, (2, count)) * 2.0**-12).astype(np.float32)
    a, b = np.ldexp(ones, rng.integers(-75, 63, (2, count))).astype(np.float32)
    exact = np.float64(a) * np.float64(b)
    with np.errstate(over="ignore"):
        above = np.ldexp(1.0 + rng.integers(0, 2**23, count) * 2.0**-23, rng.integers(0, 60, count))
        c = np.where(rng.random(count) < 0.5, exact * above, -exact / above).astype(np.float32)
    return a, b, c


def test_fused_sums_are_rounded_once() -> None:
    odd = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2.0**-149, 3e38], np.float32)
    a, b, c = (
        np.concatenate([near, picked.ravel()])
        for near, picked in zip(near_ties(), np.meshgrid(odd, odd, odd), strict=True)
    )
    out, other = np.empty_like(a), np.empty_like(a)
    add_all(a, b, c, out, other)
    reference.assert_same_bits(out, reference.fma(a, b, c))
    reference.assert_same_bits(other, out)


def test_every_float16_is_widened_as_numpy_and_the_processor_do_it() -> None:
    out, other = np.empty(2**16, np.float32), np.empty(2**16, np.float32)
    widen_all(ALL_HALVES, out, other)
    expected = ALL_HALVES.view(np.float16).astype(np.float32).view(np.uint32)
    expected = expected | np.where(np.isnan(out), np.uint32(0x400000), np.uint32(0))
    assert np.array_equal(out.view(np.uint32), expected)
    assert np.array_equal(other.view(np.uint32), expected)


def test_float32_is_narrowed_as_numpy_and_the_processor_do_it() -> None:
    with np.errstate(all="ignore"):
        points = ALL_HALVES.view(np.float16).astype(np.float32).view(np.uint32).astype(np.int64)
        steps = np.array([0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x7FFFFF])
        near = ((points[:, None] + steps).ravel() % 2**32).astype(np.uint32)
        strided = np.arange(0, 2**32, 65521, np.int64).astype(np.uint32)  # everything else
        bits = np.concatenate([near, strided])
        expected = bits.view(np.float32).astype(np.float16).view(np.uint16)
    out, other = np.empty(bits.size, np.uint16), np.empty(bits.size, np.uint16)
    narrow_all(bits, out, other)
    nan = np.isnan(bits.view(np.float32))
    assert np.array_equal(out[~nan], expected[~nan])
    assert np.isnan(out[nan].view(np.float16)).all()
    assert np.array_equal(out, other)


@pytest.mark.slow
@pytest.mark.skipif(not intrinsics.binding.get_process_triple().startswith("x86_64"),
                    reason="other processors all convert float16")  # fmt: skip
def test_a_processor_without_the_instruction_converts_by_integers() -> None:
    code = (
        "import numba, numpy as np\n"
        "from regraft.numerics.intrinsics import converts_halves, float_to_half, fma\n"
        "from regraft.numerics.intrinsics import half_to_float\n"
        "assert not converts_halves()\n"
        "@numba.njit\n"
        "def there_and_back(half):\n"
        "    value = half_to_float(half)\n"
        "    return float_to_half(fma(value, np.float32(2), -value))\n"
        "print(there_and_back(np.uint16(0x3555)))\n"
    )
    env = os.environ | {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""}
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (made.returncode, made.stdout) == (0, f"{0x3555}\n"), made.stderr
