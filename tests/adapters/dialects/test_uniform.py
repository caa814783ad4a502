"""The uniform form, and round trips, over ranks, dtypes, scales and shapes that nobody chose."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import regraft
from merging import toys
from regraft.adapters.dialects.form import Kind, LoraModule, Moved, PlainAdapter
from regraft.adapters.dialects.uniform import uniform_form
from regraft.formats.files.reading import FilePool

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(toys.BF16)}
SCALES = st.one_of(
    st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0]),
    st.floats(1e-3, 30, allow_nan=False, allow_infinity=False),
)
SEVERAL = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=12, deadline=None)


def moved(values: np.ndarray, dtype: str) -> Moved:
    """Return a tensor in memory."""
    bits = values.astype(DTYPES[dtype]).view(f"<u{DTYPES[dtype].itemsize}")
    return Moved(dtype, values.shape, (), lambda: bits)


def read(tensor: Moved) -> np.ndarray:
    with FilePool() as files:
        return tensor.bits(files).view(DTYPES[tensor.dtype]).astype(np.float64)


def _shapes(kind: Kind, rank: int, out: int, inputs: int) -> tuple[tuple[int, ...], ...]:
    return {
        "linear": ((rank, inputs), (out, rank)),
        "embedding": ((rank, inputs), (out, rank)),
        "convolution": ((rank, inputs, 3, 1), (out, rank, 1, 1)),
        "experts": ((2, rank, inputs), (2, out, rank)),
    }[kind]  # fmt: skip


@st.composite
def modules(draw: Any, kinds: tuple[Kind, ...]) -> LoraModule:
    """Any module, with or without a bias and magnitudes."""
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    rank, out, inputs = (draw(st.integers(1, 7)) for _ in range(3))
    shape_a, shape_b = _shapes(kind, rank, out, inputs)
    seed = draw(st.integers(0, 99))
    plain = kind == "linear"
    bias = moved(toys.draw(out, seed=seed + 2), dtype) if plain and draw(st.booleans()) else None
    norms = moved(toys.draw(out, seed=seed + 3), dtype) if plain and draw(st.booleans()) else None
    return LoraModule(
        f"m{draw(st.integers(0, 10**6))}", rank, draw(SCALES),
        moved(toys.draw(*shape_a, seed=seed), dtype),
        moved(toys.draw(*shape_b, seed=seed + 1), dtype), kind, bias, norms,
    )  # fmt: skip


ALL: tuple[Kind, ...] = ("linear", "embedding", "convolution", "experts")


def deltas(module: LoraModule) -> np.ndarray:
    """Return the products of single elements of B and A: (..., out, r, in), in float64.

    A sum of them would be rounded, and could hide what differs.
    """
    a, b = read(module.a), read(module.b)
    if module.kind == "experts":
        found = b[..., None] * a[:, None]
    else:
        found = b.reshape(*b.shape[:2], 1) * a.reshape(1, a.shape[0], -1)
    return np.asarray(found * 1.0)


@SEVERAL
@given(st.lists(modules(ALL), min_size=1, max_size=4))
def test_one_rank_one_scale_and_the_same_deltas(found: list[LoraModule]) -> None:
    folded, error = uniform_form(PlainAdapter(tuple(found)))
    ranks = {module.rank for module in folded.modules}
    assert ranks == {max(module.rank for module in found)}
    assert {module.scale for module in folded.modules} == {1.0}
    assert 0 <= error <= 2**-24
    for before, after in zip(found, folded.modules, strict=True):
        axis = 1 if before.kind != "experts" else 2
        whole, kept = read(after.b), read(before.b)
        filled = np.take(whole, range(before.rank, after.rank), axis)
        assert not filled.any()
        exact = kept * before.scale
        stored = np.take(whole, range(before.rank), axis)
        if error == 0 or after.b.dtype != "F32":
            assert np.array_equal(stored, exact)
        assert np.array_equal(stored, exact.astype(np.float32))  # once rounded, and no further
        a, padded = read(before.a), read(after.a)
        rows = 0 if before.kind != "experts" else 1
        assert np.array_equal(np.take(padded, range(before.rank), rows), a)
        assert not np.take(padded, range(before.rank, after.rank), rows).any()


@SEVERAL
@given(st.lists(modules(ALL), min_size=1, max_size=4), st.integers(-3, 3))
def test_powers_of_two_change_no_bit(found: list[LoraModule], power: int) -> None:
    from dataclasses import replace

    scaled = [replace(module, scale=2.0**power) for module in found]
    folded, error = uniform_form(PlainAdapter(tuple(scaled)))
    assert error == 0
    for before, after in zip(scaled, folded.modules, strict=True):
        expected, got = deltas(before) * before.scale, deltas(after)
        assert np.array_equal(got[..., : before.rank, :], expected)
        assert not got[..., before.rank :, :].any()


@SEVERAL
@given(modules(("linear",)))
def test_biases_get_the_scale_and_magnitudes_stay(module: LoraModule) -> None:
    folded, _ = uniform_form(PlainAdapter((module,)))
    after = folded.modules[0]
    assert after.magnitude is module.magnitude
    assert (after.bias is None) == (module.bias is None)
    if module.bias is not None and after.bias is not None:
        exact = read(module.bias) * module.scale
        assert np.array_equal(read(after.bias), exact.astype(np.float32))


def test_a_product_that_no_float32_holds_is_refused() -> None:
    from regraft.adapters.dialects.uniform import UniformError

    big = moved(np.full((4, 2), 1e38, np.float32), "F32")
    module = LoraModule("m", 2, 100.0, moved(toys.draw(2, 3), "F32"), big)
    with pytest.raises(UniformError, match="m"):
        uniform_form(PlainAdapter((module,)))


# -- there and back --------------------------------------------------------------------------------


@contextmanager
def folder() -> Iterator[Path]:
    """A folder of its own for every example."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def adapters(
    draw: Any, shapes: dict[str, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Factors of some modules in any dtype, and a config with patterns."""
    chosen = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=5, unique=True))
    tensors: dict[str, Any] = {}
    ranks, alphas = {}, {}
    for number, name in enumerate(chosen):
        rank = draw(st.integers(1, 9))
        ranks[name], alphas[name] = rank, draw(st.sampled_from([1, 3, 7.5, 16, 0.1]))
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        found = toys.lora(name, *shapes[name], rank, 2 * number)
        tensors |= {key: value.astype(dtype) for key, value in found.items()}
    config = {
        "target_modules": chosen, "rank_pattern": ranks, "alpha_pattern": alphas,
        "use_rslora": draw(st.booleans()),
    }  # fmt: skip
    return tensors, config


LLAMA = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(toys.LAYERS)
    for name, shape in {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16),
        "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    }.items()
}  # fmt: skip
UNET = {f"down_blocks.{i}.attentions.0.{n}": (8, 8) for i in range(3) for n in ("to_q", "proj_in")}


def _back_and_forth(to: str, base: Path, source: Path, place: Path) -> tuple[Any, Any]:
    regraft.convert(source, place / "there", to=to, base=base)
    regraft.convert(place / "there", place / "back", base=base)
    weights = "adapter_model.safetensors"
    return load_file(source / weights), load_file(place / "back" / weights)


def _same(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert value.tobytes() == after[name].tobytes()


@FEW
@given(adapters(UNET), st.sampled_from(["kohya", "diffusers"]))
def test_image_dialects_keep_every_bit_and_every_scale(
    made: tuple[dict[str, Any], dict[str, Any]], to: str
) -> None:
    tensors, config = made
    with folder() as place:
        shaped = {f"{name}.weight": toys.draw(*shape) for name, shape in UNET.items()}
        base = toys.write_base(place / "unet", shaped, {"_class_name": "UNet2DConditionModel"})
        peft = toys.write_adapter(place / "peft", tensors, **config)
        _same(*_back_and_forth(to, base, peft, place))
        for name, adapter in (("one", peft), ("other", place / "there")):
            regraft.merge(base, adapter, place / name)
        _same(toys.load(place / "one"), toys.load(place / "other"))


@FEW
@given(adapters(LLAMA), st.sampled_from(["gguf", "mlx"]))
def test_dialects_of_one_scale_keep_every_bit_of_the_uniform_form(
    made: tuple[dict[str, Any], dict[str, Any]], to: str
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    tensors, config = made
    with folder() as place:
        base = toys.write_base(place / "base")
        peft = toys.write_adapter(place / "peft", tensors, **config)
        regraft.convert(peft, place / "uniform", uniform=True)
        _same(*_back_and_forth(to, base, place / "uniform", place))
        for name, adapter in (("one", place / "uniform"), ("other", place / "there")):
            regraft.merge(base, adapter, place / name)
        _same(toys.load(place / "one"), toys.load(place / "other"))
