"""Merging into quantized bases: out to plain weights, and kept in the base's own codes."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import regraft
from merging import toys
from merging.quantized_bases import BASES, write_quantized
from merging.test_undo import assert_restores, comparable
from merging.toys import tree, write_adapter, write_json
from regraft.errors import FormatError, MismatchError, UnsupportedError, UsageError

KEPT: list[dict[str, Any]] = [{"quantize": "keep"}, {"quantize": "keep", "rounding": "nearest"}]
OUT: list[dict[str, Any]] = [{}, {"dtype": "float32"}, {"dtype": "float16"}]


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a quantized base of each kind."""
    return write_quantized(tmp_path / "base", request.param)


@pytest.fixture
def nf4(tmp_path: Path) -> Path:
    """Return a base in NF4."""
    return write_quantized(tmp_path / "base", "nf4")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return LoRA on some linear layers, small against the codes' steps."""
    return write_small(tmp_path / "adapter")


def write_small(folder: Path) -> Path:
    """Write the adapter of :func:`adapter`."""
    tensors = {
        **toys.lora(toys.Q0, toys.HIDDEN, toys.HIDDEN),
        **toys.lora("model.layers.1.mlp.down_proj", toys.HIDDEN, toys.INTER),
    }
    tensors = {n: t * 0.2 if "lora_B" in n else t for n, t in tensors.items()}
    return write_adapter(folder, tensors, target_modules=["q_proj", "down_proj"])


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {n: t.float().numpy() for n, t in load_torch(path).items()}
    return found


# -- out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8", "gptq", "awq", "compressed-tensors"])
def test_what_lies_beside_the_codes_keeps_its_dtype(tmp_path: Path, kind: str) -> None:
    base = write_quantized(tmp_path / "base", kind)
    kept = {"model.norm.weight": torch.float32, "lm_head.weight": torch.float16}
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        tensors = load_torch(path)
        stored |= {n: tensors[n].to(dtype) * 1.001 for n, dtype in kept.items() if n in tensors}
        save_torch(tensors | {n: stored[n] for n in kept if n in tensors}, path, {"format": "pt"})
    regraft.dequantize(base, tmp_path / "plain")
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "plain").glob("*.safetensors"):
        found |= load_torch(path)
    for name, dtype in kept.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], stored[name])


def test_a_merge_is_that_into_the_dequantized_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    regraft.dequantize(base, tmp_path / "plain")
    for number, options in enumerate(OUT):
        direct, later = tmp_path / f"direct{number}", tmp_path / f"later{number}"
        regraft.merge(base, adapter, direct, undo=False, **options)
        regraft.merge(tmp_path / "plain", adapter, later, undo=False, **options)
        for path in later.glob("*.safetensors"):
            assert path.read_bytes() == (direct / path.name).read_bytes()


def test_nothing_of_the_quantization_is_left(base: Path, adapter: Path, tmp_path: Path) -> None:
    regraft.merge(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    plain = load_file(tmp_path / "base-plain" / "model.safetensors")
    found = tensors_of(tmp_path / "out")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in plain.items()}
    index = json.loads((tmp_path / "out" / toys.INDEX).read_text())
    assert set(index["weight_map"]) == set(plain)


