"""The bytes of a merge are those of the arithmetic contract, for every shape, rank and dtype."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deltas import reference
from deltas.bench import Adapter, merge, pair
from deltas.reference import STORED, assert_same_bits, scale_of
from merging.toys import PREFIX, draw
from regraft.errors import NumericError
from regraft.tensors import DTYPES

NAMES = tuple(STORED)

SHAPES = [
    (rows, columns, rank)
    for (rows, columns), rank in itertools.product(
        [(1, 1), (1, 513), (2, 255), (3, 256), (2, 257), (5, 511), (4, 512), (1, 512), (3, 513),
         (7, 1), (6, 31), (2, 1030), (33, 40)],
        range(1, 10),
    )
]  # fmt: skip


def factors(rows: int, columns: int, rank: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return B and A, random."""
    return draw(rows, rank, seed=seed) / 4, draw(rank, columns, seed=seed + 1) / 4


def every_shape(seed: int = 1) -> Adapter:
    """Return an adapter with one module for each of the shapes, each with a rank of its own."""
    tensors: dict[str, np.ndarray] = {}
    for number, shape in enumerate(SHAPES):
        tensors |= pair(f"m{number}", *factors(*shape, seed))
    ranks = {f"m{number}": rank for number, (_, _, rank) in enumerate(SHAPES)}
    return tensors, {"rank_pattern": ranks, "lora_alpha": 5}


@pytest.mark.parametrize(("source", "target"), [*itertools.product(NAMES, NAMES)])
def test_every_shape_and_rank_has_the_contracts_bytes(source: str, target: str) -> None:
    weights = {
        f"m{number}.weight": draw(rows, columns, dtype=STORED[source])
        for number, (rows, columns, _) in enumerate(SHAPES)
    }
    found = merge(weights, every_shape(), dtype=DTYPES[target].config_name)
    for number, (rows, columns, rank) in enumerate(SHAPES):
        delta = (scale_of(5, rank), *factors(rows, columns, rank))
        name = f"m{number}.weight"
        assert_same_bits(found[name], reference.merged(weights[name], [delta], target))


@pytest.mark.parametrize("dtype", NAMES)
def test_factors_of_any_dtype_are_taken_as_float32(dtype: str) -> None:
    weight = draw(9, 70, dtype=STORED["BF16"])
    left, right = (f.astype(STORED[dtype]) for f in factors(9, 70, 5))
    found = merge({"m.weight": weight}, (pair("m", left, right), {"r": 5, "lora_alpha": 3}))
    exact = [(scale_of(3, 5), left.astype(np.float32), right.astype(np.float32))]
    assert_same_bits(found["m.weight"], reference.merged(weight, exact, "BF16"))


@pytest.mark.parametrize("dtype", NAMES)
def test_several_adapters_add_up_in_float32_in_the_order_given(dtype: str) -> None:
    weight = draw(6, 90, dtype=np.float32)
    sizes = [(4, 1.0), (1, -0.3), (7, 2.5)]
    pairs = [factors(6, 90, rank, seed=10 * rank) for rank, _ in sizes]
    adapters = [
        (pair("m", *factors_), {"r": rank, "lora_alpha": 3})
        for factors_, (rank, _) in zip(pairs, sizes, strict=True)
    ]
    deltas = [
        (scale_of(3, rank, by), *factors_)
        for factors_, (rank, by) in zip(pairs, sizes, strict=True)
    ]

    def in_order(*order: int) -> np.ndarray:
        chosen = [adapters[i] for i in order]
        factors_of = [sizes[i][1] for i in order]
        target = DTYPES[dtype].config_name
        return merge({"m.weight": weight}, *chosen, by=factors_of, dtype=target)["m.weight"]

    forward, backward = in_order(0, 1, 2), in_order(2, 1, 0)
    assert_same_bits(forward, reference.merged(weight, deltas, dtype))
    assert_same_bits(backward, reference.merged(weight, deltas[::-1], dtype))
    if dtype == "F32":
        assert np.count_nonzero(forward != backward) > 10  # the order is part of the contract


SCALES: list[tuple[dict[str, Any], float, float]] = [
    ({"r": 3, "lora_alpha": 7}, 1.0, 7 / 3),
    ({"r": 3, "lora_alpha": 7, "use_rslora": True}, 1.0, 7 / 3**0.5),
    ({"r": 8, "lora_alpha": 0.1, "rank_pattern": {"m": 3}}, 0.7, 0.7 * 0.1 / 3),
    ({"r": 3, "alpha_pattern": {"m": 5}, "use_rslora": True}, -1.3, -1.3 * 5 / 3**0.5),
    # halfway between two float32 but for the last bits of float64
    ({"r": 3, "lora_alpha": 1}, 3.0000001788139348, 3.0000001788139348 * 1 / 3),
]
"""A config of rank 3, the adapter's weight, and the scale in float64."""


