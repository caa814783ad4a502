"""AWQ weights, held against the formula in plain numpy and against AutoAWQ's own values."""

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
from regraft.quant.formats import awq
from regraft.quant.weight import FoundWeights
from regraft.testing.codecs import check_codec, stored

SHAPES = [(32, 8), (16, 40), (48, 24), (64, 136), (1, 8)]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""``order_map`` of ``WQLinear_GEMM.from_linear``."""

Tensors = dict[str, npt.NDArray[Any]]


def packed(codes: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Pack codes (rows, outputs), nibble by nibble."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint64)
    for nibble, column in enumerate(ORDER):
        words |= codes[:, column::8].astype(np.uint64) << np.uint64(4 * nibble)
    return words.astype(np.uint32).view(np.int32)


def make(
    inputs: int, outputs: int, size: int, scale_dtype: Any = np.float16
) -> tuple[Tensors, npt.NDArray[np.float32]]:
    """Return the tensors of an AWQ weight ``m`` and what it stands for, (out, in).

    Mirrors ``dequantize_gemm`` of AutoAWQ: ``(iweight - izeros) * scales``, one product in float16.
    """
    rng = np.random.default_rng(0)
    size = inputs if size == -1 else size
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = rng.integers(0, 16, (inputs // size, outputs))
    scales = (rng.standard_normal(zeros.shape) * 0.01).astype(scale_dtype)
    tensors = {"m.qweight": packed(codes), "m.qzeros": packed(zeros), "m.scales": scales}
    groups = np.arange(inputs) // size
    exact = (codes - zeros[groups]) * scales.astype(np.float64)[groups]
    return tensors, exact.astype(scale_dtype).astype(np.float32).T


def config_of(size: int, **more: Any) -> dict[str, Any]:
    """Return a config as transformers writes it."""
    said = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
    return {**said, "version": "gemm", **more}


def check(
    folder: Path, tensors: Tensors, config: Mapping[str, Any], expected: npt.NDArray[Any]
) -> None:
    """Check the one weight of a checkpoint."""
    path = folder / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        place = stored([path], config, None, files)
        found = awq.find(place)
        assert found.problems == ()
        (one,) = found.weights
        assert one.name == "m.weight"
        assert place.read is not None
        check_codec(one, np.ascontiguousarray(expected, np.float32), place.read)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [-1, 8, 16])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_are_what_the_formula_says(
    tmp_path: Path, shape: tuple[int, int], size: int, dtype: Any
) -> None:
    if shape[0] % size:
        pytest.skip("no whole number of groups")
    tensors, expected = make(*shape, size, dtype)
    check(tmp_path, tensors, config_of(size), expected)
    check(tmp_path, tensors, config_of(size, zero_point=False, version="GEMM"), expected)
    check(tmp_path, tensors, {"w_bit": 4, "q_group_size": size}, expected)
    check(tmp_path, tensors, {}, expected)


def search(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> FoundWeights:
    """Look for AWQ weights in tensors."""
    path = folder / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        return awq.find(stored([path], config, None, files))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    tensors, _ = make(32, 16, 16)
    del tensors[f"m.{part}"]
    (problem,) = search(tmp_path, tensors, config_of(16)).problems
    assert f"m.{part}" in problem.expected


CHANGES: dict[str, tuple[str, Any, str]] = {
    "truncated codes": ("qweight", lambda a: a[:, :-1].copy(), "(2, 8)"),
    "codes of another dtype": ("qweight", lambda a: a.astype(np.int64), "I32"),
    "codes with a dimension more": ("qweight", lambda a: a[None], "2 dimensions"),
    "too few zeros": ("qzeros", lambda a: a[:1].copy(), "(2, 2)"),
    "too few groups": ("scales", lambda a: a[:-1].copy(), "(2, 16)"),
    "too few inputs": ("qweight", lambda a: a[:-1].copy(), "a multiple of 16"),
    "scales of whole numbers": ("scales", lambda a: a.astype(np.int16), "F16"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    part, change, expected = CHANGES[case]
    tensors, _ = make(32, 16, 16)
    tensors[f"m.{part}"] = change(tensors[f"m.{part}"])
    found = search(tmp_path, tensors, config_of(16))
    assert found.weights == ()
    assert any(expected in problem.expected for problem in found.problems), found.problems


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other bits": (config_of(16, bits=8), "4"),
    "another group size": (config_of(8), "(4, 16)"),
    "a group size of zero": (config_of(0), "-1, or 1"),
    "gemv": (config_of(16, version="gemv"), "version gemm"),
    "fast gemv": (config_of(16, version="gemv_fast"), "version gemm"),
    "exllama": (config_of(16, version="exllama"), "version gemm"),
    "marlin": (config_of(16, version="marlin"), "version gemm"),
    "llm-awq": ({"quant_method": "awq", "format": "llm-awq"}, "version gemm"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_contradicts_is_refused(tmp_path: Path, case: str) -> None:
    config, expected = CONFIGS[case]
    tensors, _ = make(32, 16, 16)
    found = search(tmp_path, tensors, config)
    assert found.weights == ()
    assert any(expected in problem.expected for problem in found.problems), found.problems


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    tensors, _ = make(32, 16, 16)
    tensors["m.scales"][1, 3] = np.nan
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    with FilePool() as files:
        place = stored([path], config_of(16), None, files)
        method, found = registry.find_weights(place)
        assert method == "awq"
        with pytest.raises(FormatError, match="1 of 32 are not"):
            registry.check_contents(found.weights, place)
