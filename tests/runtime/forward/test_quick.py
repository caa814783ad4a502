"""Fixed deltas added where outputs lie: one token at a time, or many."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.runtime.forward.layers import quick
from regraft.runtime.forward.layers.quick import FEW, Quick, quick_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROCESSORS = ((), (torch.float16,), (torch.bfloat16, torch.float16))
"""What processors may be without: products of matrices in these dtypes."""


def values(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 2 * FEW),
    inputs=st.integers(1, 700),
    outputs=st.integers(1, 1100),
    rank=st.integers(1, 20),
    model=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    cut=st.booleans(),
    without=st.sampled_from(PROCESSORS),
    is_kept=st.booleans(),
)
def test_a_delta_is_what_it_is_in_float64(
    tokens: int, inputs: int, outputs: int, rank: int, model: torch.dtype, stored: torch.dtype,
    cut: bool, without: tuple[torch.dtype, ...], is_kept: bool,
) -> None:  # fmt: skip
    a, b = values(rank, inputs, dtype=stored, seed=1), values(outputs, rank, dtype=stored, seed=2)
    x = values(1, tokens, inputs, dtype=model, seed=3)
    before = values(1, tokens, outputs, dtype=model, seed=4)
    out = before.clone()
    rows = (outputs // 3, outputs // 3 + (outputs + 1) // 2) if cut else None
    low, high = rows or (0, outputs)
    exact = out.double()
    exact[..., low:high] += 0.3 * (x.double() @ a.double().T @ b.double().T)[..., low:high]
    with patch.object(quick, "WITHOUT_PRODUCTS", without):
        Quick(a, b[low:high], 0.3, rows, is_kept=is_kept).add(x, out)
    # some roundings of the delta's parts, and one of the result
    step = max(torch.finfo(model).eps, torch.finfo(stored).eps if stored != torch.float32 else 0)
    size = 0.3 * (x.double().abs() @ a.double().abs().T @ b.double().abs().T).max()
    assert (out.double() - exact).abs().max() <= 4 * step * (size + exact.abs().max())
    assert torch.equal(out[..., :low], before[..., :low])


@pytest.mark.parametrize("model", DTYPES)
def test_outputs_that_are_not_contiguous_are_added_to(model: torch.dtype) -> None:
    a, b = values(3, 6, dtype=torch.float32, seed=1), values(5, 3, dtype=torch.float32, seed=2)
    x = values(2, 4, 6, dtype=model, seed=3)
    out = torch.zeros(2, 5, 4, dtype=model).transpose(1, 2)
    Quick(a, b, 1.0, None).add(x, out)
    expected = x.double() @ a.double().T @ b.double().T
    assert (out.double() - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("without", PROCESSORS)
@pytest.mark.parametrize("model", DTYPES)
def test_a_pair_that_is_kept_adds_the_same_each_time(
    model: torch.dtype, without: tuple[torch.dtype, ...]
) -> None:
    a, b = values(3, 6, dtype=torch.float32, seed=1), values(5, 3, dtype=torch.float32, seed=2)
    before = values(1, 1, 5, dtype=model, seed=4)
    x, outs = values(1, 1, 6, dtype=model, seed=3), [before.clone() for _ in range(3)]
    with patch.object(quick, "WITHOUT_PRODUCTS", without):
        pair = Quick(a, b, 0.3, None)
        pair.add(x, outs[0])
        pair.add(values(4 * FEW, 6, dtype=model, seed=5), values(4 * FEW, 5, dtype=model, seed=6))
        pair.add(x, outs[1])
        with torch.autocast("cpu", torch.bfloat16):
            pair.add(x, outs[2])
    assert not torch.equal(outs[0], before)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[2], outs[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16])
def test_many_tokens_are_computed_in_16_bits_where_the_processor_multiplies_them(
    model: torch.dtype,
) -> None:
    one, many = torch.zeros(1, 1, 6, dtype=model), torch.zeros(4 * FEW, 6, dtype=model)
    with patch.object(quick, "WITHOUT_PRODUCTS", ()):
        assert (quick_dtype(one, one), quick_dtype(many, many)) == (torch.float32, model)
    with patch.object(quick, "WITHOUT_PRODUCTS", (model,)):
        assert (quick_dtype(one, one), quick_dtype(many, many)) == (torch.float32, torch.float32)
