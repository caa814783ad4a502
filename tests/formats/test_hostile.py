"""Hostile files: short runs of the fuzzer, what it would notice, and claims that cost nothing."""

from __future__ import annotations

import ast
import difflib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import regraft
from regraft.adapters.dialects.peft import read_adapter
from regraft.errors import AdapterError, FormatError, RegraftError
from regraft.formats.adapter_files import open_adapter
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.files.json_file import read_json
from regraft.formats.hub import Located
from regraft.formats.remote import checkpoint_of
from regraft.formats.safetensors import build_header, read_header
from regraft.formats.torch_zip import read_torch_file
from regraft.merging.options import MergeOptions
from regraft.merging.planning.planner import make_plan
from regraft.tensors import TensorSpec
from regraft.testing.hostile import files, folders, pickles, tiny
from regraft.testing.hostile.files import run_headers, run_json, run_tensors
from regraft.testing.hostile.folders import run_merges, run_sides
from regraft.testing.hostile.headers import mutated_headers
from regraft.testing.hostile.mutation import Kind, mutated_json, mutated_tensors
from regraft.testing.hostile.pickles import mutated_pickles, run_pickles
from regraft.testing.hostile.report import FuzzReport, unsound

SOURCES = Path(regraft.__file__).parent


def assert_clean(report: FuzzReport, count: int) -> None:
    assert report.failures == []
    assert (report.count, report.failed) == (count, 0)
    assert report.accepted > count / 20
    assert report.growth < 32 * 2**20
    assert report.slowest < 10


# The runs, short


@pytest.mark.slow
def test_headers_are_read_as_the_reference_reads_them_or_refused(tmp_path: Path) -> None:
    report = run_headers(6_000, "test", tmp_path)
    assert_clean(report, 6_000)
    assert report.refused > 3_000
    assert "the tensor's name is unsafe" in report.stricter


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "index", "config"])
def test_json_files_give_a_plan_or_a_typed_error(kind: Kind, tmp_path: Path) -> None:
    count = 1_000 if kind == "config" else 400  # few of a config's fields are looked at
    report = run_json(count, "test", kind, tmp_path)
    assert_clean(report, count)
    assert len(report.reasons) >= 5


@pytest.mark.slow
def test_odd_tensors_give_a_plan_or_a_typed_error(tmp_path: Path) -> None:
    report = run_tensors(400, "test", tmp_path)
    assert_clean(report, 400)
    assert len(report.reasons) >= 8


@pytest.mark.slow
def test_pytorch_files_are_read_as_pytorch_reads_them_or_refused(tmp_path: Path) -> None:
    report = run_pickles(600, "test", tmp_path)
    assert_clean(report, 600)
    assert len(report.reasons) >= 5


@pytest.mark.slow
def test_a_changed_merge_gives_its_base_or_a_typed_error(tmp_path: Path) -> None:
    report = run_merges(40, "test", tmp_path)
    assert report.failures == []
    assert (report.count, report.failed) == (40, 0)
    assert len(report.reasons) >= 5


@pytest.mark.slow
def test_changed_side_files_change_no_weights(tmp_path: Path) -> None:
    report = run_sides(25, "test", tmp_path)
    assert_clean(report, 25)


def test_a_seed_makes_the_same_files_again() -> None:
    makers: tuple[Callable[[int], Iterator[Any]], ...] = (
        lambda seed: mutated_pickles(seed, 50),
        lambda seed: folders.mutated_merges(seed, 50, {"regraft/receipt.json": b"{}"}),
        lambda seed: folders.mutated_sides(seed, 50, folders.sound_base(), folders.sound_adapter()),
        lambda seed: mutated_headers(seed, 50),
        lambda seed: mutated_json(seed, 50, "adapter"),
        lambda seed: mutated_tensors(seed, 50),
    )
    for make in makers:
        assert list(make(1)) == list(make(1))
        assert list(make(1)) != list(make(2))


# What a run would notice


@pytest.mark.slow
def test_a_run_notices_what_the_reference_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(files, "_reference", lambda _: None)
    report = run_headers(200, 0, tmp_path)
    assert report.lenient > 0
    assert "the reference parser refuses it" in report.failures[0].what


