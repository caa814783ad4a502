"""``ties`` and ``dare_ties`` into the weights are mergekit's, on the same masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from merging.method_cases import drawn
from merging.toys import load, write_base

torch = pytest.importorskip("torch")
mergekit: Any = pytest.importorskip(
    "mergekit.merge_methods.generalized_task_arithmetic", reason="mergekit is not installed"
)

SHAPE, DENSITY, WEIGHTS = (41, 77), 0.3, (1.0, 0.7, -0.4)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [
        toys.write_adapter(tmp_path / f"a{seed}", toys.lora("w", *SHAPE, 4, seed), r=4,
                           target_modules=["w"])
        for seed in (1, 11, 21)
    ]  # fmt: skip


def task_vectors(adapters: list[Path], tmp_path: Path) -> list[Any]:
    """Return each adapter's delta: what its merge into zeros is."""
    return [torch.from_numpy(into_zeros(tmp_path, f"own{i}", a)) for i, a in enumerate(adapters)]


def into_zeros(tmp_path: Path, name: str, adapters: Any, **options: Any) -> np.ndarray:
    """Return a merge into a base of zeros: what is added to any other one."""
    base = tmp_path / "zeros"
    if not base.exists():
        write_base(base, {"w.weight": np.zeros(SHAPE, np.float32)}, None)
    regraft.merge(base, adapters, tmp_path / name, **options)
    return load(tmp_path / name)["w.weight"]


def of_mergekit(method: str, vectors: list[Any], **parameters: Any) -> np.ndarray:
    """Return what mergekit adds to a base of zeros."""
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    group = TensorGroup.from_tensors([torch.zeros(SHAPE), *vectors], base_index=0)
    ids = [entry.id for entry in group.non_base]
    shared = {"int8_mask": False, "lambda": 1.0, "rescale": False, **parameters}
    each = {
        "weight": dict(zip(ids, WEIGHTS, strict=True)), "density": dict.fromkeys(ids, DENSITY),
    }  # fmt: skip
    found: np.ndarray = get(method).merge_group(group, **shared, **each).numpy()
    return found


def test_ties_is_that_of_mergekit(adapters: list[Path], tmp_path: Path) -> None:
    theirs = of_mergekit("ties", task_vectors(adapters, tmp_path), normalize=True)
    given = list(zip(adapters, WEIGHTS, strict=True))
    ours = into_zeros(tmp_path, "out", given, method="ties", density=DENSITY)
    assert np.array_equal(ours != 0, theirs != 0)
    np.testing.assert_allclose(ours, theirs, rtol=3e-7)


def test_dare_ties_is_that_of_mergekit_on_the_same_masks(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit scales by the L1 norm, where the paper and regraft divide by the density."""
    numbers = iter(range(len(adapters)))

    def bernoulli(chance: Any) -> Any:
        stays = drawn(5, "w[0]", next(numbers), SHAPE) < chance.numpy()
        return torch.from_numpy(stays.astype(np.float32))

    vectors = task_vectors(adapters, tmp_path)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    theirs = of_mergekit("dare_ties", vectors, normalize=False)
    given = list(zip(adapters, WEIGHTS, strict=True))
    ours = into_zeros(tmp_path, "out", given, method="dare_ties", density=DENSITY, seed=5)
    assert np.array_equal(ours != 0, theirs != 0)
    np.testing.assert_allclose(ours * DENSITY, theirs, rtol=1e-6)
