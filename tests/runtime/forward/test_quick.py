"""Fixed deltas added where outputs lie: one token at a time, or many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.runtime.forward.layers.quick import FEW, Quick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
)
def test_a_delta_is_what_it_is_in_float64(
    tokens: int, inputs: int, outputs: int, rank: int, model: torch.dtype, stored: torch.dtype,
    cut: bool,
) -> None:  # fmt: skip
    a, b = values(rank, inputs, dtype=stored, seed=1), values(outputs, rank, dtype=stored, seed=2)
    x = values(1, tokens, inputs, dtype=model, seed=3)
    before = values(1, tokens, outputs, dtype=model, seed=4)
    out = before.clone()
    rows = (outputs // 3, outputs // 3 + (outputs + 1) // 2) if cut else None
    low, high = rows or (0, outputs)
    exact = out.double()
    exact[..., low:high] += 0.3 * (x.double() @ a.double().T @ b.double().T)[..., low:high]
    Quick(a, b[low:high], 0.3, rows).add(x, out)
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
