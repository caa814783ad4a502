"""Two checkpoints or adapters are compared: what differs, how far, and what does not count."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import regraft
from deltas.reference import STORED
from merging import toys
from merging.processes import python
from regraft.deltas.kernels.distance import VALUE_DTYPES, Distance, distance
from regraft.formats.safetensors import build_header
from regraft.tensors import DTYPES, nbytes_of
from regraft.verifying.diffing import report as diff_report
from regraft.verifying.diffing import tensors as diff_tensors

NUMPY = {**STORED, "F64": np.float64}
"""The numpy dtype of each dtype that is compared by value."""


def unsigned(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def naive(x: np.ndarray, y: np.ndarray) -> Distance:
    """Return how far Y is from X, the plain way."""
    known, other = x.astype(np.float64), y.astype(np.float64)
    one_dtype = x.dtype == y.dtype
    differs = unsigned(x) != unsigned(y) if one_dtype else unsigned(known) != unsigned(other)
    finite = np.isfinite(known) & np.isfinite(other)
    known, other = known[finite], other[finite]
    apart = np.abs(other - known)
    ulps = 0
    if one_dtype and x.dtype != np.float64:
        ulps = int(np.max(np.abs(ordered(x) - ordered(y))[finite], initial=0))
    return Distance(
        changed=int(differs.sum()),
        not_finite=int((differs & ~finite).sum()),
        weight=float((known**2).sum()),
        delta=float((apart**2).sum()),
        largest=float(apart.max(initial=0)),
        ulps=ulps,
    )


def ordered(values: np.ndarray) -> np.ndarray:
    """Return integers in the order of the numbers, neighbours one apart."""
    bits = unsigned(values).astype(np.int64)
    sign = 1 << (8 * values.itemsize - 1)
    return np.where(bits & sign, -(bits & (sign - 1)), bits)


def as_bytes(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(bytearray(values.tobytes()), np.uint8)


def assert_close(found: Distance, expected: Distance) -> None:
    counts = ("changed", "not_finite", "largest", "ulps")
    assert [getattr(found, n) for n in counts] == [getattr(expected, n) for n in counts]
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-12)
    np.testing.assert_allclose(found.delta, expected.delta, rtol=1e-12)


# ---- the statistics of two pieces


def patterns(bits: int) -> st.SearchStrategy[int]:
    """Return the bits of any number, often a special one."""
    exponent = {16: 0x7C00, 32: 0x7F800000, 64: 0x7FF0 << 48}[bits]
    special = [0, 1, exponent, exponent - 1, exponent + 1, 0x7F80 if bits == 16 else 2]
    signs = [value | 1 << (bits - 1) for value in special]
    return st.integers(0, 2**bits - 1) | st.sampled_from(special + signs)


@pytest.mark.slow
@settings(deadline=None, max_examples=120)
@given(st.data())
def test_two_pieces_of_one_dtype_are_measured_as_numpy_would(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(STORED)))
    bits = DTYPES[dtype].bits
    pairs = st.tuples(patterns(bits), patterns(bits)) | patterns(bits).map(lambda p: (p, p))
    drawn = np.array(data.draw(st.lists(pairs, max_size=20)), f"u{bits // 8}").reshape(-1, 2)
    x, y = (np.ascontiguousarray(side).view(NUMPY[dtype]) for side in drawn.T)
    with np.errstate(all="ignore"):
        assert_close(distance(as_bytes(x), dtype, as_bytes(y), dtype), naive(x, y))


@pytest.mark.parametrize("length", [1, 511, 512, 513, 2000])
@pytest.mark.parametrize("x_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("y_dtype", VALUE_DTYPES)
def test_floats_of_any_two_dtypes_are_measured_by_value(
    x_dtype: str, y_dtype: str, length: int
) -> None:
    values = toys.draw(length, seed=length).astype(np.float64)
    x = values.astype(NUMPY[x_dtype])
    y = (values * (1 + 0.01 * toys.draw(length, seed=1))).astype(NUMPY[y_dtype])
    y[::3] = x[::3].astype(y.dtype)
    x[7::50], y[8::50], x[9::50], y[9::50] = np.nan, np.inf, np.nan, np.nan
    with np.errstate(all="ignore"):
        assert_close(distance(as_bytes(x), x_dtype, as_bytes(y), y_dtype), naive(x, y))


def test_signs_of_zero_differ_in_bits_and_in_nothing_else() -> None:
    x, y = np.zeros(3, np.float32), -np.zeros(3, np.float32)
    found = distance(as_bytes(x), "F32", as_bytes(y), "F32")
    assert found == Distance(changed=3)


def test_the_farthest_floats_are_counted_exactly() -> None:
    top = np.finfo(np.float32).max
    x, y = np.array([-top], np.float32), np.array([top], np.float32)
    found = distance(as_bytes(x), "F32", as_bytes(y), "F32")
    assert (found.largest, found.ulps) == (2 * float(top), 2 * 0x7F7FFFFF)


# ---- files


def write_raw(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """Write a model whose tensors are given as bytes, of any dtype."""
    folder.mkdir(parents=True)
    header = build_header([(n, d, s) for n, (d, s, _) in tensors.items()], {})
    content = b"".join(raw for _, _, raw in tensors.values())
    (folder / "model.safetensors").write_bytes(header + content)
    return folder


def two(tmp_path: Path, x: toys.Tensors, y: toys.Tensors, **options: Any) -> regraft.DiffReport:
    """Compare two models of one file each."""
    one = toys.write_base(tmp_path / "x", x, {})
    return regraft.diff(one, toys.write_base(tmp_path / "y", y, {}), **options)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return toys.write_adapter(tmp_path / "adapter")


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_tensors, "TILE_BYTES", 512)


def test_a_model_is_the_same_as_itself_and_as_its_copy(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    for other in (base, copy, str(copy)):
        report = regraft.diff(base, other)
        assert report.same
        assert (report.kind, report.same_layout) == ("checkpoint", True)
        assert report.unchanged == report.x.tensors == len(toys.llama_tensors())
        assert report.relative is None


def test_what_is_one_place_on_the_disk_is_not_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in base.iterdir():
        (linked / path.name).symlink_to(path)
    monkeypatch.setattr("regraft.formats.files.reading.FilePool.read_into", pytest.fail)
    assert regraft.diff(base, linked).same


def test_other_files_and_another_order_are_only_told(base: Path, tmp_path: Path) -> None:
    sharded = toys.write_sharded_base(tmp_path / "sharded")
    report = regraft.diff(base, sharded)
    assert report.same
    assert not report.same_layout
    assert (report.x.files, report.y.files) == (1, 3)
    assert regraft.diff(sharded, base).same
    backwards = toys.write_base(tmp_path / "b", dict(reversed(toys.llama_tensors().items())))
    assert regraft.diff(base, backwards).same_layout


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.usefixtures("_small_tiles")
def test_changed_tensors_are_measured_over_all_their_tiles(
    tmp_path: Path, dtype: str, threads: int
) -> None:
    x = {
        "late": toys.draw(70, 33, dtype=NUMPY[dtype]),
        "early": toys.draw(70, 33, seed=1, dtype=NUMPY[dtype]),
        "all": toys.draw(70, 33, seed=2, dtype=NUMPY[dtype]),
        "same": toys.draw(70, 33, seed=3, dtype=NUMPY[dtype]),
    }
    y = {name: values.copy() for name, values in x.items()}
    y["late"][-1, -1] += 1
    y["early"][0, 0] += 1
    y["all"] *= NUMPY[dtype](1.5)
    report = two(tmp_path, x, y, threads=threads)
    assert [t.name for t in report.changed] == ["all", "early", "late"]
    assert (report.unchanged, report.same) == (1, False)
    for tensor in report.changed:
        expected = naive(x[tensor.name], y[tensor.name])
        assert tensor.changed == expected.changed
        assert tensor.largest == expected.largest
        assert tensor.ulps == (None if dtype == "F64" else expected.ulps)
        assert tensor.weight_norm == pytest.approx(math.sqrt(expected.weight), rel=1e-8)
        assert tensor.delta_norm == pytest.approx(math.sqrt(expected.delta), rel=1e-8)
        assert tensor.relative == pytest.approx(math.sqrt(expected.delta / expected.weight))
    weight = sum(naive(x[t.name], y[t.name]).weight for t in report.changed)
    delta = sum(naive(x[t.name], y[t.name]).delta for t in report.changed)
    assert report.relative == pytest.approx(math.sqrt(delta / weight))


@pytest.mark.usefixtures("_small_tiles")
def test_the_report_does_not_depend_on_the_threads(tmp_path: Path) -> None:
    x = {f"t{n}": toys.draw(40, 40, seed=n) for n in range(8)}
    y = {name: values + (values > 1) / 7 for name, values in x.items()}
    y = {name: values.astype(np.float32) for name, values in y.items()}
    reports = [two(tmp_path, x, y, threads=threads).to_json() for threads in (1, 2, 7)]
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_small_tiles")
def test_every_dtype_is_compared(tmp_path: Path, dtype: str) -> None:
    shape, bits = (30, 32), DTYPES[dtype].bits
    raw = np.random.default_rng(0).integers(0, 2, nbytes_of(dtype, shape), np.uint8)
    other = raw.copy()
    for element in (0, 500, 501, 959):
        other[element * bits // 8] ^= 0x24 if bits >= 8 else 1 << element * bits % 8
    same = two_raw(tmp_path / "same", dtype, shape, raw, raw)
    assert same.same
    (tensor,) = two_raw(tmp_path / "other", dtype, shape, raw, other).changed
    assert tensor.changed == 4
    assert (tensor.delta_norm is not None) == (dtype in VALUE_DTYPES)
    assert (tensor.ulps is not None) == (dtype in STORED)


def two_raw(
    folder: Path, dtype: str, shape: tuple[int, ...], x: np.ndarray, y: np.ndarray
) -> regraft.DiffReport:
    one = write_raw(folder / "x", {"t": (dtype, shape, x.tobytes())})
    return regraft.diff(one, write_raw(folder / "y", {"t": (dtype, shape, y.tobytes())}))


@pytest.mark.parametrize("dtype", ["F32", "I64", "F8_E4M3"])
def test_scalars_and_tensors_without_elements(tmp_path: Path, dtype: str) -> None:
    size = DTYPES[dtype].bits // 8
    one, zero = b"\1" * size, b"\0" * size
    x = {"none": (dtype, (0, 4), b""), "one": (dtype, (), zero), "row": (dtype, (1,), one)}
    y = {"none": (dtype, (0, 4), b""), "one": (dtype, (), one), "row": (dtype, (1,), one)}
    report = regraft.diff(write_raw(tmp_path / "x", x), write_raw(tmp_path / "y", y))
    assert [(t.name, t.changed) for t in report.changed] == [("one", 1)]
    assert report.unchanged == 2


def test_an_empty_tensor_of_another_dtype_or_shape_differs(tmp_path: Path) -> None:
    x = {"a": np.zeros((0, 4), np.float32), "b": np.zeros((0, 4), np.float32)}
    y = {"a": np.zeros((0, 4), np.float64), "b": np.zeros((4, 0), np.float32)}
    report = two(tmp_path, x, y)
    assert [(t.name, t.changed) for t in report.changed] == [("a", 0), ("b", None)]
    json.dumps(report.to_json(), allow_nan=False)


def test_models_without_tensors_are_the_same(tmp_path: Path) -> None:
    assert two(tmp_path, {}, {}).same


def test_a_wider_dtype_with_the_same_values_differs_in_no_element(tmp_path: Path) -> None:
    x = {"t": toys.draw(20, 20, dtype=toys.BF16)}
    (tensor,) = two(tmp_path, x, {"t": x["t"].astype(np.float32)}).changed
    assert tensor.dtypes == ("BF16", "F32")
    assert (tensor.changed, tensor.relative, tensor.largest, tensor.ulps) == (0, 0.0, 0.0, None)


def test_a_narrower_dtype_is_measured_by_value(tmp_path: Path) -> None:
    x = {"t": toys.draw(20, 20)}
    y = {"t": x["t"].astype(toys.BF16)}
    (tensor,) = two(tmp_path, x, y).changed
    expected = naive(x["t"], y["t"])
    assert tensor.changed == expected.changed > 0
    assert tensor.relative == pytest.approx(math.sqrt(expected.delta / expected.weight))


def test_what_cannot_be_compared_element_by_element_is_changed(tmp_path: Path) -> None:
    values = toys.draw(4, 6)
    x = {"dtype": values, "shape": values, "both": values}
    y = {"dtype": values.astype(np.int64), "shape": values.T.copy(), "both": np.zeros(3, np.int8)}
    report = two(tmp_path, x, y)
    assert {t.name for t in report.changed} == set(x)
    assert all(t.changed is t.relative is t.largest is t.ulps is None for t in report.changed)
    shapes = {t.name: t.shapes for t in report.changed}
    assert shapes["shape"] == ((4, 6), (6, 4))


def test_tensors_of_one_side_are_named(tmp_path: Path) -> None:
    both = toys.draw(3)
    report = two(tmp_path, {"both": both, "old": both}, {"both": both, "new": both})
    assert [(t.name, t.dtype, t.shape) for t in report.added] == [("new", "F32", (3,))]
    assert [t.name for t in report.removed] == ["old"]
    assert (report.changed, report.unchanged, report.same) == ((), 1, False)


def test_nan_is_the_same_as_its_own_bits_alone(tmp_path: Path) -> None:
    x = np.array([np.nan, np.nan, 1, np.inf, np.inf, 3, 4], np.float32)
    y = np.array([np.nan, 1, np.nan, np.inf, -np.inf, 3, 5], np.float32)
    assert two(tmp_path / "same", {"t": x}, {"t": x.copy()}).same
    (tensor,) = two(tmp_path / "other", {"t": x}, {"t": y}).changed
    assert (tensor.changed, tensor.not_finite) == (4, 3)
    assert (tensor.weight_norm, tensor.delta_norm, tensor.largest) == (5.0, 1.0, 1.0)


def test_what_was_all_zero_moved_infinitely_far(tmp_path: Path) -> None:
    x, y = {"t": np.zeros(4, np.float32)}, {"t": np.ones(4, np.float32)}
    report = two(tmp_path, x, y)
    assert report.changed[0].relative == report.relative == math.inf
    answer = report.to_json()
    assert answer["changed"][0]["relative"] is answer["relative"] is None
    assert answer["changed"][0]["delta_norm"] == 2.0


def test_values_too_large_to_square_are_said_not_to_be_measured(tmp_path: Path) -> None:
    x, y = {"t": np.full(4, -1.7e308)}, {"t": np.full(4, 1.7e308)}
    report = two(tmp_path, x, y)
    (tensor,) = report.changed
    assert (tensor.changed, tensor.weight_norm, tensor.relative) == (4, None, None)
    json.dumps(report.to_json(), allow_nan=False)


def test_the_difference_a_merge_makes_is_what_its_receipt_says(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    report = regraft.diff(base, tmp_path / "out")
    merged = {r.name: r for r in receipt.tensors if r.action == "merge"}
    assert {t.name: t.changed for t in report.changed} == {
        name: record.changed for name, record in merged.items()
    }
    for tensor in report.changed:
        assert tensor.weight_norm == pytest.approx(merged[tensor.name].weight_norm, rel=1e-8)
    assert report.config == ()
    assert report.unchanged == receipt.totals.tensors - len(merged)


# ---- configs and other files


def configs(tmp_path: Path, x: Any, y: Any) -> dict[str, tuple[str, Any, Any]]:
    """Return what differs between two configs."""
    one = toys.write_base(tmp_path / "x", {}, x)
    report = regraft.diff(one, toys.write_base(tmp_path / "y", {}, y))
    assert report.same == (not report.config)
    return {change.key: (change.change, change.x, change.y) for change in report.config}


def test_configs_are_compared_key_by_key(tmp_path: Path) -> None:
    x = {"a": 1, "old": None, "text": {"deep": {"n": 1, "same": 2}, "l": [1, 2]}, "kind": {}}
    y = {"text": {"l": [2, 1], "deep": {"same": 2, "n": 3}}, "a": 1, "new": {"b": 1}, "kind": 5}
    assert configs(tmp_path, x, y) == {
        "old": ("removed", None, None),
        "text.deep.n": ("changed", 1, 3),
        "text.l": ("changed", [1, 2], [2, 1]),
        "kind": ("changed", {}, 5),
        "new": ("added", None, {"b": 1}),
    }


def test_values_that_mean_the_same_are_the_same(tmp_path: Path) -> None:
    x = {"n": 10000, "nan": float("nan"), "list": [1, float("nan"), {"a": 1}], "b": True}
    y = {"n": 10000.0, "nan": float("nan"), "list": [1.0, float("nan"), {"a": 1.0}], "b": 1}
    assert configs(tmp_path, x, y) == {"b": ("changed", True, 1)}


def test_a_config_that_one_side_lacks_differs(tmp_path: Path) -> None:
    found = configs(tmp_path, None, {"model_type": "llama"})
    assert found == {"model_type": ("added", None, "llama")}


def test_sets_in_an_adapters_config_have_no_order(tmp_path: Path) -> None:
    x = toys.write_adapter(tmp_path / "x", target_modules=["v_proj", "q_proj"])
    y = toys.write_adapter(tmp_path / "y", target_modules=["q_proj", "v_proj"])
    assert regraft.diff(x, y).same
    z = toys.write_adapter(tmp_path / "z", target_modules=["q_proj"], rank_pattern={"a.b": 3})
    keys = [change.key for change in regraft.diff(x, z).config]
    assert keys == ["target_modules", "rank_pattern"]


def test_files_beside_the_weights_are_told_and_make_no_difference(
    base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    for folder, words in ((base, "one"), (copy, "two")):
        (folder / "tokenizer.json").write_text(words)
        (folder / "README.md").write_text(words)
        (folder / ".gitattributes").write_text(words)
        (folder / "regraft").mkdir()
        (folder / "regraft" / "receipt.json").write_text(words)
        (folder / "same.txt").write_text("same")
    (base / "merges.txt").write_text("")
    (copy / "chat_template.jinja").write_text("longer")
    report = regraft.diff(base, copy)
    assert report.same
    assert [(f.name, f.change) for f in report.files] == [
        ("chat_template.jinja", "added"),
        ("merges.txt", "removed"),
        ("tokenizer.json", "changed"),
    ]


def test_of_lone_files_tensors_alone_are_compared(base: Path, tmp_path: Path) -> None:
    lone = shutil.copy(base / "model.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    for x, y in ((base, lone), (lone, base), (lone, base / "model.safetensors")):
        report = regraft.diff(x, y)
        assert report.same
        assert report.same_layout
        assert (report.config, report.files) == ((), ())
    assert (report.x.single_file, report.y.single_file) == (True, True)


# ---- adapters


def test_adapters_are_compared(adapter: Path, tmp_path: Path) -> None:
    tensors = toys.attention()
    name = next(iter(tensors))
    tensors[name] = tensors[name] * np.float32(1.25)
    other = toys.write_adapter(tmp_path / "other", tensors, lora_alpha=12)
    report = regraft.diff(adapter, other, raw=True)
    assert report.kind == "adapter"
    assert [(t.name, t.relative) for t in report.changed] == [(name, pytest.approx(0.25))]
    assert [(c.key, c.x, c.y) for c in report.config] == [("lora_alpha", toys.ALPHA, 12)]


def test_lone_files_of_lora_factors_need_no_config(adapter: Path, tmp_path: Path) -> None:
    lone = shutil.copy(adapter / "adapter_model.safetensors", tmp_path / "style.safetensors")
    for other in (adapter, adapter / "adapter_model.safetensors", lone):
        report = regraft.diff(lone, other)
        assert (report.kind, report.same) == ("adapter", True)


def test_pytorch_files_are_compared_with_safetensors(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    for source, name, weights in (
        (base, "model.safetensors", "pytorch_model.bin"),
        (adapter, "adapter_model.safetensors", "adapter_model.bin"),
    ):
        folder = shutil.copytree(source, tmp_path / weights)
        torch.save(load_torch(folder / name), folder / weights)
        (folder / name).unlink()
        assert regraft.diff(source, folder).same
        assert regraft.diff(folder / weights, source).same


# ---- the Hub


@pytest.mark.parametrize("make", [toys.write_base, toys.write_adapter])
def test_hub_ids_are_fetched_by_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    folder, fetched = make(tmp_path / "hub"), []

    def snapshot(reference: Any, kind: str, token: str | None) -> Path:
        fetched.append((reference.repo_id, reference.revision, kind, token))
        return folder

    monkeypatch.setattr("regraft.formats.hub._snapshot", snapshot)
    report = regraft.diff("org/model@v2", folder, token="secret")
    assert report.same
    assert (report.x.source, report.x.revision) == ("org/model@v2", "v2")
    kinds = ["adapter"] if report.kind == "adapter" else ["adapter", "base"]
    assert fetched == [("org/model", "v2", kind, "secret") for kind in kinds]


# ---- refusals


def test_an_adapter_and_a_model_are_not_compared(base: Path, adapter: Path) -> None:
    for x, y in ((base, adapter), (adapter, base)):
        with pytest.raises(regraft.InputError, match="cannot be compared") as caught:
            regraft.diff(x, y)
        found = caught.value.problems[0].found
        assert f"'{base}', a full model" in found
        assert f"'{adapter}', an adapter" in found


def test_bad_inputs_are_typed_errors(base: Path, tmp_path: Path) -> None:
    with pytest.raises(regraft.InputError, match="no such file or folder"):
        regraft.diff(base, tmp_path / "nothing")
    with pytest.raises(regraft.InputError, match="is not a checkpoint"):
        regraft.diff(tmp_path, base)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(regraft.UnsupportedError):
        regraft.diff(base, tmp_path / "model.gguf")
    with pytest.raises(regraft.UsageError, match="threads"):
        regraft.diff(base, base, threads=0)


def test_a_missing_shard_is_a_typed_error(base: Path, tmp_path: Path) -> None:
    sharded = toys.write_sharded_base(tmp_path / "sharded")
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(regraft.FormatError, match="a shard is missing"):
        regraft.diff(base, sharded)


def test_a_file_that_shrinks_meanwhile_is_a_typed_error(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")

    def cut(event: regraft.ProgressEvent) -> None:
        if event.stage == "compare":
            with (copy / "model.safetensors").open("r+b") as file:
                file.truncate(5000)

    with pytest.raises(regraft.ChangedError, match="changed while it was being read") as caught:
        regraft.diff(base, copy, threads=1, progress=cut)
    assert "ends inside a tensor" in str(caught.value.__cause__)


# ---- progress, memory, what is loaded


@pytest.mark.usefixtures("_small_tiles")
def test_progress_grows_to_its_total_and_names_every_tensor(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    changed = {name: values * values.dtype.type(2) for name, values in tensors.items()}
    other = toys.write_base(tmp_path / "other", changed)
    seen: list[regraft.ProgressEvent] = []
    report = regraft.diff(base, other, progress=seen.append)
    assert seen[0] == regraft.ProgressEvent("read", 0, 0)
    assert {event.stage for event in seen[1:]} == {"compare"}
    done = [event.done for event in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total == report.x.bytes + report.y.bytes
    assert {event.tensor for event in seen} - {""} == set(tensors)


def test_an_error_in_the_callback_stops_the_work(base: Path, tmp_path: Path) -> None:
    def fail(event: regraft.ProgressEvent) -> None:
        if event.stage == "compare":
            raise RuntimeError("enough")

    copy = shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(RuntimeError, match="enough"):
        regraft.diff(base, copy, progress=fail)


MEASURE = """
import sys
import regraft
from regraft.system.memory import peak_memory
report = regraft.diff(*sys.argv[1:], threads=2)
print(int(report.same), "numba" in sys.modules, peak_memory())
"""


@pytest.mark.slow
def test_memory_does_not_grow_and_equal_models_need_no_compiled_code(tmp_path: Path) -> None:
    folders = []
    for name in "xy":
        header = build_header([("t", "BF16", (256, 2**18))], {})
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2**27)
        folders.append(tmp_path / name)
    same, numba, peak = python(MEASURE, *folders).stdout.split()
    assert (same, numba) == ("1", "False")
    assert int(peak) < 2**26


def test_the_fields_are_explained() -> None:
    for kind in ("DiffReport", "DiffSide", "LoneTensor", "TensorChange", "ConfigChange"):
        found = getattr(diff_report, kind)
        text = found.__doc__.partition("Attributes:")[2]
        assert [name for name in found.__dataclass_fields__ if f"    {name}: " not in text] == []


def test_the_verb_says_what_it_takes_and_raises() -> None:
    text = regraft.diff.__doc__ or ""
    for name in ("x", "y", "threads", "token", "progress"):
        assert f"        {name}: " in text.partition("Args:")[2]


def test_what_is_loaded_by_the_helpers_is_what_was_saved(tmp_path: Path) -> None:
    values = toys.draw(3, 5)
    save_file({"t": values}, tmp_path / "lib.safetensors")
    raw = write_raw(tmp_path / "raw", {"t": ("F32", (3, 5), values.tobytes())})
    assert regraft.diff(tmp_path / "lib.safetensors", raw).same


def test_of_tensors_of_two_sizes_the_elements_are_those_of_the_first(tmp_path: Path) -> None:
    folders = [
        toys.write_base(tmp_path / name, {"a.weight": toys.draw(*shape)}, None)
        for name, shape in (("x", (3, 5)), ("y", (7, 5)))
    ]
    (change,) = regraft.diff(*folders).changed
    assert (change.elements, change.shapes) == (15, ((3, 5), (7, 5)))
