"""Updates that differ from row to row of a batch, against one product per row."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from regraft.runtime.forward.layers import grouped, on_gpu  # noqa: E402
from regraft.runtime.forward.layers.grouped import GroupedLora, lay_out, rank_buckets  # noqa: E402

WIDTH, HEIGHT = 20, 12
EPS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-14}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal values of unit deviation in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs_of(ranks: Sequence[int], dtype: torch.dtype = torch.float64) -> list[grouped.Pair]:
    """Return a random pair of each rank, whose updates are about as large as what is updated."""
    return [
        (random(r, WIDTH, seed=n).to(dtype) / WIDTH**0.5, random(HEIGHT, r, seed=-n - 1).to(dtype))
        for n, r in enumerate(ranks)
    ]


def row_by_row(
    pairs: Sequence[grouped.Pair], rows: Sequence[int | None], x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Return the answer by a loop over rows."""
    updated = []
    for number, taken, before in zip(rows, x, out, strict=True):
        if number is None:
            updated.append(before)
        else:
            a, b = pairs[number]
            updated.append(before + (taken.to(a.dtype) @ a.T @ b.T).to(out.dtype))
    return torch.stack(updated)


CASES: dict[str, tuple[list[int], list[int | None]]] = {
    "one adapter": ([4], [0, 0, 0, 0]),
    "one each": ([4, 4, 4, 4], [0, 1, 2, 3]),
    "in another order": ([4, 4, 4], [2, 0, 1]),
    "runs of one length": ([4, 4], [0, 0, 1, 1]),
    "runs of several lengths": ([4, 4, 4], [0, 0, 0, 0, 0, 1, 2, 2]),
    "scattered": ([4, 4], [0, 1, 0, 1, 1, 0, 0]),
    "a base row among them": ([4, 4], [0, None, 1, 0]),
    "base rows around": ([4, 4], [None, 0, 1, None]),
    "only base rows": ([4], [None, None]),
    "ranks far apart": ([1, 64, 8, 3], [0, 1, 2, 3, 1, None]),
    "an adapter of rank 0": ([0, 2], [0, 1, 0]),
    "an adapter without rows": ([4, 4, 4], [0, 2]),
    "a single row": ([5], [0]),
}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=["flat", "sequence", "image"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_updated_by_their_own_adapter(name: str, shape: tuple[int, ...]) -> None:
    ranks, rows = CASES[name]
    pairs = pairs_of(ranks)
    x, out = random(len(rows), *shape, WIDTH), random(len(rows), *shape, HEIGHT, seed=9)
    expected, before = row_by_row(pairs, rows, x, out), out.clone()
    found = GroupedLora(pairs, rows)(x, out)
    assert found is out
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for row, number in enumerate(rows):
        assert (number is None or ranks[number] == 0) == torch.equal(found[row], before[row])


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_ranks_rows_and_dtypes(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17]), min_size=1, max_size=6))
    number = st.integers(0, len(ranks) - 1)
    rows = data.draw(st.lists(st.none() | number, min_size=1, max_size=9))
    dtype = data.draw(st.sampled_from(sorted(EPS, key=str)))
    of_x = data.draw(st.sampled_from([dtype, torch.float32, torch.bfloat16]))
    pairs = pairs_of(ranks, dtype)
    x = random(len(rows), 3, WIDTH).to(of_x)
    out = random(len(rows), 3, HEIGHT, seed=9).to(of_x)
    expected = row_by_row([(a.double(), b.double()) for a, b in pairs], rows, x, out.double())
    found = GroupedLora(pairs, rows)(x, out.clone())
    assert found.dtype == of_x
    eps = max(EPS[dtype], EPS[of_x]) * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=eps)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_factors_batch_and_answer(name: str) -> None:
    ranks, rows = CASES[name]
    pairs = [(a.requires_grad_(), b.requires_grad_()) for a, b in pairs_of(ranks)]
    x = random(len(rows), 3, WIDTH).requires_grad_()
    out = random(len(rows), 3, HEIGHT, seed=9).requires_grad_()
    leaves = [x, out, *(factor for pair in pairs for factor in pair)]
    weights = random(len(rows), 3, HEIGHT, seed=10)

    def gradients(answer: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad((answer * weights).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]

    before = out.detach().clone()
    found = gradients(GroupedLora(pairs, rows)(x, out))
    assert torch.equal(out, before)
    for mine, naive in zip(found, gradients(row_by_row(pairs, rows, x, out)), strict=True):
        torch.testing.assert_close(mine, naive, rtol=0, atol=1e-12)


def test_trained_factors_are_read_anew_in_each_call() -> None:
    pairs = [(a.requires_grad_(), b.requires_grad_()) for a, b in pairs_of([4, 2])]
    update = GroupedLora(pairs, [0, 1])
    x, out = random(2, WIDTH), random(2, HEIGHT, seed=9)
    update(x, out)
    with torch.no_grad():
        pairs[0][0].mul_(3.0)
        expected = row_by_row(pairs, [0, 1], x, out)
        torch.testing.assert_close(update(x, out.clone()), expected)


def test_frozen_factors_made_in_inference_mode_take_part_in_training() -> None:
    with torch.inference_mode():
        update = GroupedLora(pairs_of([4, 2]), [0, 1])
    x = random(2, WIDTH).requires_grad_()
    update(x, random(2, HEIGHT, seed=9)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0


@pytest.mark.parametrize("of_out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [[0, 1], [1, None, 0]], ids=str)
def test_under_autocast_products_are_in_its_dtype(
    rows: list[int | None], of_out: torch.dtype
) -> None:
    pairs = pairs_of([4, 2], torch.float32)
    x = random(len(rows), 3, WIDTH).float()
    out = random(len(rows), 3, HEIGHT, seed=9).to(of_out)
    expected = row_by_row(pairs, rows, x, out.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = GroupedLora(pairs, rows)(x, out)
    assert found.dtype == of_out
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


def test_an_answer_that_is_not_contiguous_is_updated_in_place() -> None:
    pairs, rows = pairs_of([4, 2]), [0, 1]
    x, out = random(2, 3, WIDTH), random(HEIGHT, 3, 2, seed=9).transpose(0, 2)
    expected = row_by_row(pairs, rows, x, out)
    found = GroupedLora(pairs, rows)(x, out)
    assert found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_call_is_one_graph(name: str) -> None:
    ranks, rows = CASES[name]
    update = GroupedLora(pairs_of(ranks), rows)
    x, out = random(len(rows), 3, WIDTH), random(len(rows), 3, HEIGHT, seed=9)
    expected = update(x, out.clone())
    torch.compiler.reset()
    compiled = torch.compile(lambda x, out: update(x, out + 0.0), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, out), expected)


def test_copies_do_not_share_memory() -> None:
    pairs, rows = pairs_of([4, 2]), [0, 1]
    update = GroupedLora(pairs, rows)
    x, out = random(2, WIDTH), random(2, HEIGHT, seed=9)
    expected = update(x, out.clone())
    copies = [copy.deepcopy(update), pickle.loads(pickle.dumps(update))]
    for pair in pairs:
        for factor in pair:
            factor.zero_()
    for made in copies:
        torch.testing.assert_close(made(x, out.clone()), expected)


# -- the layout ------------------------------------------------------------------------------------


def test_ranks_between_two_powers_of_two_are_one_bucket() -> None:
    assert rank_buckets([16, 9, 8, 5, 4, 1, 0, 17, 2]) == [[5], [8], [4], [2, 3], [0, 1], [7]]


@pytest.mark.parametrize(
    ("rows", "size", "run"),
    [
        ([0, 0, 0, 0], 4, True),
        ([0, 1, 2, 3], 1, True),
        ([0, 0, 1, 1], 2, True),
        ([0, 1, 0, 1], 1, True),
        ([None, 0, 0, None], 2, True),
    ],
)
def test_rows_that_lie_well_are_not_moved(rows: list[int | None], size: int, run: bool) -> None:
    (layout,) = lay_out([8, 8, 8, 8], rows)
    assert (layout.size, layout.is_run) == (size, run)


def test_ranks_are_kept_apart_only_where_that_is_cheaper() -> None:
    interleaved = lay_out([8, 16], [0, 1, 0, 1])
    assert [layout.rank for layout in interleaved] == [16]
    far_apart = lay_out([8, 512], [0, 1, 0, 0])
    assert [layout.rank for layout in far_apart] == [8, 512]


@given(st.lists(st.none() | st.integers(0, 5), max_size=40))
def test_layouts_hold_each_row_once_and_pad_little(rows: list[int | None]) -> None:
    layouts = lay_out([4, 8, 8, 16, 64, 200], rows)
    wanted = [row for row, number in enumerate(rows) if number is not None]
    assert sorted(row for lay in layouts for row in lay.places if row >= 0) == wanted
    for layout in layouts:
        for place, row in enumerate(layout.places):
            assert row < 0 or rows[row] == layout.owners[place // layout.size]
        held = sum(row >= 0 for row in layout.places)
        assert len(layout.places) <= 2 * held


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "rows", "words"),
    [
        (pairs_of([4]), [], "no rows"),
        (pairs_of([4]), [0, 1], "pair 1"),
        (pairs_of([4]), [-1], "pair -1"),
        ([(random(4, WIDTH), random(HEIGHT, 3))], [0], "no pair"),
        ([*pairs_of([4]), (random(4, WIDTH + 1), random(HEIGHT, 4))], [0], "agree"),
    ],
)
def test_what_does_not_fit_is_refused(
    pairs: list[grouped.Pair], rows: list[int | None], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        GroupedLora(pairs, rows)


def test_another_number_of_rows_is_refused_with_both_numbers() -> None:
    update = GroupedLora(pairs_of([4]), [0, 0])
    with pytest.raises(ValueError, match=r"3 rows, and 2"):
        update(random(3, WIDTH), random(3, HEIGHT))


def test_on_a_processor_without_cuda_no_kernels_are_loaded() -> None:
    assert on_gpu.grouped(pairs_of([4], torch.float32), [0]) is None