@pytest.mark.parametrize(("config", "by", "scale"), SCALES)
def test_the_scale_is_float64_rounded_once(config: dict[str, Any], by: float, scale: float) -> None:
    weight = draw(5, 33)
    left, right = factors(5, 33, 3)
    found = merge({"m.weight": weight}, (pair("m", left, right), config), by=[by])
    expected = reference.merged(weight, [(np.float32(scale), left, right)], "F32")
    assert_same_bits(found["m.weight"], expected)


# Any finite values at all, subnormal and huge ones included.


def stored_values(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Return arrays of a stored dtype with any finite bits."""
    kind = STORED[dtype]
    raw = np.uint32 if dtype == "F32" else np.uint16
    numbers = arrays.arrays(raw, shape).map(lambda bits: bits.view(kind))
    return numbers.filter(lambda values: bool(np.isfinite(values.astype(np.float32)).all()))


@st.composite
def problems(draw_: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, str]:
    """Return a weight, B, A, alpha and an output dtype."""
    rows, columns, rank = (draw_(st.integers(1, n)) for n in (3, 5, 9))
    weight = draw_(stored_values(draw_(st.sampled_from(NAMES)), (rows, columns)))
    left = draw_(stored_values("BF16", (rows, rank)))
    right = draw_(stored_values("F32", (rank, columns)))
    alpha = draw_(st.floats(2.0**-100, 2.0**100))
    return weight, left, right, alpha, draw_(st.sampled_from(NAMES))


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(problems())
def test_any_values_give_the_contracts_bytes_or_a_numeric_error(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray, float, str],
) -> None:
    weight, left, right, alpha, dtype = problem
    rank = left.shape[1]
    delta = (scale_of(alpha, rank), left.astype(np.float32), right)
    expected = reference.merged(weight, [delta], dtype)
    adapter = (pair("m", left, right), {"r": rank, "lora_alpha": alpha})
    target = DTYPES[dtype].config_name
    bad = np.count_nonzero(~np.isfinite(expected.astype(np.float32)))
    if bad == 0:
        found = merge({"m.weight": weight}, adapter, dtype=target)
        assert_same_bits(found["m.weight"], expected)
        return
    with pytest.raises(NumericError, match=rf"m\.weight.*found {bad} of {weight.size} "):
        merge({"m.weight": weight}, adapter, dtype=target)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ordinary_values_give_the_contracts_bytes(data: st.DataObject) -> None:
    source, dtype = (data.draw(st.sampled_from(NAMES)) for _ in range(2))
    rows, columns, rank = (data.draw(st.integers(1, n)) for n in (5, 40, 9))
    ordinary = st.floats(-4, 4, width=16)
    weight, left, right = (
        data.draw(arrays.arrays(np.float32, shape, elements=ordinary))
        for shape in ((rows, columns), (rows, rank), (rank, columns))
    )
    stored = weight.astype(STORED[source])
    alpha = data.draw(st.floats(2.0**-6, 8))
    expected = reference.merged(stored, [(scale_of(alpha, rank), left, right)], dtype)
    assume(np.isfinite(expected.astype(np.float32)).all())
    adapter = (pair("m", left, right), {"r": rank, "lora_alpha": alpha})
    found = merge({"m.weight": stored}, adapter, dtype=DTYPES[dtype].config_name)
    assert_same_bits(found["m.weight"], expected)


# Other kinds of layers state an order of their own.


def test_dora_scales_each_row_by_its_magnitude_over_its_norm() -> None:
    weight, (left, right) = draw(7, 600, dtype=STORED["BF16"]), factors(7, 600, 3)
    magnitude = 20 + draw(7)
    key = f"{PREFIX}m.lora_magnitude_vector"
    config = {"r": 3, "lora_alpha": 4, "use_dora": True}
    adapter = ({**pair("m", left, right), key: magnitude}, config)
    found = merge({"m.weight": weight}, adapter, dtype="float32")
    total = reference.add(weight, scale_of(4, 3), left, right)
    norms = np.sqrt(reference.ascending_squares(total))
    factor = (magnitude.astype(np.float64) / norms).astype(np.float32)
    assert_same_bits(found["m.weight"], factor[:, None] * total)


def test_an_embedding_adds_the_transposed_product() -> None:
    table, (b, a) = draw(70, 9, dtype=STORED["F16"]), factors(9, 70, 4)
    key = f"{PREFIX}m"
    tensors = {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
    found = merge({"m.weight": table}, (tensors, {"r": 4, "lora_alpha": 3}))
    expected = reference.merged(table, [(scale_of(3, 4), a.T, b.T)], "F16")
    assert_same_bits(found["m.weight"], expected)


def test_an_embedding_with_dora_takes_its_norms_down_the_columns() -> None:
    table, (b, a) = draw(700, 9), factors(9, 700, 4)
    magnitude = 30 + draw(9)
    key = f"{PREFIX}m"
    tensors = {
        f"{key}.lora_embedding_A": a,
        f"{key}.lora_embedding_B": b,
        f"{key}.lora_magnitude_vector": magnitude,
    }
    found = merge({"m.weight": table}, (tensors, {"r": 4, "lora_alpha": 3, "use_dora": True}))
    total = reference.add(table, scale_of(3, 4), a.T, b.T)
    norms = np.sqrt(reference.ascending_squares(np.ascontiguousarray(total.T)))
    factor = (magnitude.astype(np.float64) / norms).astype(np.float32)
    assert_same_bits(found["m.weight"], factor[None, :] * total)


@pytest.mark.parametrize("size", [(30, 50), (40, 40)])
def test_a_weight_stored_transposed_gets_the_transposed_delta(size: tuple[int, int]) -> None:
    inputs, out = size
    stored, (left, right) = draw(*size, dtype=STORED["BF16"]), factors(out, inputs, 5)
    config = {"r": 5, "lora_alpha": 3, "fan_in_fan_out": True}
    found = merge({"m.weight": stored}, (pair("m", left, right), config))
    expected = reference.merged(stored, [(scale_of(3, 5), right.T, left.T)], "BF16")
    assert_same_bits(found["m.weight"], expected)


@pytest.mark.parametrize("kernel", [(3,), (1,), (3, 2), (1, 1), (2, 3, 1)])
def test_a_convolution_is_a_matrix_of_all_its_kernel_positions(kernel: tuple[int, ...]) -> None:
    weight = draw(6, 5, *kernel, dtype=STORED["BF16"])
    a, b = draw(3, 5, *kernel, seed=1), draw(6, 3, *[1] * len(kernel), seed=2)
    found = merge({"m.weight": weight}, (pair("m", b, a), {"r": 3, "lora_alpha": 2}))
    flat = weight.reshape(6, -1)
    exact = reference.merged(flat, [(scale_of(2, 3), b.reshape(6, 3), a.reshape(3, -1))], "BF16")
    assert_same_bits(found["m.weight"], exact.reshape(weight.shape))


def test_experts_each_get_their_own_slice_of_the_factors() -> None:
    experts, out, inputs, rank = 3, 8, 5, 2
    stack = draw(experts, out, inputs, dtype=STORED["BF16"])
    a, b = draw(experts * rank, inputs, seed=1), draw(out, rank * experts, seed=2)
    config = {"r": rank, "lora_alpha": 3, "target_modules": [], "target_parameters": ["x.stack"]}
    found = merge({"x.stack": stack}, (pair("x", b, a), config))
    for expert in range(experts):
        left = b.reshape(out, rank, experts)[:, :, expert]
        right = a.reshape(experts, rank, inputs)[expert]
        expected = reference.merged(stack[expert], [(scale_of(3, rank), left, right)], "BF16")
        assert_same_bits(found["x.stack"][expert], expected)


def test_a_bias_of_the_second_factor_is_scaled_and_added() -> None:
    weight, bias, (left, right) = draw(6, 5), draw(6, seed=3), factors(6, 5, 3)
    trained = draw(6, seed=4)
    tensors = {**pair("m", left, right), f"{PREFIX}m.lora_B.bias": trained}
    config = {"r": 3, "lora_alpha": 7, "lora_bias": True}
    found = merge({"m.weight": weight, "m.bias": bias}, (tensors, config))
    assert_same_bits(found["m.bias"], reference.fma(scale_of(7, 3), trained, bias))


def test_token_rows_are_rounded_into_place_and_the_rest_stays() -> None:
    table, rows = draw(20, 9, dtype=STORED["BF16"]), draw(2, 9, seed=5)
    tensors = {f"{PREFIX}m.token_adapter.trainable_tokens_delta": rows}
    found = merge({"m.weight": table}, (tensors, {"trainable_token_indices": {"m": [17, 3]}}))
    table[[17, 3]] = rows.astype(STORED["BF16"])
    assert_same_bits(found["m.weight"], table)
