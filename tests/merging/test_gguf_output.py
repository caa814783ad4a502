"""Merges into one GGUF file: metadata as it was, types and scales kept, and verified."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import regraft
from merging import toys
from merging.inputs.test_gguf_base import loaded, metadata, save, tiny
from merging.toys import write_adapter
from regraft.errors import (
    BaseMismatchWarning,
    InputError,
    MismatchError,
    NumericError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from regraft.formats.gguf import open_gguf, read_head
from regraft.formats.gguf_header import PLAN_KEY
from regraft.merging.files import single_file
from regraft.testing.gguf_files import Array, blocks, converted, write

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = {**toys.lora(Q, 64, 64), **toys.lora(DOWN, 64, 96)}
    return write_adapter(tmp_path / "adapter", tensors, target_modules=["q_proj", "down_proj"])


def model(folder: Path, kind: str = "Q4_0") -> Path:
    """Return a tiny llama in GGUF, whose queries and keys lie in llama.cpp's order."""
    folder.mkdir(exist_ok=True)
    return save(folder, "llama", kind)


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return type and bytes of every tensor, as the gguf package reads them, in its order."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in found}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_numbers_are_rounded_once(kind: str, adapter: Path, tmp_path: Path) -> None:
    """What transformers loads of the file, which puts rows back in their order."""
    base = model(tmp_path / "base", kind)
    regraft.merge(base, adapter, tmp_path / "out.gguf")
    regraft.merge(base, adapter, tmp_path / "wide", dtype="float32")
    due, found = load_file(tmp_path / "wide" / "model.safetensors"), loaded(tmp_path / "out.gguf")
    assert due.keys() == found.keys()
    for name, tensor in due.items():
        rounded = tensor.to(PLAIN[kind]).float() if tensor.dim() > 1 else tensor
        assert torch.equal(found[name], rounded), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_codes_are_kept_under_their_scales(kind: str, adapter: Path, tmp_path: Path) -> None:
    base = model(tmp_path / "base", kind)
    receipt = regraft.merge(base, [(adapter, 0.05)], tmp_path / "out.gguf")
    before, after = tensors_of(base), tensors_of(tmp_path / "out.gguf")
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"}
    assert [kind_ for kind_, _ in before.values()] == [kind_ for kind_, _ in after.values()]
    assert receipt.totals.survived == pytest.approx(1, abs=0.2)
    assert receipt.totals.noise is not None
    assert receipt.options["quantize"] == "keep"
    for name in changed:
        _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        one, two = (np.frombuffer(t[name][1], np.uint8).reshape(-1, size) for t in (before, after))
        assert np.array_equal(one[:, :2], two[:, :2])  # the scales


def test_the_mean_over_seeds_is_the_merge(adapter: Path, tmp_path: Path) -> None:
    """Rows are those of the model, also where llama.cpp has them in another order."""
    base = model(tmp_path / "base", "Q8_0")
    regraft.merge(base, [(adapter, 0.01)], tmp_path / "wide", dtype="float32")
    regraft.dequantize(base, tmp_path / "plain", dtype="float32")
    due, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("wide", "plain"))
    total = {f"{n}.weight": torch.zeros(due[f"{n}.weight"].shape) for n in (Q, DOWN)}
    for seed in range(24):
        regraft.merge(base, [(adapter, 0.01)], tmp_path / "o.gguf", seed=seed, overwrite=True)
        found = loaded(tmp_path / "o.gguf")
        for name in total:
            total[name] += (found[name] - plain[name]) / 24
    for name, mean in total.items():
        delta = (due[name] - plain[name]).flatten()
        share = float(mean.flatten() @ delta / (delta @ delta))
        assert share == pytest.approx(1, abs=0.1), name


