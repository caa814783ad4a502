"""The kernels for graphics processors; by triton's interpreter where there is no such processor.

The interpreter has no dot product of bfloat16 and rounds to it in another way, so bits of 16-bit
results are compared on a graphics processor only. What the compiler makes of the merge can be
looked at anywhere.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch")
CUDA = torch.cuda.is_available()
triton = pytest.importorskip("triton")
tl = triton.language

from deltas import reference  # noqa: E402
from regraft.runtime.forward.layers import grouped, on_gpu, triton_kernels  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
EPS = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@pytest.fixture(autouse=True)
def _products_that_the_interpreter_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        monkeypatch.setitem(triton_kernels.PRODUCT_DTYPES, torch.bfloat16, tl.float32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal values of unit deviation."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pairs_of(
    ranks: Sequence[int], width: int, height: int, dtype: torch.dtype
) -> list[grouped.Pair]:
    """Return a random pair of each rank, each in memory of its own."""
    return [
        (random(r, width, seed=n).to(dtype) / width**0.5, random(height, r, seed=50 + n).to(dtype))
        for n, r in enumerate(ranks)
    ]


# -- updates of rows -------------------------------------------------------------------------------

ROWS: list[int | None] = [0, None, 2, 1, 2, 3, None, 0, 2]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 15)], ids=["flat", "sequence", "image"])
def test_rows_are_updated_by_their_own_adapter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pairs = pairs_of([1, 16, 40, 3], 700, 130, dtype)
    x = random(len(ROWS), *shape, 700).to(dtype)
    out = random(len(ROWS), *shape, 130, seed=9).to(dtype)
    expected, before = out.double(), out.clone()
    for row, number in enumerate(ROWS):
        if number is not None:
            a, b = (factor.double() for factor in pairs[number])
            expected[row] += x[row].double() @ a.T @ b.T
    found = triton_kernels.SegmentedLora(pairs, ROWS)(x, out)
    assert found is out
    eps = EPS[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=eps)
    assert torch.equal(found[1], before[1])
    assert torch.equal(found[6], before[6])


def test_dtypes_of_batch_factors_and_answer_may_differ() -> None:
    pairs = pairs_of([4, 8], 70, 30, torch.float32)
    x, out = random(2, 3, 70).half(), random(2, 3, 30, seed=9).bfloat16()
    expected = grouped.GroupedLora(pairs, [1, 0])(x, out.clone())
    found = triton_kernels.SegmentedLora(pairs, [1, 0])(x, out)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.13)


def test_an_answer_that_is_not_contiguous_is_updated_in_place() -> None:
    pairs = pairs_of([4, 8], 70, 30, torch.float32)
    x, out = random(2, 3, 70), random(30, 3, 2, seed=9).transpose(0, 2)
    expected = grouped.GroupedLora(pairs, [1, 0])(x, out.clone())
    found = triton_kernels.SegmentedLora(pairs, [1, 0])(x, out)
    assert found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


def test_copies_point_to_their_own_factors() -> None:
    pairs = pairs_of([4], 70, 30, torch.float32)
    update = triton_kernels.SegmentedLora(pairs, [0])
    x, out = random(1, 70), random(1, 30, seed=9)
    expected = update(x, out.clone())
    made = copy.deepcopy(update)
    for factor in pairs[0]:
        factor.zero_()
    torch.testing.assert_close(made(x, out.clone()), expected)
    assert torch.equal(update(x, out.clone()), out)


def test_the_inner_dimension_is_split_only_where_tiles_are_few() -> None:
    assert triton_kernels._splits(1, 4096) == triton_kernels.MAX_SPLITS
    assert triton_kernels._splits(1, 100) == 1
    assert triton_kernels._splits(triton_kernels.BUSY, 4096) == 1


# -- the merge -------------------------------------------------------------------------------------

SCALES = (1.5, -0.3)


def merged_by_reference(
    weight: torch.Tensor, pairs: Sequence[grouped.Pair], dtype: torch.dtype
) -> np.ndarray:
    """Return the result that docs/arithmetic.md asks for."""
    deltas = [
        (np.float32(scale), b.float().cpu().numpy(), a.float().cpu().numpy())
        for scale, (a, b) in zip(SCALES, pairs, strict=True)
    ]
    return reference.merged(weight.float().cpu().numpy(), deltas, NAMES[dtype])


def as_numpy(values: torch.Tensor) -> np.ndarray:
    """Return a tensor as numpy has it, bfloat16 too."""
    values = values.cpu()
    if values.dtype != torch.bfloat16:
        return values.numpy()
    return values.view(torch.int16).numpy().view(reference.STORED["BF16"])


def weight_of(dtype: torch.dtype) -> torch.Tensor:
    """Return a weight (70, 300) with zeros, subnormal and large numbers in it."""
    weight = random(70, 300, seed=3)
    weight[0], weight[2] = 0.0, 3e4
    if CUDA or dtype != torch.bfloat16:  # of which the interpreter misreads subnormal numbers
        weight[1] = 1e-40
    return weight.to(dtype)


def fuses() -> bool:
    """Whether the interpreter's fma rounds once, as a processor's does."""

    @triton.jit
    def one(to, a, c):  # type: ignore[no-untyped-def]
        at = tl.arange(0, 1)
        a, c = tl.load(a + at), tl.load(c + at)
        tl.store(to + at, tl.fma(a, a, c))

    to = torch.zeros(1, device=DEVICE)
    one[(1,)](to, torch.tensor([1 + 2**-12], device=DEVICE), -torch.tensor([1 + 2**-11]).to(DEVICE))
    return float(to) == 2**-24


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_to_float32_has_the_bits_of_the_contract(
    transposed: bool, dtype: torch.dtype
) -> None:
    if not fuses():
        pytest.skip("this interpreter's fma rounds twice")
    weight, pairs = weight_of(dtype), pairs_of([9, 4], 300, 70, torch.bfloat16)
    expected = merged_by_reference(weight, pairs, torch.float32)
    weight = weight.t().contiguous().t() if transposed else weight
    found = triton_kernels.merge(
        weight, pairs, SCALES, torch.empty_like(weight, dtype=torch.float32)
    )
    reference.assert_same_bits(np.ascontiguousarray(as_numpy(found)), expected)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_a_merge_in_place_is_right_to_rounding(dtype: torch.dtype) -> None:
    weight, pairs = weight_of(dtype)[3:], pairs_of([9, 4], 300, 67, torch.bfloat16)
    expected = merged_by_reference(weight, pairs, torch.float32)
    found = triton_kernels.merge(weight, pairs, SCALES)
    assert found is weight
    step = torch.finfo(dtype).eps * np.maximum(np.abs(expected), 2**-14)
    assert (np.abs(found.float().cpu().numpy() - expected) <= step).all()


@pytest.mark.skipif(not CUDA, reason="the interpreter rounds to 16 bits in another way")
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", [(70, 300), (1, 1), (513, 1025)])
def test_a_merge_on_the_processor_has_the_bits_of_the_contract(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random(*shape, seed=3).to(dtype)
    weight.view(-1)[::7] *= 1e-6
    pairs = pairs_of([33, 4], shape[1], shape[0], torch.bfloat16)
    expected = merged_by_reference(weight, pairs, dtype)
    reference.assert_same_bits(as_numpy(triton_kernels.merge(weight, pairs, SCALES)), expected)


def test_a_result_that_is_laid_out_in_another_way_is_refused() -> None:
    weight = random(4, 6)
    with pytest.raises(ValueError, match="strides"):
        triton_kernels.merge(weight, [], [], torch.empty(6, 4, device=DEVICE).t())


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from regraft.runtime.forward.layers.triton_kernels import _merge
sizes = {"ADAPTERS": 2, "ROWS": 32, "COLUMNS": 128}
types = ["*KIND"] * 2 + ["*i64"] * 2 + ["*i32", "*fp32"] + ["i32"] * 4 + ["constexpr"] * 3
names = _merge.arg_names
source = ASTSource(
    _merge, dict(zip(names, types, strict=True)), {(names.index(k),): v for k, v in sizes.items()}
)
print(compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("kind", "conversions"),
    [
        ("fp32", set()),
        ("bf16", {"cvt.f32.bf16", "cvt.rn.bf16.f32"}),
        ("fp16", {"cvt.f32.f16", "cvt.rn.f16.f32"}),
    ],
)
def test_the_compiled_merge_holds_no_other_operations(kind: str, conversions: set[str]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("KIND", kind)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ptx = done.stdout
    of_floats = set(re.findall(r"^\s*(?:@\S+\s+)?(\w+\.\S*(?:f32|f16|bf16)\S*)\s", ptx, re.M))
    assert of_floats == {"fma.rn.f32"} | conversions


# -- which of the two is used ----------------------------------------------------------------------


def test_tensors_that_are_not_on_one_cuda_device_are_left_to_torch() -> None:
    pairs = [tuple(factor.cpu() for factor in p) for p in pairs_of([4], 8, 8, torch.float32)]
    assert on_gpu.grouped(pairs, [0]) is None


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_on_cuda_kernels_give_what_torch_gives() -> None:
    pairs = pairs_of([4, 16, 8], 256, 192, torch.bfloat16)
    rows = [0, 1, None, 2, 1]
    update = grouped.GroupedLora(pairs, rows)
    assert isinstance(update._on_gpu, triton_kernels.SegmentedLora)
    x, out = random(5, 33, 256).bfloat16(), random(5, 33, 192, seed=9).bfloat16()
    by_torch = grouped.GroupedLora([(a.cpu(), b.cpu()) for a, b in pairs], rows)
    expected = by_torch(x.cpu(), out.cpu())
    torch.testing.assert_close(update(x, out).cpu().float(), expected.float(), rtol=0, atol=0.2)