@pytest.mark.slow
def test_a_run_notices_that_a_header_is_read_in_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def swapped(path: Path) -> Any:
        header = read_header(path)
        for name, spec in header.tensors.items():
            moved = TensorSpec(name, spec.dtype, spec.shape, path, spec.start + 1, spec.nbytes)
            header.tensors[name] = moved
        return header

    monkeypatch.setattr(files, "read_header", swapped)
    assert run_headers(300, 0, tmp_path).differing > 0


@pytest.mark.slow
def test_a_run_notices_that_pytorch_reads_other_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def swapped(path: Path) -> Any:
        specs = read_torch_file(path)
        return dict(zip(specs, reversed(specs.values()), strict=True))

    monkeypatch.setattr(pickles, "read_torch_file", swapped)
    assert run_pickles(60, 0, tmp_path).differing > 0


@pytest.mark.slow
def test_a_run_notices_another_base_and_other_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merge, unmerge = regraft.merge, regraft.unmerge

    def other_base(merged: Path, out: Path) -> Any:
        done = unmerge(merged, out)
        (out / "added.py").touch()
        return done

    def other_weights(base: Path, adapters: Any, out: Path) -> Any:
        plain = (base / "README.md").read_bytes() == folders.README.encode()
        return merge(base, adapters, out, dtype=None if plain else "float32")

    monkeypatch.setattr(regraft, "unmerge", other_base)
    monkeypatch.setattr(regraft, "merge", other_weights)
    assert run_merges(20, 2, tmp_path).differing > 0
    assert run_sides(10, 0, tmp_path).differing > 0


@pytest.mark.slow
def test_a_run_notices_other_errors_and_errors_that_say_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: Path) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(files, "read_header", broken)
    report = run_headers(10, 0, tmp_path)
    assert report.untyped == 10
    assert "ValueError: no such thing at " in report.failures[0].what
    for error in (FormatError([]), FormatError("bad"), FormatError("bad\x1b[2J", where="x")):
        assert unsound(error)
    assert unsound(FormatError("bad", where="a file named é")) is None


# Claims are checked before anything is made of them


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Path]:
    return files.write_model(tmp_path)


def located(path: Path) -> Located:
    return Located(path, str(path), None, None)


def plan(base: Path, adapter: Path) -> Any:
    options = MergeOptions(threads=1)
    read = read_adapter(open_adapter(located(adapter)))
    return make_plan(open_checkpoint(located(base)), [read], options, None)


def changed(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def peak_of(attempt: Callable[[], Any]) -> tuple[int, float, str]:
    """Return the most bytes in use at a time, seconds, and the error's message."""
    tracemalloc.start()
    begin = time.process_time()
    message = ""
    try:
        attempt()
    except RegraftError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, time.process_time() - begin, message


CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "a rank of a billion": ({"r": 10**9}, "rank is not the config's"),
    "a rank of 400 digits": ({"r": 10**400}, "a positive whole number"),
    "a rank of true": ({"r": True}, "found True"),
    "a rank of a fraction": ({"r": 8.0}, "found 8.0"),
    "a rank of minus one": ({"r": -1}, "a positive whole number"),
    "alpha beyond floats": ({"lora_alpha": float("inf")}, "a finite number"),
    "alpha that is no number": ({"lora_alpha": float("nan")}, "a finite number"),
    "a rank of a billion for some": ({"rank_pattern": {"q_proj": 10**9}}, "rank is not"),
    "a hundred thousand ranks": (
        {"rank_pattern": {f"m{i:x}": 1 for i in range(100_000)}}, ""),
    "a layer of a billion": ({"layers_to_transform": [10**9]}, "does not target"),
    "a row of 10**15": ({"trainable_token_indices": {"embed_tokens": [3, 10**15]}}, "rows below"),
    "a row of 400 digits": ({"trainable_token_indices": [10**400, 3]}, "lists of row numbers"),
    "a class that is a list": ({"auto_mapping": {"base_model_class": ["x"]}}, "expected str"),
    "a bias of a million letters": ({"bias": "x" * 10**6}, ""),
    "an expression of a million letters": ({"target_modules": "x" * 10**6}, "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_in_an_adapters_config_costs_nothing(claim: str, model: tuple[Path, Path]) -> None:
    fields, message = CLAIMS[claim]
    changed(model[1], "adapter_config.json", **fields)
    peak, seconds, found = peak_of(lambda: plan(*model))
    assert message in found
    assert len(found) < 50_000
    assert peak < 120 * 2**20
    assert seconds < 30  # counting every allocation takes most of it


@pytest.mark.parametrize("shape", [[10**15], [10**9, 10**9], [2**62, 8, 0], [10**15, 0]])
def test_a_claim_in_a_header_costs_nothing(shape: list[int], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    raw = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    peak, _, found = peak_of(lambda: read_header(path))
    assert found or shape == [10**15, 0]  # which is sound, and holds nothing
    assert peak < 2**20


def test_experts_without_end_cost_nothing(model: tuple[Path, Path]) -> None:
    base, adapter = model
    name = "model.layers.0.mlp.experts.gate_up_proj"
    key = "base_model.model.model.layers.0.mlp.experts"
    stacks = ([(name, "BF16", (10**9, 2, 2))], [
        (f"{key}.lora_A.weight", "F32", (2 * 10**9, 2)),
        (f"{key}.lora_B.weight", "F32", (2, 2 * 10**9)),
    ])  # fmt: skip
    for folder, file, tensors in zip(
        model, ("model.safetensors", "adapter_model.safetensors"), stacks, strict=True
    ):
        header = build_header(tensors, {})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(TENSOR_BYTES[d] * s[0] * s[1] * (s[2:] or (1,))[0]
                                           for _, d, s in tensors))  # fmt: skip
    changed(adapter, "adapter_config.json", target_parameters=["experts.gate_up_proj"],
            target_modules=None, modules_to_save=None, trainable_token_indices=None)  # fmt: skip
    peak, _, found = peak_of(lambda: plan(base, adapter))
    assert "too many experts" in found
    assert peak < 20 * 2**20


TENSOR_BYTES = {"BF16": 2, "F32": 4}


def test_a_json_file_of_many_small_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": [' + b"[]," * 2_000_000 + b"[]]}")
    peak, _, found = peak_of(lambda: read_json(path, max_bytes=8 * 2**20))
    assert "4000003 brackets and commas" in found
    assert peak < 20 * 2**20


