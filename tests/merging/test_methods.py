"""Methods on the elements of deltas, straight into the weights: ties, dare and the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import regraft
from merging import method_cases, toys
from merging.method_cases import METHODS, TARGETS, Given, as_stored, base_tensors, combined
from merging.test_reproducible import SMALLEST_CAP, digests, executed
from merging.toys import PREFIX, draw, load, tree, write_base
from regraft.errors import MismatchError, UsageError
from regraft.merging.execution.step_run import StepRun
from regraft.merging.planning.planner import SMALLEST_TILE

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
WEIGHTS = (1.0, 0.75, -0.5)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Given]:
    """Three adapters of other ranks and scales for all of the base's matrices."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        method_cases.write_adapter(folder / name, rank, seed, alpha)
        for name, rank, seed, alpha in (("one", 3, 1, 6), ("two", 5, 11, 4), ("three", 2, 21, 1))
    ]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base in each dtype."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: write_base(folder / name, base_tensors(dtype), None) for name, dtype in DTYPES.items()
    }


def weighted(adapters: Sequence[Given], weights: Sequence[float]) -> list[tuple[Path, float]]:
    return [(given.folder, weight) for given, weight in zip(adapters, weights, strict=True)]


def assert_is(found: np.ndarray, base: np.ndarray, delta: np.ndarray) -> None:
    """Fail unless a tensor is the base's with a delta in float32, rounded once."""
    expected = (base.astype(np.float32) + delta).astype(base.dtype)
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def without_turned(given: Given, folder: Path) -> Given:
    """Return an adapter that leaves alone what the base stores as (in, out)."""
    left_out = (f"{PREFIX}l.turned.", f"{PREFIX}d.table.")
    kept = {n: t for n, t in given.tensors.items() if not n.startswith(left_out)}
    chosen = {"r": given.rank, "lora_alpha": given.scale * given.rank}
    targets = [t for t in TARGETS if t not in ("l.turned", "d.table")]
    toys.write_adapter(
        folder, kept, **chosen, target_modules=targets, target_parameters=["f.experts"]
    )
    return replace(given, folder=folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_the_method_written_out_and_is_taken_back(
    method: str, dtype: str, bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    """Linear layers, transposed ones, embeddings, convolutions and stacks of experts."""
    if method == "della":
        adapters = [without_turned(g, tmp_path / str(i)) for i, g in enumerate(adapters)]
    given = weighted(adapters, WEIGHTS)
    out = tmp_path / "out"
    receipt = regraft.merge(bases[dtype], given, out, method=method, density=0.4, seed=7)
    assert dict(receipt.options) | {"method": method, "density": 0.4, "seed": 7} == receipt.options
    found, base = load(out), load(bases[dtype])
    deltas = combined(method, adapters, WEIGHTS, 0.4, 7)
    touched = {record.name for record in receipt.tensors if record.features}
    assert len(touched) == (3 if method == "della" else 5)
    for name, tensor in base.items():
        if name in touched:
            assert_is(found[name], tensor, as_stored(name, deltas))
        else:
            np.testing.assert_array_equal(found[name].view(np.uint8), tensor.view(np.uint8))
    assert regraft.verify(out, base=bases[dtype], adapters=given).verdict == "exact"
    regraft.unmerge(out, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(bases[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_of_the_output_is_taken_back(
    dtype: str, bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    given = weighted(adapters, WEIGHTS)
    regraft.merge(bases["bfloat16"], given, tmp_path / "out", method="dare_ties", dtype=dtype)
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(bases["bfloat16"])


@pytest.mark.parametrize("method", ["ties", "dare", "breadcrumbs"])
def test_caps_and_threads_and_tiles_change_no_byte(
    method: str, bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    given = weighted(adapters, WEIGHTS)
    for number, (cap, threads) in enumerate([("512MiB", 1), ("512MiB", 6), (CAP, 1), ("1GiB", 3)]):
        regraft.merge(
            bases["bfloat16"], given, tmp_path / str(number), method=method, max_memory=cap,
            threads=threads, command="the same",
        )  # fmt: skip
        assert digests(tmp_path / str(number)) == digests(tmp_path / "0")


CAP = f"{int(SMALLEST_CAP.removesuffix('MiB')) + 8}MiB"


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_tiles_of_parts_of_rows_change_no_byte_and_no_record(
    method: str, bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    """Limits and draws are those of the whole module, however its columns are cut."""
    inputs = bases["bfloat16"], weighted(adapters, WEIGHTS)
    expected = executed(inputs, tmp_path / "plain", 2**22, 1, None, method)
    for tile_bytes, threads in ((64, 3), (1000, 1), (SMALLEST_TILE, 8)):
        folder = tmp_path / f"{tile_bytes}"
        found = executed(inputs, folder, tile_bytes, threads, None, method)
        weights = {name: expected[0][name] for name in found[0]}
        assert found == (weights, expected[1])


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"della"}))
def test_one_adapter_of_weight_and_density_1_is_its_delta(
    method: str, bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    regraft.merge(
        bases["float32"], adapters[0].folder, tmp_path / "out", method=method, density=1.0
    )
    found, own = load(tmp_path / "out"), method_cases.deltas(adapters[0])
    for name, tensor in load(bases["float32"]).items():
        if name != "b.copied":
            assert_is(found[name], tensor, as_stored(name, own))


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs"])
def test_the_order_of_two_adapters_does_not_matter(
    method: str, bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    given = weighted(adapters[:2], (0.5, 0.25))
    for name, order in (("one", given), ("other", given[::-1])):
        regraft.merge(bases["bfloat16"], order, tmp_path / name, method=method)
    assert (
        digests(tmp_path / "one")["model.safetensors"]
        == (digests(tmp_path / "other")["model.safetensors"])
    )


def test_a_seed_says_which_elements_stay(
    bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    given = weighted(adapters, WEIGHTS)
    for seed in (0, 0, 1):
        name = f"{len(list(tmp_path.iterdir()))}"
        regraft.merge(bases["float32"], given, tmp_path / name, method="dare", seed=seed)
    first, again, other = (load(tmp_path / name)["a.linear.weight"] for name in "012")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


MOE = "model.layers.0.mlp.experts"
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 3,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_experts_apart_become_what_they_become_in_a_stack(method: str, tmp_path: Path) -> None:
    """An expert's halves lie in two tensors: limits and draws are those of both together."""
    both = draw(3, 16, 6, dtype=toys.BF16)
    stacked = write_base(tmp_path / "stacked", {f"{MOE}.gate_up_proj": both}, CONFIG)
    old = "model.layers.0.block_sparse_moe.experts"
    halves = {
        f"{old}.{e}.{leaf}.weight": np.ascontiguousarray(both[e, low : low + 8])
        for e in range(3)
        for leaf, low in (("w1", 0), ("w3", 8))
    }
    apart = write_base(tmp_path / "apart", halves, CONFIG)
    given = []
    for seed in (1, 5):
        factors = {
            f"{PREFIX}{MOE}.lora_A.weight": draw(3 * 2, 6, seed=seed),
            f"{PREFIX}{MOE}.lora_B.weight": draw(16, 2 * 3, seed=seed + 1),
        }
        chosen = {"r": 2, "target_modules": [], "target_parameters": [f"{MOE}.gate_up_proj"]}
        given.append(toys.write_adapter(tmp_path / f"adapter{seed}", factors, **chosen))
    regraft.merge(stacked, given, tmp_path / "one", method=method, density=0.3)
    regraft.merge(apart, given, tmp_path / "other", method=method, density=0.3)
    one, other = load(tmp_path / "one"), load(tmp_path / "other")
    parts = [
        np.concatenate([other[f"{old}.{e}.{leaf}.weight"] for leaf in ("w1", "w3")])
        for e in range(3)
    ]
    whole = one[f"{MOE}.gate_up_proj"]
    np.testing.assert_array_equal(whole.view(np.uint16), np.stack(parts).view(np.uint16))
    assert not np.array_equal(whole.view(np.uint16), both.view(np.uint16))
    for base, merged in ((stacked, "one"), (apart, "other")):
        regraft.unmerge(tmp_path / merged, tmp_path / f"back-{merged}")
        assert tree(tmp_path / f"back-{merged}") == tree(base)


def test_a_swap_is_a_merge_and_back_again(
    bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    one, other = weighted(adapters[:2], (1, 1)), weighted(adapters[1:], (1, 0.5))
    regraft.merge(bases["bfloat16"], one, tmp_path / "merged", method="ties")
    regraft.swap(tmp_path / "merged", other, tmp_path / "swapped", method="dare", seed=3)
    regraft.merge(bases["bfloat16"], other, tmp_path / "direct", method="dare", seed=3)
    assert digests(tmp_path / "swapped") == digests(tmp_path / "direct")
    regraft.unmerge(tmp_path / "swapped", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(bases["bfloat16"])


def test_an_interrupted_merge_goes_on(
    bases: dict[str, Path], adapters: list[Given], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = weighted(adapters, WEIGHTS), tmp_path / "out"
    regraft.merge(bases["bfloat16"], given, tmp_path / "whole", method="ties")
    real, calls = StepRun.work, [0]

    def failing(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(StepRun, "work", failing)
        with pytest.raises(KeyboardInterrupt):
            regraft.merge(bases["bfloat16"], given, out, method="ties", threads=1)
    assert not out.exists()
    regraft.merge(bases["bfloat16"], given, out, method="ties")
    assert digests(out) == digests(tmp_path / "whole")


def test_sum_and_cat_are_what_a_merge_does_anyway(
    bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    given = weighted(adapters, WEIGHTS)
    for name, chosen in (("plain", {}), ("sum", {"method": "sum"}), ("cat", {"method": "cat"})):
        receipt = regraft.merge(bases["bfloat16"], given, tmp_path / name, **chosen)
        assert "method" not in receipt.options
        assert digests(tmp_path / name) == digests(tmp_path / "plain")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"method": "knots"}, "regraft combine ADAPTERS"),
        ({"method": "best"}, "no such method"),
        ({"method": "ties", "density": 0}, "has to be a share"),
        ({"density": 0.5}, "takes no elements out"),
        ({"method": "ties", "seed": -1}, "seed"),
        ({"seed": 1}, "needs codes"),
    ],
)
def test_options_without_a_meaning_are_refused(
    chosen: dict[str, Any], said: str, bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        regraft.merge(bases["float32"], adapters[0].folder, tmp_path / "out", **chosen)
    assert not (tmp_path / "out").exists()


def test_what_has_no_elements_of_its_own_is_refused_all_at_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"a.weight": draw(8, 6), "b.weight": draw(8, 6)}, None)
    dora = toys.write_adapter(
        tmp_path / "dora", toys.dora("a", 8, 6), use_dora=True, target_modules=["a"]
    )
    pissa = toys.write_adapter(
        tmp_path / "pissa", toys.lora("b", 8, 6), init_lora_weights="pissa", target_modules=["b"]
    )
    with pytest.raises(MismatchError) as caught:
        regraft.merge(base, [dora, pissa], tmp_path / "out", method="ties")
    assert len(caught.value.problems) == 2
    assert "dora" in str(caught.value)
    assert "pissa" in str(caught.value)
    assert not regraft.check(base, [dora, pissa], method="ties").ok
    assert not (tmp_path / "out").exists()


def test_della_is_refused_where_rows_are_columns(
    bases: dict[str, Path], adapters: list[Given], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="dare_ties"):
        regraft.merge(bases["float32"], adapters[0].folder, tmp_path / "out", method="della")


def expert_parts(folder: Path, rows: int = 8) -> Path:
    """Write an adapter of the older names, for one half of one expert alone."""
    module = "model.layers.0.block_sparse_moe.experts.1.w1"
    return toys.write_adapter(folder, toys.lora(module, rows, 6, 2), r=2, target_modules=["w1"])


def expert_stack(folder: Path, leaf: str, out: int, inputs: int) -> Path:
    """Write an adapter for a stack of three experts."""
    factors = {
        f"{PREFIX}{MOE}.lora_A.weight": draw(3 * 2, inputs, seed=3),
        f"{PREFIX}{MOE}.lora_B.weight": draw(out, 2 * 3, seed=4),
    }
    chosen = {"r": 2, "target_modules": [], "target_parameters": [f"{MOE}.{leaf}"]}
    return toys.write_adapter(folder, factors, **chosen)


def test_a_half_and_a_whole_module_are_refused_together(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MOE}.gate_up_proj": draw(3, 16, 6)}, CONFIG)
    stack, half = expert_stack(tmp_path / "s", "gate_up_proj", 16, 6), expert_parts(tmp_path / "h")
    regraft.merge(base, [stack, half], tmp_path / "sum")
    with pytest.raises(MismatchError, match="cut in other ways"):
        regraft.merge(base, [stack, half], tmp_path / "out", method="ties")
    assert not (tmp_path / "out").exists()


def test_modules_of_other_names_for_the_same_elements_become_one(tmp_path: Path) -> None:
    """An expert that one adapter has in a stack, and another one apart, under its older name."""
    base = write_base(tmp_path / "base", {f"{MOE}.down_proj": draw(3, 6, 8)}, CONFIG)
    stack = expert_stack(tmp_path / "stack", "down_proj", 6, 8)
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    factors = toys.lora(module, 6, 8, 2)
    apart = toys.write_adapter(tmp_path / "apart", factors, r=2, target_modules=["w2"])
    plan = regraft.plan(base, [stack, apart], method="ties")
    assert [len(segment.deltas) for segment in plan.steps[0].segments] == [1, 2, 1]
    regraft.merge(base, [stack, apart], tmp_path / "out", method="ties")
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)
