"""``regraft.combine``: what comes out, of which adapters, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.deltas.methods.registry import METHODS

MODULES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
WIDTH = toys.HIDDEN
Arrays = dict[str, Any]


def factors(rank: int, seed: int, modules: list[str] = MODULES, dtype: Any = np.float32) -> Arrays:
    tensors: Arrays = {}
    for number, module in enumerate(modules):
        drawn = toys.lora(module, WIDTH, WIDTH, rank, 100 * seed + 2 * number)
        tensors |= {name: value.astype(dtype) for name, value in drawn.items()}
    return tensors


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return toys.write_adapter(tmp_path / "one", factors(4, 1), r=4, lora_alpha=8)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    held = factors(6, 2, dtype=toys.BF16)
    return toys.write_adapter(tmp_path / "other", held, r=6, lora_alpha=6, use_rslora=True)


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """Return scale * B A of every module, in float64."""
    config = toys.read_json(folder / "adapter_config.json")
    held = toys.load(folder)
    found = {}
    for module in MODULES:
        a, b = (held.get(f"{toys.PREFIX}{module}.lora_{x}.weight") for x in "AB")
        if a is None or b is None:
            continue
        r = config.get("rank_pattern", {}).get(module, config["r"])
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        scale = alpha / (r**0.5 if config.get("use_rslora") else r)
        found[module] = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return found


def summed(one: Path, other: Path, weights: tuple[float, float]) -> dict[str, np.ndarray]:
    first, second = deltas(one), deltas(other)
    return {m: weights[0] * first[m] + weights[1] * second[m] for m in MODULES}


def off(new: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    return max(
        float(np.linalg.norm(new[m] - expected[m]) / np.linalg.norm(expected[m])) for m in expected
    )


@pytest.mark.parametrize("method", ["sum", "cat", "svd"])
def test_the_sum_is_exact_across_ranks_scales_and_dtypes(
    one: Path, other: Path, tmp_path: Path, method: str
) -> None:
    report = regraft.combine([(one, 0.7), f"{other}=-0.3"], tmp_path / "both", method=method)
    assert off(deltas(tmp_path / "both"), summed(one, other, (0.7, -0.3))) < 3e-7
    assert report.error < 3e-7
    assert {m.rank for m in report.modules} == {10}


def test_a_lower_rank_is_the_best_there_is_and_its_error_is_told(
    one: Path, other: Path, tmp_path: Path
) -> None:
    report = regraft.combine([one, other], tmp_path / "both", rank=5)
    expected = summed(one, other, (1, 1))
    new = deltas(tmp_path / "both")
    for module in report.modules:
        u, s, vt = np.linalg.svd(expected[module.name])
        best = (u[:, :5] * s[:5]) @ vt[:5]
        assert np.allclose(new[module.name], best, atol=1e-5)
        assert module.error_norm == pytest.approx(np.sqrt(np.sum(s[5:] ** 2)), rel=1e-6)
        assert module.kept == pytest.approx(np.sum(s[:5] ** 2) / np.sum(s**2), rel=1e-6)


def test_energy_takes_the_smallest_rank_that_keeps_it(
    one: Path, other: Path, tmp_path: Path
) -> None:
    report = regraft.combine([one, other], tmp_path / "both", energy=0.9)
    for module in report.modules:
        s = np.linalg.svd(summed(one, other, (1, 1))[module.name], compute_uv=False)
        shares = np.cumsum(s**2) / np.sum(s**2)
        assert module.rank == int(np.searchsorted(shares, 0.9)) + 1
        assert module.kept >= 0.9


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.equal_ranks])
def test_every_method_loads_in_peft_and_merges(
    one: Path, other: Path, tmp_path: Path, method: str
) -> None:
    regraft.combine([one, other], tmp_path / "both", method=method)
    base = toys.write_base(tmp_path / "base")
    assert regraft.check(base, tmp_path / "both").ok
    config = toys.read_json(tmp_path / "both" / "adapter_config.json")
    assert not config.get("use_rslora")


@pytest.mark.parametrize("method", ["dare", "della", "ties"])
def test_the_seed_says_which_bytes_and_threads_do_not(
    one: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def weights(name: str, seed: int) -> bytes:
        regraft.combine([one, other], tmp_path / name, method=method, seed=seed)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = weights("a", 1)
    monkeypatch.setattr("regraft.combining.making.MOST_THREADS", 1)
    assert weights("b", 1) == first
    assert weights("c", 2) != first


def test_modules_that_one_adapter_lacks_are_those_of_the_other(one: Path, tmp_path: Path) -> None:
    fewer = toys.write_adapter(tmp_path / "fewer", factors(4, 3, MODULES[:2]), r=4, lora_alpha=4)
    regraft.combine([one, f"{fewer}=2"], tmp_path / "both")
    new, first = deltas(tmp_path / "both"), deltas(one)
    assert np.allclose(new[MODULES[3]], first[MODULES[3]], atol=1e-6)
    assert np.allclose(
        new[MODULES[0]], first[MODULES[0]] + 2 * deltas(fewer)[MODULES[0]], atol=1e-5
    )


def test_a_dry_run_writes_nothing_and_says_how_the_adapters_compare(
    one: Path, tmp_path: Path
) -> None:
    held = {n: -v if "lora_B" in n else v for n, v in factors(4, 1).items()}
    opposite = toys.write_adapter(tmp_path / "opposite", held, r=4, lora_alpha=8)
    before = toys.tree(tmp_path)
    report = regraft.combine([one, opposite], None, dry_run=True)
    assert toys.tree(tmp_path) == before
    assert report.cosines[0][1] == pytest.approx(-1)
    assert report.disagreement[0][1] == pytest.approx(1)
    assert "pull against each other" in report.advice
    assert report.error < 1e-6


def test_peft_gives_the_same_for_its_own_methods(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    base = toys.write_base(tmp_path / "base")
    made = [
        toys.write_adapter(tmp_path / f"a{n}", seed_factors(n), r=4, lora_alpha=8) for n in (1, 2)
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live = peft.PeftModel.from_pretrained(model, made[0], adapter_name="a")
    live.load_adapter(made[1], "b")
    for ours, theirs in (("peft_linear", "linear"), ("peft_ties", "ties")):
        density = {} if ours == "peft_linear" else {"density": 0.4}
        live.add_weighted_adapter(
            ["a", "b"], [0.7, 0.3], theirs, combination_type=theirs, **density
        )
        out = tmp_path / ours
        regraft.combine([(made[0], 0.7), (made[1], 0.3)], out, method=ours, **density)
        layer = live.base_model.model.model.layers[0].self_attn.q_proj
        delta = layer.get_delta_weight(theirs).numpy()
        held = toys.load(out)
        name = f"{toys.PREFIX}model.layers.0.self_attn.q_proj.lora_"
        new = held[f"{name}B.weight"] @ held[f"{name}A.weight"]
        assert np.allclose(new, delta, atol=1e-5)


def seed_factors(seed: int) -> Arrays:
    return toys.attention(rank=4, seed=seed)


# -- what is refused -------------------------------------------------------------------------------


def refused(kind: type[Exception], tmp_path: Path, *args: Any, **options: Any) -> str:
    """Return what a call says that is refused, and that leaves nothing behind."""
    before = toys.tree(tmp_path)
    with pytest.raises(kind) as caught:
        regraft.combine(*args, **options)
    assert toys.tree(tmp_path) == before
    return str(caught.value)


def test_adapters_with_nothing_in_common_take_a_base(one: Path, tmp_path: Path) -> None:
    held = toys.lora("model.layers.0.self_attn.o_proj", WIDTH, WIDTH, 4)
    strange = toys.write_adapter(
        tmp_path / "strange", held, r=4, lora_alpha=4, target_modules=["o_proj"]
    )
    said = refused(regraft.MismatchError, tmp_path, [one, strange], tmp_path / "x")
    assert "--base" in said
    base = toys.write_base(tmp_path / "base")
    assert regraft.combine([one, strange], tmp_path / "x", base=base).modules[-1].rank == 4


def test_other_shapes_are_all_named(one: Path, tmp_path: Path) -> None:
    wide = {
        n: np.ones((4, WIDTH + 2) if "lora_A" in n else v.shape, np.float32)
        for n, v in factors(4, 3).items()
    }
    other = toys.write_adapter(tmp_path / "wide", wide, r=4, lora_alpha=4)
    said = refused(regraft.MismatchError, tmp_path, [one, other], tmp_path / "x")
    assert all(module in said for module in MODULES)


def test_dora_is_refused_with_the_way_on(one: Path, tmp_path: Path) -> None:
    held = {k: v for m in MODULES for k, v in toys.dora(m, WIDTH, WIDTH, 4).items()}
    other = toys.write_adapter(tmp_path / "dora", held, r=4, lora_alpha=4, use_dora=True)
    said = refused(regraft.UnsupportedError, tmp_path, [one, other], tmp_path / "x")
    assert all(module in said for module in MODULES)
    assert "regraft extract" in said


def test_contradicting_replaced_modules_are_refused_and_equal_ones_kept(tmp_path: Path) -> None:
    name = f"{toys.PREFIX}model.norm.weight"
    made = [
        toys.write_adapter(
            tmp_path / f"n{n}", factors(4, n) | {name: np.full(WIDTH, value, np.float32)}, r=4,
            lora_alpha=4, modules_to_save=["norm"],
        )
        for n, value in enumerate((1.5, 1.5, 2.5))
    ]  # fmt: skip
    assert "model.norm.weight" in refused(
        regraft.UnsupportedError, tmp_path, [made[0], made[2]], tmp_path / "x"
    )
    assert "weight" in refused(
        regraft.UnsupportedError, tmp_path, [(made[0], 0.5), made[1]], tmp_path / "x"
    )
    regraft.combine(made[:2], tmp_path / "x")
    assert (toys.load(tmp_path / "x")[name] == 1.5).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "--rank"),
        ({"rank": 99}, "at most 10"),
        ({"rank": 4, "energy": 0.5}, "two ways"),
        ({"energy": 1.5}, "--energy"),
        ({"method": "ties", "density": 0.0}, "--density"),
        ({"density": 0.5}, "takes no elements out"),
        ({"method": "cat", "rank": 4}, "rank of its factors"),
        ({"method": "average"}, "no such method"),
    ],
)
def test_what_contradicts_itself_is_refused(
    one: Path, other: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    assert said in refused(regraft.UsageError, tmp_path, [one, other], tmp_path / "x", **options)


@pytest.mark.parametrize("weight", ["nan", "inf", "x"])
def test_a_weight_is_a_finite_number(one: Path, tmp_path: Path, weight: str) -> None:
    said = refused(regraft.UsageError, tmp_path, [f"{one}={weight}"], tmp_path / "x")
    assert "weight" in said


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    held = {n: v * 1e7 for n, v in factors(4, 1).items()}
    large = toys.write_adapter(tmp_path / "large", held, r=4, lora_alpha=4)
    said = refused(regraft.NumericError, tmp_path, [large], tmp_path / "x", dtype="float16")
    assert all(module in said for module in MODULES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_no_numbers_are_all_named(one: Path, tmp_path: Path, value: float) -> None:
    held = factors(4, 1)
    for name in held:
        held[name][0, 0] = value
    bad = toys.write_adapter(tmp_path / "bad", held, r=4, lora_alpha=4)
    said = refused(regraft.AdapterError, tmp_path, [one, bad], tmp_path / "x", method="ties")
    assert all(name in said for name in held)
