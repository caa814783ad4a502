"""Adapters are compared by what they add to a model, not by the factors they store."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.cli.texts.diff import render
from regraft.verifying.diffing.report import DeltaChange
from shrinking.small import MODULES, RANK, STACK, WIDTH, lowrank, product, stack, write_adapter

Arrays = dict[str, np.ndarray[Any, Any]]


def key(module: str, side: str) -> str:
    return f"{toys.PREFIX}{module}.lora_{side}.weight"


def rotated(tensors: Arrays, extra: int = 0) -> Arrays:
    """Return other factors of the same products, exactly: rows doubled, halved, swapped, padded."""
    found = dict(tensors)
    for module in MODULES:
        a, b = tensors[key(module, "A")][::-1] * 2, tensors[key(module, "B")][:, ::-1] / 2
        found[key(module, "A")] = np.vstack([a, np.zeros((extra, WIDTH), a.dtype)])
        found[key(module, "B")] = np.hstack([b, np.ones((WIDTH, extra), b.dtype)])
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


@pytest.mark.slow
def test_other_factors_of_the_same_deltas_are_no_difference(tmp_path: Path) -> None:
    x = write_adapter(tmp_path / "x")
    report = regraft.diff(x, write_adapter(tmp_path / "y", rotated(lowrank())))
    assert report.same
    assert (report.deltas, report.same_deltas, report.changed) == ((), 4, ())
    raw = regraft.diff(x, tmp_path / "y", raw=True)
    assert len(raw.changed) == 8
    assert (raw.deltas, raw.same_deltas) == ((), 0)


def test_another_rank_and_alpha_of_the_same_deltas_differ_in_the_config_alone(
    tmp_path: Path,
) -> None:
    x = write_adapter(tmp_path / "x")
    y = write_adapter(tmp_path / "y", rotated(lowrank(), 8), r=16, lora_alpha=24)
    z = write_adapter(
        tmp_path / "z", rotated(lowrank(), 8), r=16, lora_alpha=6.0, use_rslora=True
    )  # fmt: skip
    for other in (y, z):
        report = regraft.diff(x, other)
        assert (report.deltas, report.same_deltas) == ((), 4)
        assert {change.key for change in report.config} >= {"r", "lora_alpha"}
        assert not report.same


def test_the_distance_and_the_cosine_are_those_of_the_products(tmp_path: Path) -> None:
    old, new = lowrank(), lowrank(decay=0.9)
    x = write_adapter(tmp_path / "x", old)
    report = regraft.diff(x, write_adapter(tmp_path / "y", new, lora_alpha=4))
    assert len(report.deltas) == 4
    for delta in report.deltas:
        one, other = 1.5 * product(old, delta.name), 0.5 * product(new, delta.name)
        norms = np.linalg.norm(one), np.linalg.norm(other)
        assert delta.norms == pytest.approx(norms)
        assert delta.delta_norm == pytest.approx(np.linalg.norm(other - one))
        assert delta.cosine == pytest.approx((one * other).sum() / norms[0] / norms[1])
        assert (delta.scales, delta.ranks) == ((1.5, 0.5), (8, 8))
    shares = [delta.relative or 0.0 for delta in report.deltas]
    assert shares == sorted(shares, reverse=True)


def test_a_shrink_differs_by_the_error_that_it_reports(tmp_path: Path) -> None:
    done = regraft.shrink(write_adapter(tmp_path / "x"), tmp_path / "s", rank=3)
    report = regraft.diff(tmp_path / "x", tmp_path / "s")
    assert report.relative_delta == pytest.approx(done.error)
    errors = {module.name: module.error for module in done.modules}
    assert {d.name: d.relative for d in report.deltas} == pytest.approx(errors)
    assert report.deltas[0].dtypes == ("F32", "BF16")
    assert report.deltas[0].ranks == (8, 3)


def test_a_scaled_adapter_has_a_cosine_of_one(tmp_path: Path) -> None:
    x = write_adapter(tmp_path / "x")
    report = regraft.diff(x, write_adapter(tmp_path / "y", lora_alpha=24))
    assert [d.cosine for d in report.deltas] == pytest.approx([1.0] * 4)
    assert [d.relative for d in report.deltas] == pytest.approx([1.0] * 4)
    assert len(report.deltas) == 4


def test_a_module_of_one_side_has_a_delta_of_zero_on_the_other(tmp_path: Path) -> None:
    x = write_adapter(tmp_path / "x", lowrank(MODULES[:3]))
    y = write_adapter(tmp_path / "y", lowrank(MODULES[:2]))
    (delta,) = regraft.diff(x, y).deltas
    assert (delta.name, delta.ranks, delta.relative) == (MODULES[2], (8, None), 1.0)
    norm = 1.5 * np.linalg.norm(product(lowrank(), MODULES[2]))  # the scale is 12 / 8
    assert delta.norms == (pytest.approx(norm), 0)
    assert delta.delta_norm == pytest.approx(norm)
    (delta,) = regraft.diff(y, x).deltas
    assert (delta.ranks, delta.relative, delta.cosine) == ((None, 8), math.inf, None)
    assert json.loads(json.dumps(regraft.diff(y, x).to_json()))["deltas"][0]["relative"] is None


def test_stacks_of_experts_are_compared_expert_by_expert(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "r": RANK, "target_modules": [], "target_parameters": [f"{STACK}.down_proj"],
        "peft_version": "0.19.0",
    }  # fmt: skip
    x = write_adapter(tmp_path / "x", stack(), **settings)
    y = write_adapter(tmp_path / "y", stack(scale=2.0), **settings)
    (delta,) = regraft.diff(x, y).deltas
    assert delta.layers == ("experts", "experts")
    assert delta.cosine == pytest.approx(1.0)


def test_names_of_another_version_are_one_prefix_apart_and_told(tmp_path: Path) -> None:
    renamed = {
        name.replace("model.layers", "language_model.model.layers"): values
        for name, values in lowrank().items()
    }
    x, y = write_adapter(tmp_path / "x"), write_adapter(tmp_path / "y", renamed)
    for one, other in ((x, y), (y, x)):
        report = regraft.diff(one, other)
        assert (report.deltas, report.same_deltas) == ((), 4)
        assert any("language_model." in note for note in report.notes)


def test_an_adapter_of_fewer_layers_by_other_names_is_found_in_the_larger_one(
    tmp_path: Path,
) -> None:
    """Also where the larger one begins with a layer that the smaller one does not have."""
    few = [module for module in MODULES if "v_proj" in module]
    renamed = {
        name.replace("model.layers", "language_model.model.layers"): lowrank()[name]
        for name in lowrank(few)
    }
    x, y = write_adapter(tmp_path / "x"), write_adapter(tmp_path / "y", renamed)
    for one, other in ((x, y), (y, x)):
        report = regraft.diff(one, other)
        assert report.same_deltas == len(few)
        assert sorted(d.ranks.count(None) for d in report.deltas) == [1] * len(few)


def test_deltas_without_a_norm_count_for_nothing(tmp_path: Path) -> None:
    def change(norms: Any, delta_norm: float | None) -> DeltaChange:
        two: Any = (None, None)
        return DeltaChange("name", two, two, two, two, two, norms, delta_norm)

    x = write_adapter(tmp_path / "x")
    report = regraft.diff(x, x)
    known, unknown = change((4.0, 5.0), 2.0), change((3.0, None), None)
    assert replace(report, deltas=(known, unknown)).relative_delta == 0.5
    assert replace(report, deltas=(unknown,)).relative_delta is None


def test_layers_that_only_sound_alike_are_not_taken_for_each_other(tmp_path: Path) -> None:
    moved = {name.replace("layers.0", "layers.7"): v for name, v in lowrank(MODULES[:2]).items()}
    x = write_adapter(tmp_path / "x", lowrank(MODULES[:2]))
    report = regraft.diff(x, write_adapter(tmp_path / "y", moved))
    assert sorted(d.ranks.count(None) for d in report.deltas) == [1] * 4


def test_magnitudes_and_whole_tensors_are_compared_as_they_are(tmp_path: Path) -> None:
    magnitude, head = key(MODULES[0], "magnitude_vector")[: -len(".weight")], f"{toys.PREFIX}score"
    extra = {magnitude: toys.draw(WIDTH) ** 2, f"{head}.weight": toys.draw(2, WIDTH)}
    settings: dict[str, Any] = {"use_dora": True, "modules_to_save": ["score"]}
    x = write_adapter(tmp_path / "x", lowrank() | extra, **settings)
    changed = {**lowrank(), magnitude: extra[magnitude] * 2}
    changed[f"{toys.PREFIX}score.modules_to_save.default.weight"] = extra[f"{head}.weight"] * 3
    report = regraft.diff(x, write_adapter(tmp_path / "y", changed, **settings))
    assert [round(t.relative or 0, 6) for t in report.changed] == [1.0, 2.0]
    assert (report.deltas, report.added, report.removed) == ((), (), ())
    assert any("DoRA" in note for note in report.notes)


def test_what_is_not_read_as_an_adapter_is_compared_as_stored_and_says_so(tmp_path: Path) -> None:
    x = write_adapter(tmp_path / "x")
    odd = write_adapter(
        tmp_path / "odd", lowrank() | {f"{toys.PREFIX}odd.lora_A.weight": toys.draw(8, 4)}
    )
    report = regraft.diff(x, odd)
    assert [tensor.name for tensor in report.added] == [f"{toys.PREFIX}odd.lora_A.weight"]
    assert (report.unchanged, report.same_deltas) == (8, 0)
    assert any("as they are stored" in note for note in report.notes)


def test_deltas_that_are_not_finite_are_told_first(tmp_path: Path) -> None:
    broken = lowrank()
    broken[key(MODULES[3], "A")][0, 0] = np.nan
    broken[key(MODULES[0], "B")][0, 0] += 1
    x = write_adapter(tmp_path / "x")
    report = regraft.diff(x, write_adapter(tmp_path / "y", broken))
    assert [d.name for d in report.deltas] == [MODULES[3], MODULES[0]]
    assert report.deltas[0].relative is None


def test_the_text_has_totals_and_a_table(tmp_path: Path) -> None:
    whole = lowrank()
    x = {name: values for name, values in whole.items() if MODULES[3] not in name}
    y = {name: values for name, values in whole.items() if MODULES[0] not in name}
    y[key(MODULES[1], "B")] = -whole[key(MODULES[1], "B")]
    report = regraft.diff(write_adapter(tmp_path / "x", x), write_adapter(tmp_path / "y", y))
    text = [" ".join(line.split()) for line in render(report, limit=None).splitlines()]
    assert any(line.startswith("deltas 3 changed, 1 same; |Y-X|/|X|") for line in text)
    assert f"{MODULES[1]} 200% -1.0000 8 1.5" in text
    assert f"{MODULES[0]} 100% - 8 -> - 1.5 -> - only in X" in text
    assert text[-1] == "different: 3 deltas differ"
