"""How many times a weight holds each of several deltas, and whether that explains it."""

from __future__ import annotations

import numpy as np
import pytest

from regraft.deltas.kernels.agreement import Fit
from regraft.numerics.conversions import KINDS

SIZE = 4096


def fitted(
    held: tuple[float, float], sizes: tuple[float, float], strange: float
) -> tuple[tuple[tuple[float, float], ...], bool] | None:
    """Fit W plus ``held`` times two deltas, plus something strange of a norm.

    Args:
        held: how many times each delta is in the weight.
        sizes: norms of the deltas.
        strange: norm of what no delta explains.
    """
    dice = np.random.default_rng(0)
    weight, *others = dice.standard_normal((4, SIZE))
    one, two, more = (
        each * norm / np.linalg.norm(each)
        for each, norm in zip(others, (*sizes, strange), strict=True)
    )
    whole = weight.astype(np.float32)
    merged = [(whole + each).astype(np.float32) for each in (one, two)]
    stored = (whole + held[0] * one + held[1] * two + more).astype(np.float32)
    fit = Fit(2, KINDS["F32"])
    fit.take(whole, stored, merged)
    return fit.solve()


@pytest.mark.parametrize("held", [(1.0, 1.0), (0.0, 1.0), (2.0, -1.0)])
def test_each_delta_is_counted(held: tuple[float, float]) -> None:
    found = fitted(held, (3.0, 3.0), 0.0)
    assert found is not None
    assert [times for times, _ in found[0]] == pytest.approx(held, abs=1e-4)
    assert found[1]


@pytest.mark.parametrize("sizes", [(30.0, 3.0), (3.0, 30.0)])
@pytest.mark.parametrize(("share", "explained"), [(0.005, True), (0.02, False)])
def test_a_rest_below_a_hundredth_of_all_deltas_is_explained_whichever_is_the_larger(
    sizes: tuple[float, float], share: float, explained: bool
) -> None:
    found = fitted((1.0, 1.0), sizes, share * 30.0)
    assert found is not None
    assert found[1] is explained