def test_the_receipt_says_which_weights_were_merged_into(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    for undo in (True, False):
        receipt = regraft.merge(nf4, adapter, tmp_path / f"out{undo}", undo=undo)
        assert receipt.base_formats == ("nf4",)
        with_digest = receipt.base.tensors
        stored = set()
        for path in nf4.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                stored |= set(file.keys())
        assert set(with_digest) == stored


def test_dequantizing_what_is_not_quantized_is_refused(tmp_path: Path) -> None:
    plain = toys.write_base(tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="not quantized"):
        regraft.dequantize(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KEPT, ids=str)
def test_scales_and_everything_else_stay(
    base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    receipt = regraft.merge(base, adapter, tmp_path / "out", **options)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    merged = {r.name for r in receipt.tensors if r.action == "merge"}
    modules = {name.rpartition(".")[0] for name in merged}
    assert modules == {toys.Q0, "model.layers.1.mlp.down_proj"}
    assert len(merged) == 2
    for name in before:
        assert np.array_equal(before[name], after[name]) == (name not in merged)
    configs = [json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.slow
def test_stochastic_rounding_loses_nothing_on_average(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    names, runs = (f"{toys.Q0}.weight", "model.layers.1.mlp.down_proj.weight"), 16

    def values(folder: Path) -> np.ndarray:
        found = tensors_of(folder)
        return np.concatenate([found[name].ravel() for name in names])

    regraft.merge(nf4, adapter, tmp_path / "exact", dtype="float32", undo=False)
    regraft.dequantize(nf4, tmp_path / "plain", dtype="float32")
    exact, plain = values(tmp_path / "exact"), values(tmp_path / "plain")
    total = np.zeros_like(exact, np.float64)
    shares: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(runs):
        out = tmp_path / f"s{seed}"
        receipt = regraft.merge(nf4, adapter, out, quantize="keep", seed=seed, undo=False)
        for record in receipt.tensors:
            if record.name in names:
                assert record.survived is not None
                shares[record.name].append(record.survived)
        regraft.dequantize(out, tmp_path / f"d{seed}", dtype="float32")
        total += values(tmp_path / f"d{seed}")
    inside = np.abs(exact) < np.abs(plain).max() * 0.5  # ends of the grid cannot be passed
    error = (total / runs - exact)[inside]
    step = 0.2 * np.abs(plain).max()  # no smaller than NF4's steps
    assert runs * error.size > 8000
    assert np.abs(error.mean()) < 3 * step / np.sqrt(runs * error.size)
    for each in shares.values():
        assert len(each) == runs
        assert 0.7 < np.mean(each) < 1.1
    nearest = regraft.merge(nf4, adapter, tmp_path / "n", quantize="keep", rounding="nearest")
    (record,) = [r for r in nearest.tensors if r.name == names[0]]
    assert record.survived is not None
    assert record.survived < np.mean(shares[names[0]])


def test_the_shares_in_the_receipt_are_what_they_say(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    receipt = regraft.merge(nf4, adapter, tmp_path / "out", quantize="keep", undo=False)
    regraft.merge(nf4, adapter, tmp_path / "exact", dtype="float32", undo=False)
    for name in ("out", "base"):
        regraft.dequantize(tmp_path / name, tmp_path / f"{name}-d", dtype="float32")
    exact, kept, before = (tensors_of(tmp_path / n) for n in ("exact", "out-d", "base-d"))
    sums = np.zeros(4)
    for record in receipt.tensors:
        if record.action != "merge":
            continue
        w, q, m = (a[record.name].astype(np.float64) for a in (before, kept, exact))
        delta, moved = m - w, q - w
        mine = [(moved * delta).sum(), (delta**2).sum(), ((moved - delta) ** 2).sum()]
        sums += [*mine, (w**2).sum()]
        assert record.survived == pytest.approx(mine[0] / mine[1], rel=1e-4)
        assert record.noise == pytest.approx((mine[2] / (w**2).sum()) ** 0.5, rel=1e-4)
    assert receipt.totals.survived == pytest.approx(sums[0] / sums[1], rel=1e-4)
    assert receipt.totals.noise == pytest.approx((sums[2] / sums[3]) ** 0.5, rel=1e-4)


def test_losing_half_of_the_delta_is_said_loudly(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(nf4, [(adapter, 0.05)], tmp_path / "out", quantize="keep",
                            rounding="nearest")  # fmt: skip
    assert any("LOST MORE THAN HALF" in warning for warning in receipt.warnings)


@pytest.mark.parametrize("options", [{"quantize": "keep", "seed": 5}, {}], ids=str)
def test_bytes_depend_on_neither_threads_nor_tiles(
    nf4: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:  # fmt: skip
    regraft.merge(nf4, adapter, tmp_path / "a", **options)
    monkeypatch.setattr("regraft.merging.planning.planner.LARGEST_TILE", 4096)
    monkeypatch.setattr("regraft.merging.planning.planner.SMALLEST_TILE", 256)
    monkeypatch.setattr("regraft.merging.planning.tiles.UNIT_COLUMNS", 16)
    monkeypatch.setattr("regraft.merging.planning.planner.BASELINE_BYTES", 512 * 2**20 - 60 * 2**20)
    regraft.merge(nf4, adapter, tmp_path / "b", threads=1, **options)
    weights = [sorted((tmp_path / n).glob("*.safetensors")) for n in "ab"]
    for one, other in zip(*weights, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_another_seed_gives_other_codes(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        regraft.merge(nf4, adapter, tmp_path / str(seed), quantize="keep", seed=seed, undo=False)
    one, two = tensors_of(tmp_path / "1"), tensors_of(tmp_path / "2")
    assert not np.array_equal(one[f"{toys.Q0}.weight"], two[f"{toys.Q0}.weight"])


# -- undo ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*OUT, *KEPT], ids=str)
def test_unmerging_gives_back_the_quantized_base(
    base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    regraft.merge(base, adapter, tmp_path / "out", **options)
    assert_restores(base, tmp_path / "out", tmp_path)
    report = regraft.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert report.verdict == "exact", report


@cache
def merged_afresh(kind: str, quantize: str | None) -> dict[str, bytes | None]:
    """Return what a merge of :func:`adapter` into a base of a kind gives."""
    with tempfile.TemporaryDirectory() as place:
        base, adapter = write_quantized(Path(place, "base"), kind), write_small(Path(place, "a"))
        regraft.merge(base, adapter, Path(place, "out"), quantize=quantize)
        return comparable(Path(place, "out"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *KEPT], ids=str)
def test_swapping_gives_what_a_merge_of_the_quantized_base_gives(
    base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    kind = request.node.callspec.params["base"]
    dora = write_adapter(tmp_path / "dora", toys.dora(toys.Q0, toys.HIDDEN, toys.HIDDEN),
                         target_modules=["q_proj"], use_dora=True)  # fmt: skip
    regraft.merge(base, [adapter, (dora, 0.5)], tmp_path / "out", **options)
    assert_restores(base, tmp_path / "out", tmp_path)
    for quantize in (None, "keep"):
        swapped = tmp_path / f"swapped{quantize}"
        regraft.swap(tmp_path / "out", adapter, swapped, quantize=quantize)
        assert comparable(swapped) == merged_afresh(kind, quantize)


def test_changed_codes_are_noticed_at_an_undo(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    regraft.merge(nf4, adapter, tmp_path / "out", quantize="keep")
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_torch(path)
        name = f"{toys.Q0}.weight"
        if name in tensors:
            tensors[name][3] ^= 0x21
            save_torch(tensors, path, {"format": "pt"})
    with pytest.raises(MismatchError, match="patch does not fit"):
        regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# -- the base of training --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_gap_to_the_base_of_training_is_reported(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    original = tmp_path / "base-plain"
    receipt = regraft.merge(original, adapter, tmp_path / "out", trained_on=nf4)
    regraft.dequantize(nf4, tmp_path / "plain", dtype="float32")
    there, here = tensors_of(tmp_path / "plain"), tensors_of(original)
    merged = [r for r in receipt.tensors if r.base_gap is not None]
    assert len(merged) == 2
    for record in merged:
        gap = np.linalg.norm(there[record.name].astype(np.float64) - here[record.name])
        assert record.base_gap == pytest.approx(gap, rel=1e-6)
    assert receipt.trained_on == str(nf4)
    small = regraft.merge(original, [(adapter, 0.01)], tmp_path / "small", trained_on=nf4)
    assert any("further from the one" in warning for warning in small.warnings)
    with_gap, without = tree(tmp_path / "out"), tmp_path / "without"
    regraft.merge(original, adapter, without)
    assert with_gap["model.safetensors"] == tree(without)["model.safetensors"]


def scales_in_a_file_of_their_own(base: Path) -> Path:
    """Move the scales of a base in NF4 into a file that holds nothing else; return the file."""
    index = toys.read_json(base / toys.INDEX)
    scales = {}
    for path in sorted(base.glob("model-*.safetensors")):
        tensors = load_torch(path)
        scales |= {name: tensors.pop(name) for name in [*tensors] if name.endswith(".absmax")}
        save_torch(tensors, path, {"format": "pt"})
    save_torch(scales, base / "scales.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(scales, "scales.safetensors")
    write_json(base / toys.INDEX, index)
    return base / "scales.safetensors"


def test_other_scales_of_the_base_of_training_start_afresh(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    original, seen = tmp_path / "base-plain", 0
    scales = scales_in_a_file_of_their_own(nf4)

    def interrupt(event: regraft.ProgressEvent) -> None:
        nonlocal seen
        seen += bool(event.tensor)
        if seen > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        regraft.merge(
            original, adapter, tmp_path / "out", trained_on=nf4, threads=1, progress=interrupt
        )
    assert "goes on from there" in "".join(caught.value.__notes__)
    doubled = {name: 2 * scale for name, scale in load_torch(scales).items()}
    save_torch(doubled, scales, {"format": "pt"})
    found = regraft.merge(original, adapter, tmp_path / "out", trained_on=nf4)
    fresh = regraft.merge(original, adapter, tmp_path / "fresh", trained_on=nf4)
    assert {r.name: r.base_gap for r in found.tensors} == {
        r.name: r.base_gap for r in fresh.tensors
    }


def test_a_base_of_training_with_other_shapes_is_refused(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = toys.llama_tensors() | {f"{toys.Q0}.weight": toys.draw(4, 4)}
    other = toys.write_base(tmp_path / "other", tensors)
    with pytest.raises(MismatchError, match="does not have this tensor"):
        regraft.merge(nf4, adapter, tmp_path / "out", trained_on=other)
    assert not (tmp_path / "out").exists()


# -- refused ---------------------------------------------------------------------------------------


def damage(folder: Path, ending: str, change: Any) -> None:
    """Change (or with None remove) the first tensor whose name ends so."""
    index = json.loads((folder / toys.INDEX).read_text())
    name = next(n for n in index["weight_map"] if n.endswith(ending))
    path = folder / index["weight_map"][name]
    tensors = load_torch(path)
    if change is None:
        del tensors[name], index["weight_map"][name]
        write_json(folder / toys.INDEX, index)
    else:
        tensors[name] = change(tensors[name])
    save_torch(tensors, path, {"format": "pt"})


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "scales are missing": ("weight.absmax", None, "lacks a part"),
    "a map is missing": ("nested_quant_map", None, "lacks a part"),
    "scales are too few": ("weight.absmax", lambda t: t[:-1].clone(), "part of another size"),
    "codes are truncated": ("q_proj.weight", lambda t: t[:-1].clone(), "part of another size"),
    "scales are NaN": ("nested_absmax", lambda t: t * float("nan"), "NaN or infinite"),
    "the map is another": ("weight.quant_map", lambda t: t * 2, "not that of nf4"),
    "the state is no JSON": ("__nf4", lambda t: t * 0 + 7, "state of a quantized weight"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_refused_by_tensor(tmp_path: Path, adapter: Path, name: str) -> None:
    base = write_quantized(tmp_path / "base", "nf4, double")
    ending, change, message = DAMAGES[name]
    damage(base, ending, change)
    for options in ({}, {"quantize": "keep"}):
        with pytest.raises(FormatError, match=message) as caught:
            regraft.merge(base, adapter, tmp_path / "out", **options)
        assert "proj.weight" in caught.value.problems[0].where
        assert {p.name for p in tmp_path.iterdir()} == {"base", "base-plain", "adapter"}


def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, adapter: Path) -> None:
    base = write_quantized(tmp_path / "base", "nf4", bnb_4bit_quant_type="fp4")
    with pytest.raises(FormatError, match="another kind of codes"):
        regraft.merge(base, adapter, tmp_path / "out")


def test_an_adapter_for_other_shapes_is_refused(nf4: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", toys.lora(toys.Q0, 8, 8), target_modules=["q_proj"])
    with pytest.raises(MismatchError, match="another shape"):
        regraft.merge(nf4, other, tmp_path / "out")


def test_keeping_what_is_not_quantized_is_refused(tmp_path: Path, adapter: Path) -> None:
    plain = toys.write_base(tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="no format to keep"):
        regraft.merge(plain, adapter, tmp_path / "out", quantize="keep")


@pytest.mark.parametrize("options", [{"rounding": "nearest"}, {"seed": 3}], ids=str)
def test_rounding_without_codes_is_refused(
    nf4: Path, adapter: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="rounding to codes needs codes"):
        regraft.merge(nf4, adapter, tmp_path / "out", **options)


@pytest.mark.slow
def test_an_adapter_that_replaces_a_quantized_weight_cannot_be_kept(
    nf4: Path, tmp_path: Path
) -> None:
    name = f"{toys.PREFIX}{toys.Q0}.weight"
    saved = write_adapter(
        tmp_path / "saved", {name: toys.draw(toys.HIDDEN, toys.HIDDEN)},
        target_modules=["v_proj"], modules_to_save=["q_proj"],
    )  # fmt: skip
    with pytest.raises(MismatchError, match="replaces a quantized weight"):
        regraft.merge(nf4, saved, tmp_path / "out", quantize="keep")
    regraft.merge(nf4, saved, tmp_path / "plain-out")
    assert_restores(nf4, tmp_path / "plain-out", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("unsloth/llama-3-8b-bnb-4bit", True), ("org/abnormal4bitter", False)]
)
def test_an_adapter_of_a_quantized_base_is_called_out_on_a_plain_one(
    nf4: Path, tmp_path: Path, name: str, said: bool
) -> None:
    adapter = write_adapter(tmp_path / "a", base_model_name_or_path=name)
    plain = tmp_path / "base-plain"

    def warned(base: Path, **options: Any) -> bool:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        receipt = regraft.merge(base, adapter, out, undo=False, **options)
        return any("--trained-on says" in warning for warning in receipt.warnings)

    assert warned(plain) == said
    assert not warned(nf4)
    assert not warned(plain, trained_on=nf4)