def test_a_zip_with_a_huge_directory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    size = 2**30
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size - 4, 4))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, size, 1))
        file.write(struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 1, 1, 46, 4, 0))
    peak, _, found = peak_of(lambda: read_torch_file(path))
    assert "a directory of 1073741820 bytes" in found
    assert peak < 2**20


def test_a_storage_that_claims_more_than_the_zip_holds_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(77)}, path)
    claimed = pickle.encode_long(10**14)
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            long = b"\x8a" + bytes([len(claimed)]) + claimed
            archive.writestr(name, content.replace(b"KM", long) if "data.pkl" in name else content)
    peak, _, found = peak_of(lambda: read_torch_file(path))
    assert found
    assert peak < 20 * 2**20


# Names


@pytest.mark.parametrize("name", ["x" * 1025, "a\u200bb", "a\u2066b", "\ufeffa", "a\U000e0041"])
def test_a_name_that_is_very_long_or_hides_something_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    raw = json.dumps({name: entry}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(FormatError, match="name is unsafe"):
        read_header(path)
    path.write_bytes(build_header([("x" * 1024, "U8", (0,))], {}))
    assert read_header(path).tensors


@pytest.mark.slow
def test_names_that_are_all_different_are_not_compared_for_ever(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []

    def counted(*arguments: Any, **options: Any) -> list[str]:
        searches.append(arguments)
        return get_close_matches(*arguments, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    base, adapter = model
    words = [f"{i:032b}".replace("0", "ab").replace("1", "cde") for i in range(120)]
    tensors = [(f"model.{word}.{word[::-1]}", "BF16", (1,)) for word in words]
    (base / "model.safetensors").write_bytes(build_header(tensors, {}) + bytes(2 * len(tensors)))
    factors = []
    for word in words:
        factors.append((f"base_model.model.{word}.q_proj.lora_A.weight", "F32", (2, 1)))
        factors.append((f"base_model.model.{word}.q_proj.lora_B.weight", "F32", (1, 2)))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(build_header(factors, {}) + bytes(16 * len(words)))
    begin = time.process_time()
    with pytest.raises(RegraftError, match="no such tensor") as caught:
        plan(base, adapter)
    assert len(caught.value.problems) == len(words)
    assert 0 < len(searches) <= 20
    assert time.process_time() - begin < 8


# What the runs found


def test_labels_that_are_no_object_are_refused(model: tuple[Path, Path]) -> None:
    for labels in (3, 1.0, True, "a", [1]):
        changed(model[0], "config.json", id2label=labels)
        with pytest.raises(FormatError, match="id2label is malformed"):
            open_checkpoint(located(model[0]))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, -(10**309)])
@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_numbers_that_no_float_holds_are_not_inspected(
    field: str, value: float, model: tuple[Path, Path]
) -> None:
    changed(model[1], "adapter_config.json", **{field: value})
    with pytest.raises(AdapterError, match=r"of the wrong kind.*a finite number"):
        regraft.inspect(model[1])


def test_headers_on_the_hub_are_checked_too(model: tuple[Path, Path]) -> None:
    def headers(name: str, shape: list[int], offsets: tuple[int, int]) -> Any:
        info = SimpleNamespace(dtype="BF16", shape=shape, data_offsets=offsets)
        return SimpleNamespace(files_metadata={"x": SimpleNamespace(tensors={name: info})})

    assert checkpoint_of(located(model[0]), headers("a", [2], (0, 4))).tensors
    for bad in (("../a", [2], (0, 4)), ("a", [10**15], (0, 4)), ("a", [-2], (0, -4))):
        with pytest.raises(FormatError, match=r"Hub id.*tensor"):
            checkpoint_of(located(model[0]), headers(*bad))
    changed(model[0], "config.json", id2label=3)
    with pytest.raises(FormatError, match="id2label"):
        checkpoint_of(located(model[0]), headers("a", [2], (0, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.weight": ()}, "another shape"),
        ({"model.layers.0.self_attn.q_proj.weight": (8,)}, "another shape"),
        ({"model.embed_tokens.weight": ()}, "embedding has no rows"),
        ({"lm_head.weight": ()}, "embedding has no rows"),
    ],
)
def test_a_base_with_tensors_of_no_use_is_refused(
    changes: dict[str, tuple[int, ...]], message: str, model: tuple[Path, Path]
) -> None:
    tensors = [(n, d, changes.get(n, s)) for n, d, s in tiny.base_tensors()]
    path = model[0] / "model.safetensors"
    header = build_header(tensors, {})
    path.write_bytes(header)
    sizes = [TENSOR_BYTES[d] * _product(s) for _, d, s in tensors]
    os.truncate(path, len(header) + sum(sizes))
    with pytest.raises(RegraftError, match=message):
        plan(*model)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# .bin files, and code


def calls() -> Iterator[tuple[str, str, set[str]]]:
    """Yield every call in the package: its file, the function's name, and the keywords."""
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {k.arg or "**" for k in node.keywords if not _is_false(k.value)}
                yield str(path.relative_to(SOURCES)), _spelled(node.func), keywords


def _spelled(function: ast.expr) -> str:
    """Return what stands before the parentheses; most are a name, which needs no unparsing."""
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        return f"{_spelled(function.value)}.{function.attr}"
    return ast.unparse(function)


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


_TRUST = ("libraries.py", "runtime/merged_loading.py")
_BESIDE_PYTORCH = "testing/hostile/pickles.py"


@pytest.mark.slow
def test_nothing_in_the_package_runs_code_from_a_file() -> None:
    for file, function, keywords in calls():
        # One call passes it on, and it is False unless the user says otherwise in Python.
        assert "trust_remote_code" not in keywords or file in _TRUST, file
        assert function not in ("eval", "exec", "compile", "__import__"), file
        module, _, name = function.rpartition(".")
        assert module not in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"), file
        assert (module, name) not in (("yaml", "load"), ("yaml", "unsafe_load")), file
        tensors_only = file == _BESIDE_PYTORCH and "weights_only" in keywords
        assert not (name in ("load", "jit") and module.startswith("torch")) or tensors_only, file


@pytest.mark.slow
def test_expressions_are_imported_only_where_there_are_any(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    program = (  # once imported it stays, so one process may do one after the other
        "import json, sys; from regraft.cli import main\n"
        "for arguments in json.loads(sys.stdin.read()):\n"
        "    sys.argv[1:] = arguments\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "    print('regex' in sys.modules, file=sys.stderr)"
    )
    base, plain = map(str, model)
    adapter = shutil.copytree(plain, tmp_path / "with an expression")
    changed(adapter, "adapter_config.json", target_modules=r".*\.(q|v)_proj")
    asked = [["--help"], ["check", base, plain], ["check", base, str(adapter)]]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(asked), capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line in ("True", "False")]
    assert said == ["False", "False", "True"]
