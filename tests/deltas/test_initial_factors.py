"""What PiSSA and OLoRA take out of a weight: held against the definitions in their papers."""

from __future__ import annotations

import numpy as np
import pytest

from regraft.deltas.ranks.initial_factors import olora_factors, pissa_factors

SHAPES = [(7, 5), (5, 7), (6, 6)]


def weight_of(shape: tuple[int, int]) -> np.ndarray:
    """Draw a weight."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_takes_the_best_approximation_whatever_the_scale(
    shape: tuple[int, int], scale: float
) -> None:
    weight, rank = weight_of(shape), 2
    b, a = pissa_factors(weight, rank, scale)
    assert b.shape == (shape[0], rank)
    assert a.shape == (rank, shape[1])
    u, s, vt = np.linalg.svd(weight.astype(np.float64))
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    np.testing.assert_allclose(scale * b.astype(np.float64) @ a, best, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_takes_the_first_columns_of_q_and_rows_of_r(shape: tuple[int, int]) -> None:
    weight, rank = weight_of(shape), 3
    b, a = olora_factors(weight, rank, 5.0)
    q, r = np.linalg.qr(weight.astype(np.float64))
    np.testing.assert_allclose(b, q[:, :rank], atol=2e-6)
    np.testing.assert_allclose(a, r[:rank], atol=4e-6)
