"""A merge into a GGUF file is taken back: the base's file comes out, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import regraft
from merging import toys
from merging.inputs.test_gguf_base import metadata, tiny
from merging.toys import write_adapter
from regraft.cli.texts.inspection import render
from regraft.errors import (
    BaseMismatchWarning,
    FormatError,
    InputError,
    MismatchError,
    UnsupportedError,
    UsageError,
)
from regraft.formats.gguf_header import PLAN_KEY
from regraft.merging.undo.gguf_head import lengthened, shortened
from regraft.quant.formats.gguf import GRIDDED, UNQUANTIZED
from regraft.testing.gguf_files import Array, converted, write

SIZE, INNER, HEADS = 256, 512, 4
MODULES = {
    "model.layers.0.self_attn.q_proj": (SIZE, SIZE),
    "model.layers.1.self_attn.k_proj": (SIZE // 2, SIZE),
    "model.layers.1.mlp.down_proj": (SIZE, INNER),
}
SIZES: dict[str, Any] = {"hidden_size": SIZE, "intermediate_size": INNER, "head_dim": SIZE // HEADS}
FACTS: dict[str, Any] = {
    "embedding_length": SIZE, "feed_forward_length": INNER, "rope.dimension_count": SIZE // HEADS,
}  # fmt: skip


def adapter(folder: Path, made: Any = toys.lora, **config: Any) -> Path:
    """Write an adapter of queries and keys, which llama.cpp rearranges, and of a plain layer."""
    tensors = {}
    for name, (out, inputs) in MODULES.items():
        tensors |= made(name, out, inputs, seed=config.get("seed", 1))
    config.pop("seed", None)
    return write_adapter(
        folder, tensors, target_modules=["q_proj", "k_proj", "down_proj"], **config
    )


def model(folder: Path, kind: str, more: dict[str, tuple[Array, str]] | None = None) -> Path:
    """Write a small llama in GGUF; of types that nothing quantizes to, any bytes are blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = converted(tiny("llama", **SIZES), "llama", kind) | (more or {})
    return write(folder / "model.gguf", "llama", metadata("llama", **FACTS), tensors)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("kind", [*UNQUANTIZED, *GRIDDED])
def test_the_base_comes_back_as_the_file_it_was(kind: str, scale: float, tmp_path: Path) -> None:
    base = model(tmp_path / "base", kind)
    merged = regraft.merge(base, [(adapter(tmp_path / "a"), scale)], tmp_path / "out.gguf")
    before = digest(base)
    base.unlink()
    report = regraft.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert digest(tmp_path / "back.gguf") == before
    assert report.files == ("back.gguf",)
    assert report.tensors == merged.totals.tensors
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a", "back.gguf", "base", "out.gguf", "out.gguf.regraft",
    ]  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "F16"])
def test_so_it_does_whatever_threads_and_memory(kind: str, rounding: str, tmp_path: Path) -> None:
    base, a = model(tmp_path / "base", kind), adapter(tmp_path / "a")
    for name, options in (("a", {"threads": 1}), ("b", {"threads": 3, "max_memory": "240MiB"})):
        out = tmp_path / f"{name}.gguf"
        regraft.merge(base, a, out, rounding=rounding, seed=7, **options)
        regraft.unmerge(out, tmp_path / f"{name}-back.gguf", **options)
        assert digest(tmp_path / f"{name}-back.gguf") == digest(base)
    one, two = ((tmp_path / f"{n}.gguf.regraft/undo/patch.safetensors").read_bytes() for n in "ab")
    assert one == two


def test_dora_two_adapters_and_tensors_that_no_weight_is_made_of(tmp_path: Path) -> None:
    more: dict[str, tuple[Array, str]] = {"rope_freqs.weight": (np.ones(9, np.float32), "F32")}
    base = model(tmp_path / "base", "Q5_0", more)
    both = [(adapter(tmp_path / "d", toys.dora, use_dora=True), 0.5), adapter(tmp_path / "a")]
    regraft.merge(base, both, tmp_path / "out.gguf")
    regraft.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert digest(tmp_path / "back.gguf") == digest(base)


def test_another_type_is_taken_back_where_that_is_asked_for(tmp_path: Path) -> None:
    base, a = model(tmp_path / "base", "Q4_0"), adapter(tmp_path / "a")
    for dtype in ("q8_0", "f16", "q4_1"):
        out = tmp_path / f"{dtype}.gguf"
        regraft.merge(base, a, out, dtype=dtype)
        with pytest.raises(InputError, match="keeps no undo patch"):
            regraft.unmerge(out, tmp_path / "no.gguf")
        regraft.merge(base, a, out, dtype=dtype, undo=True, overwrite=True)
        regraft.unmerge(out, tmp_path / "back.gguf", overwrite=True)
        assert digest(tmp_path / "back.gguf") == digest(base)