@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
def test_bytes_do_not_depend_on_threads_or_the_cap(
    kind: str, adapter: Path, tmp_path: Path
) -> None:
    base = model(tmp_path / "base", kind)
    for name, options in (("a", {"threads": 1}), ("b", {"threads": 3, "max_memory": "240MiB"})):
        regraft.merge(base, adapter, tmp_path / f"{name}.gguf", **options)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    regraft.merge(base, adapter, tmp_path / "c.gguf", seed=1)
    same = (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    assert same == (kind == "F16")


def test_metadata_and_tokenizer_travel_as_raw_bytes(adapter: Path, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    regraft.merge(base, adapter, tmp_path / "out.gguf")
    one, two = read_head(base), read_head(tmp_path / "out.gguf")
    assert two.metadata.startswith(one.metadata)
    assert (two.keys, two.alignment) == (one.keys + 1, one.alignment)
    assert [e.name for e in one.entries] == [e.name for e in two.entries]
    digest = open_gguf(tmp_path / "out.gguf").metadata[PLAN_KEY]
    assert isinstance(digest, str)
    assert len(digest) == 64
    with pytest.warns(BaseMismatchWarning, match="is merged into .* already"):
        regraft.merge(tmp_path / "out.gguf", [(adapter, 0.5)], tmp_path / "twice.gguf")
    again = open_gguf(tmp_path / "twice.gguf").metadata
    assert again[PLAN_KEY] != digest
    assert len(again) == one.keys + 1


def test_an_unused_tensor_and_a_wide_alignment_stay(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf.gguf_writer.GGUF_DEFAULT_ALIGNMENT", 128)
    more: dict[str, tuple[Array, str]] = {"rope_freqs.weight": (np.ones(8, np.float32), "F32")}
    tensors = {**more, **converted(tiny("llama"), "llama", "Q4_0")}
    wide = {**metadata("llama"), "general.alignment": 128}
    base = write(tmp_path / "m.gguf", "llama", wide, tensors)
    assert read_head(base).alignment == 128
    regraft.merge(base, adapter, tmp_path / "out.gguf")
    before, after = tensors_of(base), tensors_of(tmp_path / "out.gguf")
    assert list(before) == list(after)
    assert before["rope_freqs.weight"] == after["rope_freqs.weight"]
    assert all(e.offset % 128 == 0 for e in read_head(tmp_path / "out.gguf").entries)
    assert regraft.verify(tmp_path / "out.gguf").verdict == "exact"


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0", "float32", "bfloat16"])
def test_another_type_has_the_bytes_of_gguf(dtype: str, adapter: Path, tmp_path: Path) -> None:
    base = model(tmp_path / "base", "F32")
    regraft.merge(base, adapter, tmp_path / "wide.gguf")
    regraft.merge(base, adapter, tmp_path / "out.gguf", dtype=dtype)
    wide, found = tensors_of(tmp_path / "wide.gguf"), tensors_of(tmp_path / "out.gguf")
    names = {"float32": "F32", "bfloat16": "BF16"}
    kind = gguf.GGMLQuantizationType[names.get(dtype, dtype.upper())]
    for name, (type_, raw) in wide.items():
        if "norm" in name:
            assert found[name] == (type_, raw)
            continue
        rows = {e.name: e.dimensions[0] for e in read_head(base).entries}[name]
        values = np.frombuffer(raw, np.float32).reshape(-1, rows)
        assert found[name] == (kind.name, gguf.quants.quantize(values, kind).tobytes())
    assert regraft.verify(tmp_path / "out.gguf").verdict == "exact"


def test_it_is_verified_by_receipt_and_by_doing_it_again(adapter: Path, tmp_path: Path) -> None:
    base, out = model(tmp_path / "base"), tmp_path / "out.gguf"
    regraft.merge(base, adapter, out)
    assert {p.name for p in (tmp_path / "out.gguf.regraft").iterdir()} == {"receipt.json", "undo"}
    report = regraft.verify(out)
    assert (report.verdict, report.checked["judged"]) == ("exact", len(tensors_of(base)))
    assert regraft.verify(out, receipt_only=True).ok
    assert regraft.verify(out, base=base, adapters=[(adapter, 0.5)]).verdict == "different"
    whole = out.read_bytes()
    for at in (30, len(whole) - 40):  # of the metadata, and of the last tensor
        out.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not regraft.verify(out, receipt_only=True).ok
    out.write_bytes(whole)
    (tmp_path / "out.gguf.regraft" / "more.txt").write_text("x")
    assert "more.txt" in str(regraft.verify(out, receipt_only=True).differences)
    shutil.rmtree(tmp_path / "out.gguf.regraft")
    with pytest.raises(InputError, match="no receipt"):
        regraft.verify(out)


def test_bytes_between_tensors_are_looked_at(adapter: Path, tmp_path: Path) -> None:
    tensors = converted(tiny("llama"), "llama", "Q4_0")
    rng = np.random.default_rng(0)
    tensors["rope_freqs.weight"] = (blocks(rng.normal(size=3), "F32", rng), "F32")
    base = write(tmp_path / "m.gguf", "llama", metadata("llama"), tensors)
    out = tmp_path / "out.gguf"
    regraft.merge(base, adapter, out)
    assert regraft.verify(out, receipt_only=True).ok
    whole = bytearray(out.read_bytes())
    whole[-1] = 1  # behind twelve bytes of the last tensor
    out.write_bytes(whole)
    differences = regraft.verify(out, receipt_only=True).differences
    assert ["between tensors" in d.what for d in differences] == [True]


def test_what_a_type_cannot_hold_is_refused_by_its_name(adapter: Path, tmp_path: Path) -> None:
    base = model(tmp_path / "base", "F16")
    with pytest.raises(NumericError, match=r"expected values that F16 can hold.*--dtype bf16"):
        regraft.merge(base, [(adapter, 1e6)], tmp_path / "out.gguf")
    base = model(tmp_path / "base", "Q8_0")
    with pytest.raises(NumericError, match="values that F16 can hold"):
        regraft.merge(base, [(adapter, 1e6)], tmp_path / "out.gguf", dtype="f16")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("dtype", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_blocks_whose_scale_would_be_infinite_are_refused(
    dtype: str, adapter: Path, tmp_path: Path
) -> None:
    base = model(tmp_path / "base", "F16")
    with pytest.raises(NumericError, match=f"values that {dtype.upper()} can hold"):
        regraft.merge(base, [(adapter, 1e9)], tmp_path / "out.gguf", dtype=dtype)
    assert not (tmp_path / "out.gguf").exists()


def test_types_without_a_grid_are_refused_where_they_are_touched(
    adapter: Path, tmp_path: Path
) -> None:
    base = _with(tmp_path, "blk.0.attn_k.weight", "MXFP4")  # untouched: it stays
    regraft.merge(base, adapter, tmp_path / "out.gguf")
    before, after = tensors_of(base), tensors_of(tmp_path / "out.gguf")
    assert before["blk.0.attn_k.weight"] == after["blk.0.attn_k.weight"]
    base = _with(tmp_path, "blk.0.attn_q.weight", "MXFP4")
    with pytest.raises(MismatchError, match="lie on no grid") as caught:
        regraft.merge(base, adapter, tmp_path / "no.gguf")
    assert "blk.0.attn_q.weight" in str(caught.value)
    assert not (tmp_path / "no.gguf").exists()
    assert not regraft.check(base, adapter, quantize="keep").ok
    regraft.merge(base, adapter, tmp_path / "q8.gguf", dtype="q8_0")
    assert regraft.verify(tmp_path / "q8.gguf").verdict == "exact"


def _with(folder: Path, name: str, kind: str) -> Path:
    """Return a model one of whose tensors is of another type."""
    tensors = converted(tiny("llama"), "llama", "Q8_0")
    values = gguf.quants.dequantize(tensors[name][0], gguf.GGMLQuantizationType.Q8_0)
    tensors[name] = (blocks(values, kind, np.random.default_rng(0)), kind)
    return write(folder / "m.gguf", "llama", metadata("llama"), tensors)


REFUSED = {
    "another format": ({"quantize": "nf4"}, UsageError, "does not hold this format"),
    "several files": ({"shard_size": "1MB"}, UsageError, "one file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_one_gguf_file_is_refused(case: str, adapter: Path, tmp_path: Path) -> None:
    options, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        regraft.merge(model(tmp_path / "base"), adapter, tmp_path / "out.gguf", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_plain_base_and_a_folder_are_refused(adapter: Path, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    regraft.dequantize(base, tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="from a base in GGUF"):
        regraft.merge(tmp_path / "plain", adapter, tmp_path / "out.gguf")
    with pytest.raises(UsageError, match="cannot write dtype"):
        regraft.merge(tmp_path / "plain", adapter, tmp_path / "out", dtype="q8_0")


def test_a_base_in_parts_is_refused_with_the_way_on(adapter: Path, tmp_path: Path) -> None:
    parts = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=12)
    for key, value in metadata("llama").items():
        add = {int: parts.add_uint32, float: parts.add_float32, list: parts.add_array}
        {**add, str: parts.add_string, bool: parts.add_bool}[type(value)](key, value)
    for name, (array, kind) in converted(tiny("llama"), "llama", "Q8_0").items():
        parts.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    parts.write_header_to_file()
    parts.write_kv_data_to_file()
    parts.write_tensors_to_file()
    parts.close()
    first = min(tmp_path.glob("m-*.gguf"))
    with pytest.raises(UnsupportedError, match="llama-gguf-split --merge"):
        regraft.merge(first, adapter, tmp_path / "out.gguf")


def test_an_adapter_with_new_tensors_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {f"{toys.PREFIX}lm_head.weight": toys.draw(96, 64, seed=1)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    with pytest.raises(MismatchError, match="replaces a quantized weight"):
        regraft.merge(model(tmp_path / "base"), adapter, tmp_path / "out.gguf")


def test_tied_embeddings_that_come_apart_are_refused_by_name(tmp_path: Path) -> None:
    base = save(tmp_path, "qwen2", "Q4_0")
    key = f"{toys.PREFIX}model.embed_tokens.lora_embedding_"
    factors = {f"{key}A": toys.draw(3, 96), f"{key}B": toys.draw(64, 3)}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["embed_tokens"])
    with pytest.raises(MismatchError, match=r"lm_head.weight: .* gets no new ones"):
        regraft.merge(base, adapter, tmp_path / "out.gguf")


# -- whole or not at all ---------------------------------------------------------------------------


def test_what_lies_in_its_place_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    base, out = model(tmp_path / "base"), tmp_path / "out.gguf"
    with pytest.raises(UsageError, match="over"):
        regraft.merge(base, adapter, base, overwrite=True)
    out.mkdir()
    with pytest.raises(OutputExistsError, match="something else"):
        regraft.merge(base, adapter, out, overwrite=True)
    out.rmdir()
    (tmp_path / "out.gguf.regraft").mkdir()
    (tmp_path / "out.gguf.regraft" / "notes").write_text("mine")
    with pytest.raises(OutputExistsError, match="holds something else"):
        regraft.merge(base, adapter, out, overwrite=True)
    assert (tmp_path / "out.gguf.regraft" / "notes").read_text() == "mine"
    shutil.rmtree(tmp_path / "out.gguf.regraft")
    regraft.merge(base, adapter, out)
    first = out.read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        regraft.merge(base, adapter, out, seed=1)
    regraft.merge(base, adapter, out, seed=1, overwrite=True)
    assert out.read_bytes() != first
    assert regraft.verify(out).verdict == "exact"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter", "base", "out.gguf", "out.gguf.regraft",
    ]  # fmt: skip


def test_a_kill_between_receipt_and_file_is_gone_on_from(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = model(tmp_path / "base"), tmp_path / "out.gguf"
    regraft.merge(base, adapter, tmp_path / "due.gguf")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(single_file.Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            regraft.merge(base, adapter, out)
    assert not out.exists()
    regraft.merge(base, adapter, out)
    assert out.read_bytes() == (tmp_path / "due.gguf").read_bytes()
    assert regraft.verify(out).verdict == "exact"
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_where_the_file_cannot_be_put_in_place_nothing_stays(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = model(tmp_path / "base"), tmp_path / "out.gguf"
    regraft.merge(base, adapter, out)
    before = out.read_bytes(), (tmp_path / "out.gguf.regraft" / "receipt.json").read_bytes()

    def refused(_: Path, target: Path) -> None:
        raise PermissionError(13, "no", os.fspath(target))

    monkeypatch.setattr(single_file.Path, "replace", refused)
    with pytest.raises(regraft.RegraftError):
        regraft.merge(base, adapter, out, seed=1, overwrite=True)
    monkeypatch.undo()
    receipt = tmp_path / "out.gguf.regraft" / "receipt.json"
    assert (out.read_bytes(), receipt.read_bytes()) == before
    assert json.loads(receipt.read_bytes())["options"]["seed"] == 0


def test_it_may_lie_below_a_link_to_a_folder(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    regraft.merge(model(tmp_path / "base"), adapter, tmp_path / "link" / "out.gguf")
    assert (tmp_path / "there" / "out.gguf").is_file()
