"""``regraft.extract``: adapters out of fine-tuned models, and out of merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys


def tuned_like(base: Path, folder: Path, rank: int = 3, **more: Any) -> Path:
    """Write a model that differs from the base by a matrix of low rank for each linear layer."""
    rng = np.random.default_rng(0)
    tensors = toys.load(base)
    for name, values in tensors.items():
        if name.endswith("_proj.weight"):
            out, width = values.shape
            delta = rng.standard_normal((out, rank)) @ rng.standard_normal((rank, width)) / 8
            tensors[name] = (values.astype(np.float64) + delta).astype(values.dtype)
    return toys.write_base(folder, tensors | more)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base", toys.llama_tensors(np.float32))


def test_a_fine_tune_of_low_rank_comes_back(base: Path, tmp_path: Path) -> None:
    tuned = tuned_like(base, tmp_path / "tuned")
    report = regraft.extract(base, tuned, tmp_path / "a", max_error=1e-4, dtype="float32")
    assert {module.rank for module in report.modules} == {3}
    assert report.error < 1e-6
    regraft.merge(base, tmp_path / "a", tmp_path / "m")
    new, expected = toys.load(tmp_path / "m"), toys.load(tuned)
    for name, values in expected.items():
        assert np.allclose(new[name], values, atol=1e-5), name


def test_norms_travel_whole_and_untouched_tensors_do_not(base: Path, tmp_path: Path) -> None:
    norm = toys.load(base)["model.norm.weight"] + np.float32(0.5)
    tuned = tuned_like(base, tmp_path / "tuned", **{"model.norm.weight": norm})
    report = regraft.extract(base, tuned, tmp_path / "a")
    assert report.whole == ("model.norm.weight",)
    assert np.array_equal(toys.load(tmp_path / "a")[f"{toys.PREFIX}model.norm.weight"], norm)
    assert not any("embed" in name for name in toys.load(tmp_path / "a"))


def test_a_lower_rank_is_within_a_thousandth_of_the_best_and_loud(
    base: Path, tmp_path: Path
) -> None:
    tuned = tuned_like(base, tmp_path / "tuned", rank=20)
    report = regraft.extract(base, tuned, tmp_path / "a", rank=4, dtype="float32")
    old, new = toys.load(base), toys.load(tuned)
    for module in report.modules:
        name = f"{module.name}.weight"
        s = np.linalg.svd(new[name].astype(np.float64) - old[name], compute_uv=False)
        best = np.sqrt(np.sum(s[4:] ** 2))
        assert module.error_norm <= 1.001 * best + 1e-6 * s[0]
    assert "not of low rank" in report.warnings[0]


def test_rounding_of_the_fine_tuned_weights_is_told(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base")  # bfloat16
    tuned = tuned_like(base, tmp_path / "tuned")
    report = regraft.extract(base, tuned, tmp_path / "a", rank=3, dtype="float32")
    old, new = toys.load(base), toys.load(tuned)
    assert 0 < report.uncertain < 0.1
    assert report.error == pytest.approx(report.uncertain, rel=0.5)
    assert {str(old[n].dtype) for n in new} == {"bfloat16"}


def test_only_the_modules_that_were_asked_for(base: Path, tmp_path: Path) -> None:
    tuned = tuned_like(base, tmp_path / "tuned")
    report = regraft.extract(base, tuned, tmp_path / "a", modules=["q_proj"])
    assert {module.name.rpartition(".")[2] for module in report.modules} == {"q_proj"}
    assert any("v_proj" in name for name in report.left_out)
    assert "left out" in " ".join(report.warnings)


def test_from_a_merge_the_adapter_comes_out_exactly(base: Path, tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "adapter", toys.attention())
    regraft.merge(base, adapter, tmp_path / "m")
    report = regraft.extract(base, tmp_path / "m", tmp_path / "a")
    assert report.exact
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (adapter / name).read_bytes()


def test_a_merge_that_was_changed_since_is_looked_at_as_any_model(
    base: Path, tmp_path: Path
) -> None:
    adapter = toys.write_adapter(tmp_path / "adapter", toys.attention())
    regraft.merge(base, adapter, tmp_path / "m")
    held = toys.load(tmp_path / "m")
    held["model.norm.weight"] = held["model.norm.weight"] + np.float32(1)
    from safetensors.numpy import save_file

    save_file(held, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    report = regraft.extract(base, tmp_path / "m", tmp_path / "a", rank=4)
    assert not report.exact
    assert "model.norm.weight" in report.whole


def test_large_matrices_are_read_anew_in_each_pass(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuned_like(base, tmp_path / "tuned")
    regraft.extract(base, tuned, tmp_path / "a", dtype="float32", rank=3)
    monkeypatch.setattr("regraft.extracting.differences.HELD_BYTES", 0)
    monkeypatch.setattr("regraft.extracting.differences.BAND_BYTES", 512)
    regraft.extract(base, tuned, tmp_path / "b", dtype="float32", rank=3)
    one, other = toys.load(tmp_path / "a"), toys.load(tmp_path / "b")
    for name, values in one.items():
        assert np.allclose(values, other[name], atol=1e-4), name


def test_a_quantized_base_is_read(base: Path, tmp_path: Path) -> None:
    tuned = tuned_like(base, tmp_path / "tuned")
    regraft.dequantize  # noqa: B018  (the plain twin of the quantized base is read below)
    regraft.quantize(base, tmp_path / "int8", "int8")
    regraft.dequantize(tmp_path / "int8", tmp_path / "plain")
    both = [
        regraft.extract(tmp_path / b, tuned, tmp_path / f"a-{b}", rank=4) for b in ("int8", "plain")
    ]
    assert both[0].error == pytest.approx(both[1].error, rel=1e-6)


def refused(kind: type[Exception], tmp_path: Path, *args: Any, **options: Any) -> str:
    before = toys.tree(tmp_path)
    with pytest.raises(kind) as caught:
        regraft.extract(*args, **options)
    assert toys.tree(tmp_path) == before
    return str(caught.value)


def test_models_of_different_kinds_are_refused_with_every_tensor(
    base: Path, tmp_path: Path
) -> None:
    tensors = toys.load(base)
    other = {n.replace("layers.0", "layers.7"): v for n, v in tensors.items()}
    tuned = toys.write_base(tmp_path / "tuned", other)
    said = refused(regraft.MismatchError, tmp_path, base, tuned, tmp_path / "a")
    assert "model.layers.0.self_attn.q_proj.weight" in said


def test_nothing_to_extract_is_said(base: Path, tmp_path: Path) -> None:
    assert "nothing to extract" in refused(regraft.UsageError, tmp_path, base, base, tmp_path / "a")


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": 4, "energy": 0.5}, {"energy": 2.0}, {"max_error": 1.0},
     {"modules": ["nobody"]}],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tuned = tuned_like(base, tmp_path / "tuned")
    refused(regraft.UsageError, tmp_path, base, tuned, tmp_path / "a", **options)


def test_weights_that_are_no_numbers_are_all_named(base: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    tensors = toys.load(base)
    for name in names:
        tensors[name][0, 0] = np.nan
    tuned = toys.write_base(tmp_path / "tuned", tensors)
    said = refused(regraft.NumericError, tmp_path, base, tuned, tmp_path / "a")
    assert all(name in said for name in names)