def test_the_patch_is_small(tmp_path: Path) -> None:
    """Of a delta of some hundredths of the weights; the head alone would be more than that."""
    tensors = converted(tiny("llama", **SIZES), "llama", "Q4_0")
    words = [f"<{i}>" + "x" * 60 for i in range(96)]
    facts = metadata("llama", **FACTS) | {"tokenizer.ggml.tokens": words * 40}
    base = write(tmp_path / "model.gguf", "llama", facts, tensors)
    regraft.merge(base, [(adapter(tmp_path / "a"), 0.02)], tmp_path / "out.gguf")
    undo = tmp_path / "out.gguf.regraft" / "undo"
    touched = sum(a * b for a, b in MODULES.values()) * 18 // 32
    assert (undo / "patch.safetensors").stat().st_size < 8192 + 0.01 * touched
    regraft.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert digest(tmp_path / "back.gguf") == digest(base)


def test_the_key_of_the_merge_is_taken_out_and_an_earlier_one_put_back(tmp_path: Path) -> None:
    base, a = model(tmp_path / "base", "Q4_0"), adapter(tmp_path / "a")
    regraft.merge(base, a, tmp_path / "one.gguf")
    with pytest.warns(BaseMismatchWarning, match="is merged into .* already"):
        regraft.merge(tmp_path / "one.gguf", [(a, 0.5)], tmp_path / "two.gguf")
    keys = [gguf.GGUFReader(tmp_path / f"{n}.gguf").fields[PLAN_KEY] for n in ("one", "two")]
    assert keys[0].contents() != keys[1].contents()
    regraft.unmerge(tmp_path / "two.gguf", tmp_path / "one-back.gguf")
    assert digest(tmp_path / "one-back.gguf") == digest(tmp_path / "one.gguf")
    assert PLAN_KEY not in gguf.GGUFReader(base).fields


def test_a_folder_gets_the_file_under_its_name(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "Q8_0")
    regraft.merge(base, adapter(tmp_path / "a"), tmp_path / "out.gguf")
    regraft.unmerge(tmp_path / "out.gguf", tmp_path / "back")
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["model.gguf"]
    assert digest(tmp_path / "back" / "model.gguf") == digest(base)
    regraft.merge(base, tmp_path / "a", tmp_path / "folder")
    regraft.unmerge(tmp_path / "folder", tmp_path / "of-folder.gguf")
    assert digest(tmp_path / "of-folder.gguf") == digest(base)
    regraft.dequantize(base, tmp_path / "plain")
    regraft.merge(tmp_path / "plain", tmp_path / "a", tmp_path / "merged")
    with pytest.raises(UsageError, match="not one GGUF file"):
        regraft.unmerge(tmp_path / "merged", tmp_path / "no.gguf")


def test_a_config_beside_the_base_is_needed_and_does_not_come_back(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "Q4_0")
    config = tiny("llama", **SIZES).config.to_dict()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config, default=str))
    regraft.merge(base, adapter(tmp_path / "a"), tmp_path / "out.gguf")
    before = digest(base)
    shutil.rmtree(tmp_path / "base")
    report = regraft.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert digest(tmp_path / "back.gguf") == before
    assert report.left_out == ()


def test_swap_gives_what_a_merge_of_the_base_gives(tmp_path: Path) -> None:
    base, a = model(tmp_path / "base", "Q4_1"), adapter(tmp_path / "a")
    other = adapter(tmp_path / "other", seed=5)
    regraft.merge(base, a, tmp_path / "out.gguf")
    regraft.merge(base, other, tmp_path / "due.gguf")
    regraft.merge(base, other, tmp_path / "due")
    regraft.swap(tmp_path / "out.gguf", other, tmp_path / "new.gguf")
    assert digest(tmp_path / "new.gguf") == digest(tmp_path / "due.gguf")
    undo = "regraft/undo/patch.safetensors"
    one, two = (tmp_path / f"{n}.gguf.{undo}" for n in ("new", "due"))
    assert one.read_bytes() == two.read_bytes()
    assert regraft.verify(tmp_path / "new.gguf", base=base, adapters=[other]).verdict == "exact"
    regraft.unmerge(tmp_path / "new.gguf", tmp_path / "back.gguf")
    assert digest(tmp_path / "back.gguf") == digest(base)
    regraft.swap(tmp_path / "out.gguf", other, tmp_path / "new")
    assert digest(tmp_path / "new/model.safetensors") == digest(tmp_path / "due/model.safetensors")
    with pytest.raises(UsageError, match="this is a folder"):
        regraft.swap(tmp_path / "due", a, tmp_path / "no.gguf")
    with pytest.raises(UnsupportedError, match="not written to a folder"):
        regraft.swap(tmp_path / "out.gguf", a, tmp_path / "no", quantize="keep")


def test_without_an_undo_or_a_copy_of_the_adapter(tmp_path: Path) -> None:
    base, a = model(tmp_path / "base", "Q4_0"), adapter(tmp_path / "a")
    regraft.merge(base, a, tmp_path / "no.gguf", undo=False)
    assert [p.name for p in (tmp_path / "no.gguf.regraft").iterdir()] == ["receipt.json"]
    with pytest.raises(InputError, match="keeps no undo patch"):
        regraft.unmerge(tmp_path / "no.gguf", tmp_path / "back.gguf")
    with pytest.raises(InputError, match="no model that regraft merged"):
        regraft.unmerge(base, tmp_path / "back.gguf")
    regraft.merge(base, a, tmp_path / "out.gguf", keep_adapter=False)
    with pytest.raises(InputError, match="kept no copy"):
        regraft.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf")
    regraft.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf", adapters=[a])
    assert digest(tmp_path / "back.gguf") == digest(base)
    assert digest(tmp_path / "out.gguf") == digest(tmp_path / "no.gguf")


