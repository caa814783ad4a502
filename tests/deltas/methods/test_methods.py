"""The methods, against the papers' arithmetic written out on whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.deltas.methods.bands import draws, order_statistics
from regraft.deltas.methods.form import Factors, Joint, MethodOptions, Reduced
from regraft.deltas.methods.names import METHOD_NAMES
from regraft.deltas.methods.on_elements import Band
from regraft.deltas.methods.registry import METHODS
from regraft.deltas.ranks.range_finder import approximate
from regraft.quant.rounding import noise_bits

Matrix = np.ndarray
OUT, IN = 24, 18
ON_CORES = [name for name, method in METHODS.items() if method.on_cores]
ON_ELEMENTS = [name for name, method in METHODS.items() if method.on_elements]


def factors(*ranks: int, seed: int = 0, weights: tuple[float, ...] = ()) -> list[Factors]:
    rng = np.random.default_rng(seed)
    given_weights = weights or (1.0,) * len(ranks)
    return [
        Factors(rng.standard_normal((OUT, r)), rng.standard_normal((r, IN)), 0.5, w)
        for r, w in zip(ranks, given_weights, strict=True)
    ]


def dense(each: Factors) -> Matrix:
    return each.factor * (each.b @ each.a)


def whole(reduced: Reduced) -> Matrix:
    return reduced.left @ reduced.core @ reduced.right


def on_cores(name: str, given_factors: list[Factors], **options: float) -> Matrix:
    function = METHODS[name].on_cores
    assert function is not None
    return whole(function(Joint(given_factors), MethodOptions(**options)))  # type: ignore[arg-type]


def trim(matrix: Matrix, density: float) -> Matrix:
    count = max(1, int(density * matrix.size))
    kept = np.zeros(matrix.size, bool)
    kept[np.argsort(-np.abs(matrix), axis=None, kind="stable")[:count]] = True
    return np.where(kept.reshape(matrix.shape), matrix, 0)


def elect(matrices: list[Matrix]) -> Matrix:
    total = sum(matrices)
    agree = [np.sign(m) == np.where(total >= 0, 1, -1) for m in matrices]
    kept = sum(np.where(a, m, 0) for a, m in zip(agree, matrices, strict=True))
    return kept / np.maximum(sum(a.astype(int) for a in agree), 1)


def test_the_names_are_those_of_the_registry() -> None:
    assert tuple(METHODS) == METHOD_NAMES
    assert all(method.summary.endswith(".") for method in METHODS.values())


@pytest.mark.parametrize("name", ["sum", "svd"])
def test_a_sum_is_that_of_the_deltas(name: str) -> None:
    given_factors = factors(3, 5, 2, weights=(0.7, -0.3, 2.0))
    expected = sum(map(dense, given_factors))
    assert np.allclose(on_cores(name, given_factors), expected, atol=1e-13)


def test_cat_is_the_sum_at_the_sum_of_the_ranks() -> None:
    given_factors = factors(3, 5, weights=(0.7, -0.3))
    function = METHODS["cat"].on_factors
    assert function is not None
    made = function(Joint(given_factors), MethodOptions())
    assert made.rank == 8
    assert np.allclose(dense(made), sum(map(dense, given_factors)), atol=1e-13)


def test_knots_is_ties_of_the_right_sides_of_all_deltas_side_by_side() -> None:
    given_factors = factors(3, 4)
    deltas = [dense(each) for each in given_factors]
    u, s, vt = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    u, s, vt = u[:, :7], s[:7], vt[:7]
    parts = [(s[:, None] * vt)[:, i * IN : (i + 1) * IN] for i in range(2)]
    expected = u @ elect([trim(part, 0.3) for part in parts])
    assert np.allclose(on_cores("knots", given_factors, density=0.3), expected, atol=1e-12)


def test_tsv_makes_singular_vectors_orthogonal_and_keeps_their_values() -> None:
    given_factors = factors(3, 4)
    found = [np.linalg.svd(dense(each), full_matrices=False) for each in given_factors]
    ranks = [3, 4]
    u = np.hstack([f[0][:, :r] for f, r in zip(found, ranks, strict=True)])
    s = np.concatenate([f[1][:r] for f, r in zip(found, ranks, strict=True)])
    v = np.vstack([f[2][:r] for f, r in zip(found, ranks, strict=True)]).T
    polar = [p @ q for p, _, q in (np.linalg.svd(m, full_matrices=False) for m in (u, v))]
    expected = (polar[0] * s) @ polar[1].T
    assert np.allclose(on_cores("tsv", given_factors), expected, atol=1e-12)


def test_iso_has_the_directions_of_the_sum_and_one_singular_value() -> None:
    given_factors = factors(3, 4)
    u, s, vt = np.linalg.svd(sum(map(dense, given_factors)), full_matrices=False)
    expected = s[:7].mean() * (u[:, :7] @ vt[:7])
    assert np.allclose(on_cores("iso", given_factors), expected, atol=1e-12)


def test_core_space_is_ties_between_the_bases_of_all_factors() -> None:
    given_factors = factors(3, 4)
    u = np.linalg.svd(np.hstack([f.b for f in given_factors]), full_matrices=False)[0]
    vt = np.linalg.svd(np.vstack([f.a for f in given_factors]), full_matrices=False)[2]
    cores = [trim(u.T @ dense(each) @ vt.T, 0.4) for each in given_factors]
    expected = u @ elect(cores) @ vt
    assert np.allclose(on_cores("core_space", given_factors, density=0.4), expected, atol=1e-12)


def test_compress_then_merge_has_the_rank_that_was_asked_for() -> None:
    made = on_cores("compress_then_merge", factors(6, 6), density=1.0, rank=4)
    assert np.linalg.matrix_rank(made) == 4


@pytest.mark.parametrize("name", ON_CORES)
def test_one_delta_alone_is_itself(name: str) -> None:
    if name == "iso":
        pytest.skip("it makes the singular values of one delta alike, too")
    alone = factors(5)
    assert np.allclose(on_cores(name, alone), dense(alone[0]), atol=1e-12)


@pytest.mark.parametrize("name", ON_CORES)
def test_the_order_of_the_deltas_does_not_matter(name: str) -> None:
    given_factors = factors(3, 4, 2)
    turned = given_factors[::-1]
    density = {"density": 0.5} if METHODS[name].density else {}
    forth, back = on_cores(name, given_factors, **density), on_cores(name, turned, **density)
    assert np.allclose(forth, back, atol=1e-10)


@pytest.mark.parametrize("name", ON_CORES)
def test_zero_deltas_give_zero(name: str) -> None:
    nothing = [Factors(np.zeros((OUT, 3)), each.a) for each in factors(3, 3)]
    assert np.array_equal(on_cores(name, nothing), np.zeros((OUT, IN)))


def test_opposite_deltas_cancel_in_a_sum_and_not_in_ties() -> None:
    one = factors(4)[0]
    opposite = Factors(-one.b, one.a, one.scale)
    assert np.allclose(on_cores("sum", [one, opposite]), 0, atol=1e-13)
    assert np.abs(on_cores("knots", [one, opposite], density=1.0)).max() > 0.1


# -- elements --------------------------------------------------------------------------------------


def band(name: str, deltas: list[Matrix], weights: tuple[float, ...], **options: float) -> Matrix:
    method, told = METHODS[name], MethodOptions(**options)  # type: ignore[arg-type]
    limits = [(np.float32(0), np.float32(np.inf))] * len(deltas)
    if method.limits is not None:
        places = method.limits(deltas[0].size, told)
        limits = [
            tuple(order_statistics(lambda d=d: [d], places))  # type: ignore[misc]
            for d in deltas
        ]
    drawn = [draws(n, 0, deltas[0].shape) for n in range(len(deltas))]
    given_band = Band(
        tuple(deltas), tuple(map(np.float32, weights)), tuple(limits), lambda n: drawn[n]
    )
    assert method.on_elements is not None
    return method.on_elements(given_band, told)


def dense_ones(count: int, seed: int = 0) -> list[Matrix]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((OUT, IN)).astype(np.float32) for _ in range(count)]


def test_ties_is_the_weighted_mean_of_those_that_agree() -> None:
    deltas, weights = dense_ones(3), (0.5, 1.0, 2.0)
    kept = [trim(d, 0.3) * w for d, w in zip(deltas, weights, strict=True)]
    total = sum(kept)
    agree = [np.sign(k) == np.where(total >= 0, 1, -1) for k in kept]
    chosen = sum(np.where(a, k, 0) for a, k in zip(agree, kept, strict=True))
    divisor = sum(a * w for a, w in zip(agree, weights, strict=True))
    expected = chosen / np.where(divisor == 0, 1, divisor)
    assert np.allclose(band("ties", deltas, weights, density=0.3), expected, atol=1e-6)


def test_dare_divides_what_stays_by_its_share() -> None:
    (delta,) = dense_ones(1)
    made = band("dare", [delta], (1.0,), density=0.5)
    stays = draws(0, 0, delta.shape) < 0.5
    assert np.array_equal(made, np.where(stays, delta / np.float32(0.5), 0))
    assert 0.3 < stays.mean() < 0.7


def test_breadcrumbs_takes_the_smallest_and_the_largest_out() -> None:
    (delta,) = dense_ones(1)
    made = band("breadcrumbs", [delta], (1.0,), density=0.8, gamma=0.05)
    order = np.argsort(np.abs(delta), axis=None)
    top, kept = int(0.05 * delta.size), int(0.8 * delta.size)
    stays = order[delta.size - kept - top : delta.size - top]
    expected = np.zeros(delta.size, np.float32)
    expected[stays] = delta.ravel()[stays]
    assert np.array_equal(made.ravel(), expected)


def test_della_keeps_larger_elements_of_a_row_more_often() -> None:
    rng = np.random.default_rng(1)
    delta = rng.standard_normal((400, 200)).astype(np.float32)
    made = band("della", [delta], (1.0,), density=0.5, epsilon=0.4)
    ranks = np.abs(delta).argsort(1).argsort(1)
    small, large = (made[ranks < 20] != 0).mean(), (made[ranks >= 180] != 0).mean()
    assert abs(small - 0.14) < 0.03
    assert abs(large - 0.86) < 0.03
    assert abs(made.mean() - delta.mean()) < 0.02


@pytest.mark.parametrize("name", ON_ELEMENTS)
def test_at_density_one_a_single_delta_is_itself(name: str) -> None:
    (delta,) = dense_ones(1)
    gamma = {"gamma": 0.0} if name == "breadcrumbs" else {}
    assert np.array_equal(band(name, [delta], (1.0,), density=1.0, **gamma), delta)


@given(st.integers(0, 2**63), st.integers(0, 2**40))
def test_drawn_bits_are_those_of_stochastic_rounding(key: int, first: int) -> None:
    found = draws(key, first, (1, 3))
    with np.errstate(over="ignore"):
        bits = [noise_bits.py_func(np.uint64(key), np.uint64(first + i)) for i in range(3)]
    expected = [np.float32(int(b) >> 40) * np.float32(2.0**-24) for b in bits]
    assert found.ravel().tolist() == expected


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.data())
def test_order_statistics_are_those_of_sorting(values: list[float], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(values) - 1))
    cut = data.draw(st.integers(0, len(values)))
    parts = [np.array(p, np.float32) for p in (values[:cut], values[cut:])]
    (found,) = order_statistics(lambda: parts, [place])
    assert found == np.sort(np.abs(np.array(values, np.float32)))[place]


# -- low rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.97, 0.8])
def test_the_range_finder_is_within_a_thousandth_of_the_best(decay: float) -> None:
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((200, 150)))[0]
    v = np.linalg.qr(rng.standard_normal((150, 150)))[0]
    s = decay ** np.arange(150) * (1 + 0.1 * rng.random(150))
    matrix = (u * s) @ v.T
    found = approximate(lambda: [(0, matrix[:90]), (90, matrix[90:])], matrix.shape, 12)
    ordered = np.sort(s)[::-1]
    best = np.sqrt(np.sum(ordered[12:] ** 2))
    cut = (found.triples.u * found.triples.s) @ found.triples.vt
    assert np.linalg.norm(matrix - cut) <= 1.001 * best
    assert found.error(12) == pytest.approx(np.linalg.norm(matrix - cut), rel=1e-6)
