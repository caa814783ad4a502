"""GPTQ weights, held against the formula in plain numpy and against GPTQModel's own values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from regraft.errors import FormatError
from regraft.formats.files.reading import FilePool
from regraft.quant import registry
from regraft.quant.formats import gptq
from regraft.quant.weight import FoundWeights
from regraft.testing.codecs import check_codec, stored

SHAPES = [(32, 32), (64, 96), (96, 32), (160, 64)]
ODD_SHAPES = [(40, 24), (56, 10), (13, 5)]
GROUPS = [-1, 16, 32]

Tensors = dict[str, npt.NDArray[Any]]


def packed(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int32]:
    """Pack codes into words down the columns: the lowest bits first, bit by bit."""
    planes = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    stream = planes.reshape(-1, codes.shape[1])
    stream = np.pad(stream, ((0, -len(stream) % 32), (0, 0))).reshape(-1, 32, codes.shape[1])
    return (stream << np.arange(32)[None, :, None]).sum(1).astype(np.uint32).view(np.int32)


def make(
    inputs: int, outputs: int, bits: int, size: int, *, order: str = "none", sym: bool = True,
    v1: bool = True, scale_dtype: Any = np.float16, seed: int = 0,
) -> tuple[Tensors, npt.NDArray[np.float32]]:  # fmt: skip
    """Return the tensors of a GPTQ weight ``m`` and what it stands for, (out, in).

    Mirrors ``PackableQuantLinear.dequantize_weight`` of GPTQModel:
    ``scales[g_idx] * (weight - zeros[g_idx])``, one product in the dtype of the scales.
    """
    rng = np.random.default_rng(seed)
    size = inputs if size == -1 else size
    count, top = -(-inputs // size), 2**bits
    codes = rng.integers(0, top, (inputs, outputs))
    zeros = rng.integers(1, top, (count, outputs))
    if sym:
        zeros[:] = top // 2
    scales = (rng.standard_normal((count, outputs)) * 0.01).astype(scale_dtype)
    groups = np.arange(inputs) // size
    if order == "act":
        groups = rng.permutation(groups)
    tensors: Tensors = {
        "m.qweight": packed(codes, bits),
        "m.qzeros": packed((zeros - v1).T, bits).T.copy(),
        "m.scales": scales,
    }
    if order != "missing":
        tensors["m.g_idx"] = groups.astype(np.int32)
    exact = scales.astype(np.float64)[groups] * (codes - zeros[groups])
    return tensors, exact.astype(scale_dtype).astype(np.float32).T


def config_of(bits: int, size: int, **more: Any) -> dict[str, Any]:
    """Return a config as GPTQModel writes it."""
    said = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False}
    return {**said, "sym": True, "checkpoint_format": "gptq", **more}


def check(
    folder: Path, tensors: Tensors, config: Mapping[str, Any], expected: npt.NDArray[Any]
) -> None:
    """Check the one weight of a checkpoint."""
    path = folder / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        place = stored([path], config, None, files)
        found = gptq.find(place)
        assert found.problems == ()
        (one,) = found.weights
        assert one.name == "m.weight"
        assert place.read is not None
        check_codec(one, np.ascontiguousarray(expected, np.float32), place.read)


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ["none", "act", "missing"])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_weights_are_what_the_formula_says(
    tmp_path: Path, bits: int, order: str, sym: bool, v1: bool
) -> None:
    kind = "gptq" if v1 else "gptq_v2"
    for shape in SHAPES + ([] if bits == 3 or order == "missing" else ODD_SHAPES):
        for size in GROUPS:
            tensors, expected = make(*shape, bits, size, order=order, sym=sym, v1=v1)
            check(tmp_path, tensors, config_of(bits, size, checkpoint_format=kind), expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_the_dtype_is_that_of_the_scales(tmp_path: Path, dtype: Any) -> None:
    for bits in gptq.BITS:
        tensors, expected = make(64, 32, bits, 16, order="act", sym=False, scale_dtype=dtype)
        check(tmp_path, tensors, config_of(bits, 16), expected)


def test_zeros_of_v1_wrap_as_gptqmodel_adds_the_one(tmp_path: Path) -> None:
    # a zero of 0 is stored as 15 and borrows from the next: words are subtracted as integers
    tensors, _ = make(32, 32, 4, 32, sym=False, seed=3)
    zeros = np.random.default_rng(5).integers(0, 16, (1, 32))
    tensors["m.qzeros"] = (
        packed(zeros.T, 4).T.copy().view(np.uint32) - np.uint32(0x11111111)
    ).view(np.int32)
    codes = unpacked(tensors["m.qweight"], 4)
    expected = (tensors["m.scales"] * (codes - zeros).astype(np.float16)).T
    check(tmp_path, tensors, config_of(4, 32), expected.astype(np.float32))


def unpacked(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.int64]:
    """Return the codes of words of whole codes."""
    shifts = np.arange(0, 32, bits)[None, :, None]
    codes = (words.view(np.uint32)[:, None, :].astype(np.int64) >> shifts) & (2**bits - 1)
    return codes.reshape(-1, words.shape[1])


def test_bits_come_from_the_shapes_where_no_config_is(tmp_path: Path) -> None:
    for bits in gptq.BITS:
        tensors, expected = make(96, 32, bits, 32)
        check(tmp_path, tensors, {}, expected)


def test_modules_may_have_bits_of_their_own(tmp_path: Path) -> None:
    tensors, expected = make(96, 32, 8, 32)
    config = config_of(4, 128, dynamic={"+:.*m": {"bits": 8, "group_size": 32}})
    check(tmp_path, tensors, config, expected)


def search(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> FoundWeights:
    """Look for GPTQ weights in tensors."""
    path = folder / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        return gptq.find(stored([path], config, None, files))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    tensors, _ = make(32, 32, 4, 16)
    del tensors[f"m.{part}"]
    (problem,) = search(tmp_path, tensors, config_of(4, 16)).problems
    assert f"m.{part}" in problem.expected


CHANGES: dict[str, tuple[str, Any, str]] = {
    "truncated codes": ("qweight", lambda a: a[:-1].copy(), "(4, 32)"),
    "codes of another dtype": ("qweight", lambda a: a.astype(np.int64), "I32"),
    "codes with a dimension more": ("qweight", lambda a: a[None], "2, not empty"),
    "too few zeros": ("qzeros", lambda a: a[:, :-1].copy(), "(2, 4)"),
    "too few groups": ("scales", lambda a: a[:-1].copy(), "(2, 32)"),
    "scales of whole numbers": ("scales", lambda a: a.astype(np.int16), "F16"),
    "too many inputs": ("g_idx", lambda a: np.append(a, a), "(8, 32)"),
    "inputs of another dtype": ("g_idx", lambda a: a.astype(np.int64), "I32"),
    "no scales at all": ("scales", lambda a: a[:0], "not empty"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    part, change, expected = CHANGES[case]
    tensors, _ = make(32, 32, 4, 16)
    tensors[f"m.{part}"] = change(tensors[f"m.{part}"])
    found = search(tmp_path, tensors, config_of(4, 16))
    assert found.weights == ()
    assert any(expected in problem.expected for problem in found.problems), found.problems


def test_three_bits_that_end_inside_a_stream_are_refused(tmp_path: Path) -> None:
    tensors, _ = make(64, 32, 3, 32, order="missing")
    tensors["m.qweight"] = tensors["m.qweight"][:5].copy()
    (problem,) = search(tmp_path, tensors, config_of(3, -1)).problems[-1:]
    assert problem.found == "5 words"


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other bits": (config_of(8, 16), "(8, 32)"),
    "another group size": (config_of(4, 8), "(4, 32)"),
    "a whole column": (config_of(4, -1), "(1, 32)"),
    "bits that nobody has": (config_of(5, 16), "2, 3, 4 or 8"),
    "bits that are no number": (config_of(True, 16), "2, 3, 4 or 8"),
    "a group size of zero": (config_of(4, 0), "-1, or 1"),
    "marlin": (config_of(4, 16, checkpoint_format="marlin"), "gptq or gptq_v2"),
    "planar": (config_of(4, 16, checkpoint_format="gptq_p"), "gptq or gptq_v2"),
    "marlin, the old way": (config_of(4, 16, is_marlin_format=True), "gptq or gptq_v2"),
    "small words": (config_of(4, 16, pack_dtype="int16"), "int32"),
    "rotated": (config_of(4, 16, rotation="hadamard"), "no rotation"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_contradicts_is_refused(tmp_path: Path, case: str) -> None:
    config, expected = CONFIGS[case]
    tensors, _ = make(32, 32, 4, 16)
    found = search(tmp_path, tensors, config)
    assert found.weights == ()
    assert any(expected in problem.expected for problem in found.problems), found.problems


def test_every_bad_weight_is_reported(tmp_path: Path) -> None:
    first, _ = make(32, 32, 4, 16)
    tensors = {name.replace("m.", f"{k}."): array for name, array in first.items() for k in "ab"}
    del tensors["a.scales"]
    tensors["b.qzeros"] = tensors["b.qzeros"][:1].copy()
    problems = search(tmp_path, tensors, config_of(4, 16)).problems
    assert [problem.where.rpartition("tensor ")[2] for problem in problems] == [
        "'a.weight'", "'b.qzeros'",
    ]  # fmt: skip


def test_contents_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    tensors, _ = make(32, 32, 4, 16)
    tensors["m.scales"][0, 3] = np.inf
    tensors["m.g_idx"][5:7] = [2, -1]
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        place = stored([path], config_of(4, 16), None, files)
        _, found = registry.find_weights(place)
        with pytest.raises(FormatError, match="groups that are not there") as caught:
            registry.check_contents(found.weights, place)
    assert [problem.found for problem in caught.value.problems] == [
        "1 of 64 are not", "2 of 32 inputs lie outside",
    ]  # fmt: skip


def test_gptq_is_told_by_its_tensors(tmp_path: Path) -> None:
    tensors, _ = make(32, 32, 4, 16)
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        assert registry.method_of(stored([path], {}, None, files)) == "gptq"