def test_what_was_changed_since_is_refused_by_name(tmp_path: Path) -> None:
    base, out = model(tmp_path / "base", "Q4_0"), tmp_path / "out.gguf"
    regraft.merge(base, adapter(tmp_path / "a"), out)
    assert regraft.verify(out).verdict == "exact"
    whole = out.read_bytes()
    out.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    with pytest.raises(MismatchError, match="does not fit the weights"):
        regraft.unmerge(out, tmp_path / "back.gguf")
    out.write_bytes(whole)
    manifest = tmp_path / "out.gguf.regraft" / "undo" / "undo.json"
    said = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(said | {"plan": "0"}))
    with pytest.raises(MismatchError, match="not what the merge wrote"):
        regraft.unmerge(out, tmp_path / "back.gguf")
    assert "undo.json" in str(regraft.verify(out, receipt_only=True).differences)
    assert not (tmp_path / "back.gguf").exists()


@pytest.mark.parametrize("kind", ["Q4_0", "F16", "IQ4_XS"])
def test_a_damaged_patch_gives_the_base_or_an_error(kind: str, tmp_path: Path) -> None:
    base, out = model(tmp_path / "base", kind), tmp_path / "out.gguf"
    regraft.merge(base, adapter(tmp_path / "a"), out)
    patch, rng = tmp_path / "out.gguf.regraft" / "undo" / "patch.safetensors", np.random
    whole, told = patch.read_bytes(), 0
    begin = whole.rindex(b"}") + 1
    for place in rng.default_rng(0).integers(begin, len(whole), 12):
        patch.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            regraft.unmerge(out, tmp_path / "back.gguf", overwrite=True)
            assert digest(tmp_path / "back.gguf") == digest(base)
        except (MismatchError, FormatError):
            told += 1
    assert told > 2


def test_the_file_of_a_merge_is_replaced_by_its_base_with_its_records(tmp_path: Path) -> None:
    base, a = model(tmp_path / "base", "Q4_0"), adapter(tmp_path / "a")
    for name in ("one", "two"):
        regraft.merge(base, a, tmp_path / f"{name}.gguf")
    with pytest.raises(UsageError, match="input"):
        regraft.unmerge(tmp_path / "one.gguf", tmp_path / "one.gguf", overwrite=True)
    regraft.unmerge(tmp_path / "one.gguf", tmp_path / "two.gguf", overwrite=True)
    assert digest(tmp_path / "two.gguf") == digest(base)
    assert not (tmp_path / "two.gguf.regraft").exists()


def test_heads_are_kept_by_what_they_have_besides() -> None:
    like, rng = bytes(range(200)) * 3, np.random.default_rng(0)
    for content in (
        like, like[:24], like[:100] + b"more" + like[100:], like[:90] + like[300:], like + b"!" * 9,
        rng.bytes(300), b"GGUF" + bytes(20) + like[24:], like[:30] + bytes(80) + like[30:],
    ):  # fmt: skip
        kept = shortened(content, like)
        assert lengthened(kept, like) == content
        assert len(kept) <= len(content) + 24
    for other in (b"", bytes(47), kept[:-1], kept + b"x", bytes(24) + b"\xff" * 24):
        with pytest.raises(ValueError, match="lengths"):
            lengthened(other, like)


def test_a_merged_gguf_file_says_from_what_and_which_types_it_has(tmp_path: Path) -> None:
    base, out = model(tmp_path / "base", "Q4_0"), tmp_path / "out.gguf"
    regraft.merge(base, [(adapter(tmp_path / "a"), 0.5)], out)
    found, before = regraft.inspect(out), regraft.inspect(base)
    assert (found.kind, before.kind, before.merge) == ("merged", "base", None)
    assert found.merge is not None
    assert (found.merge.base, found.merge.adapters) == (str(base), ((str(tmp_path / "a"), 0.5),))
    assert [(d.dtype, d.tensors) for d in found.dtypes] == [("Q4_0", 16), ("F32", 5)]
    assert found.parameters == before.parameters == sum(d.elements for d in found.dtypes)
    said = render(found)
    assert "a merged model" in said
    assert "F32 0.735% in 5 tensors" in said
    (tmp_path / "out.gguf.regraft").rename(tmp_path / "elsewhere")
    alone = regraft.inspect(out)
    assert (alone.kind, alone.merge) == ("merged", None)
    assert "not known: there is no receipt" in render(alone)
    regraft.merge(base, tmp_path / "a", tmp_path / "other.gguf", dtype="q8_0")
    (tmp_path / "other.gguf.regraft").rename(tmp_path / "out.gguf.regraft")
    assert regraft.inspect(out).merge is None  # it is of another file
