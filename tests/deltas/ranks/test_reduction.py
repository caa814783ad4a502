"""The best approximation of a product of factors, held against a decomposition of the product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.deltas.ranks.reduction import (
    decompose,
    difference_norm,
    kept_share,
    product_norm,
    singular_values,
    smallest_rank,
    truncated,
)

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@st.composite
def factors(draw: st.DrawFn) -> tuple[Matrix, Matrix]:
    """Draw B (out, r) and A (r, in), also with r above both, and with products of a lower rank."""
    out, rank, inputs = (draw(st.integers(1, 12)) for _ in range(3))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
    b, a = numbers.normal(size=(out, rank)), numbers.normal(size=(rank, inputs))
    b[:, draw(st.integers(0, rank)) :] *= draw(st.sampled_from([0.0, 1e-9, 1.0, 1e9]))
    return b, a


def best(product: Matrix, rank: int) -> Matrix:
    """Return the best approximation of a whole product, by numpy alone."""
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@given(factors())
def test_the_decomposition_is_that_of_the_product(pair: tuple[Matrix, Matrix]) -> None:
    b, a = pair
    found, size = decompose(b, a), np.linalg.norm(b) * np.linalg.norm(a)
    n = found.s.size
    assert n == min(b.shape[0], a.shape[1], b.shape[1])
    assert np.allclose((found.u * found.s) @ found.vt, b @ a, rtol=0, atol=1e-13 * size)
    assert np.allclose(found.u.T @ found.u, np.eye(n), atol=1e-12)
    assert np.allclose(found.vt @ found.vt.T, np.eye(n), atol=1e-12)
    expected = np.linalg.svd(b @ a, compute_uv=False)[:n]
    assert np.allclose(found.s, expected, rtol=0, atol=1e-13 * size)
    assert np.allclose(singular_values(b, a), found.s, rtol=0, atol=1e-13 * size)


@given(factors(), st.integers(1, 14))
def test_a_lower_rank_errs_as_little_as_the_best_there_is(
    pair: tuple[Matrix, Matrix], rank: int
) -> None:
    b, a = pair
    new_b, new_a = truncated(decompose(b, a), rank)
    assert (new_b.shape, new_a.shape) == ((b.shape[0], rank), (rank, a.shape[1]))
    size = np.linalg.norm(b) * np.linalg.norm(a)
    least = np.linalg.norm(b @ a - best(b @ a, rank))
    assert np.linalg.norm(b @ a - new_b @ new_a) <= least + 1e-13 * size
    assert abs(difference_norm(b, a, new_b, new_a) - least) <= 1e-13 * size


@given(factors(), factors())
def test_norms_are_those_of_the_whole_products(
    one: tuple[Matrix, Matrix], other: tuple[Matrix, Matrix]
) -> None:
    b, a = one
    size = np.linalg.norm(b) * np.linalg.norm(a)
    assert abs(product_norm(b, a) - np.linalg.norm(b @ a)) <= 1e-13 * size
    new_b = np.resize(other[0], (b.shape[0], other[0].shape[1]))
    new_a = np.resize(other[1], (other[1].shape[0], a.shape[1]))
    size += np.linalg.norm(new_b) * np.linalg.norm(new_a)
    off = difference_norm(b, a, new_b, new_a)
    assert abs(off - np.linalg.norm(b @ a - new_b @ new_a)) <= 1e-13 * size


def test_a_difference_far_below_the_products_is_still_measured() -> None:
    numbers = np.random.default_rng(3)
    b, a = numbers.normal(size=(50, 4)), numbers.normal(size=(4, 30))
    near = b.copy()
    near[7, 2] += 1e-12  # squares of norms, in float64, could not tell this from nothing
    exact = 1e-12 * np.linalg.norm(a[2])
    assert difference_norm(b, a, near, a) == pytest.approx(exact, rel=1e-2)


def test_both_sides_are_of_one_size() -> None:
    numbers = np.random.default_rng(4)
    b, a = 1e-6 * numbers.normal(size=(40, 5)), 1e3 * numbers.normal(size=(5, 20))
    new_b, new_a = truncated(decompose(b, a), 3)
    assert np.allclose(np.linalg.norm(new_b, axis=0), np.linalg.norm(new_a, axis=1))


def test_the_signs_do_not_depend_on_the_library() -> None:
    numbers = np.random.default_rng(5)
    found = decompose(numbers.normal(size=(9, 4)), numbers.normal(size=(4, 6)))
    largest = found.u[np.abs(found.u).argmax(axis=0), np.arange(4)]
    assert (largest > 0).all()


# -- how much is kept


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(1e-6, 1))
def test_the_smallest_rank_keeps_enough_and_one_less_does_not(
    values: list[float], energy: float
) -> None:
    squares = np.sort(np.array(values) ** 2)[::-1]
    rank = smallest_rank(squares, energy)
    assert 1 <= rank <= squares.size
    wanted = energy * np.cumsum(squares)[-1]
    assert squares[:rank].sum() >= wanted * (1 - 1e-12)
    assert rank == 1 or np.cumsum(squares)[rank - 2] < wanted


def test_all_of_it_needs_every_value_that_counts() -> None:
    assert smallest_rank(np.array([4.0, 2.0, 1.0, 0.0]), 1.0) == 3
    assert smallest_rank(np.array([4.0, 2.0, 1.0, 1.0]), 0.75) == 2
    assert smallest_rank(np.zeros(4), 0.99) == 1


def test_the_share_that_is_kept() -> None:
    assert kept_share(np.array([6.0, 3.0, 1.0]), 2) == 0.9
    assert kept_share(np.array([6.0, 3.0, 1.0]), 5) == 1.0
    assert kept_share(np.zeros(3), 1) == 1.0


# -- sizes of real ones, and matrices with little in them


@pytest.mark.parametrize(
    ("out", "rank", "inputs"), [(20_000, 3, 9_001), (5000, 70, 200), (3000, 150, 160)]
)
def test_large_matrices_are_factored_as_small_ones_are(out: int, rank: int, inputs: int) -> None:
    numbers = np.random.default_rng(6)
    b, a = numbers.normal(size=(out, rank)), numbers.normal(size=(rank, inputs))
    b[:, -1] = b[:, 0]  # one rank less
    found = decompose(b, a)
    assert found.u.shape == (out, rank)
    assert np.allclose(found.u.T @ found.u, np.eye(rank), atol=1e-12)
    assert np.allclose(found.vt @ found.vt.T, np.eye(rank), atol=1e-12)
    gram = b.T @ b @ a @ a.T  # its eigenvalues are the squared singular values
    squares = np.sort(np.linalg.eigvals(gram).real)[::-1]
    assert np.allclose(found.s[:-1] ** 2, squares[:-1], rtol=1e-9)
    assert found.s[-1] < 1e-12 * found.s[0]
    rows = slice(0, out, 97)
    assert np.allclose((found.u[rows] * found.s) @ found.vt, b[rows] @ a, atol=1e-10)
    assert singular_values(b, a) == pytest.approx(found.s, abs=1e-12 * found.s[0])
    assert product_norm(b, a) == pytest.approx(np.linalg.norm(found.s), rel=1e-12)
    assert difference_norm(b, a, *truncated(found, rank)) < 1e-12 * found.s[0]


@pytest.mark.parametrize("shape", [(40, 90), (90, 90), (300, 65)])
def test_matrices_with_nothing_in_them_or_much_of_the_same(shape: tuple[int, int]) -> None:
    numbers = np.random.default_rng(7)
    a = numbers.normal(size=(shape[1], 50))
    row = np.repeat(numbers.normal(size=(shape[0], 1)), shape[1], axis=1)
    for b in (np.zeros(shape), np.ones(shape), row):
        expected = np.linalg.svd(b @ a, compute_uv=False)
        found = decompose(b, a)
        size = np.linalg.norm(b) * np.linalg.norm(a)
        assert np.allclose(found.s, expected[: found.s.size], rtol=0, atol=1e-13 * size)
        assert np.allclose((found.u * found.s) @ found.vt, b @ a, rtol=0, atol=1e-13 * size)
