"""Copies of the base's embeddings, and the size of a real adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from merging.processes import python
from regraft.formats.safetensors import build_header
from shrinking.small import (
    LM_HEAD,
    MODULES,
    Arrays,
    lowrank,
    with_copies,
    write_adapter,
)

# -- copies of embeddings


@pytest.mark.parametrize("dtype", [np.float32, toys.BF16])
def test_copies_that_are_the_bases_are_left_out(tmp_path: Path, dtype: Any) -> None:
    base = toys.write_base(tmp_path / "base")
    adapter = with_copies(tmp_path / "a", dtype=dtype)
    report = regraft.shrink(adapter, tmp_path / "s", base=base)
    assert {c.name: c.outcome for c in report.copies} == {
        f"{toys.PREFIX}{toys.EMBED}.base_layer.weight": "dropped",
        f"{LM_HEAD}.weight": "dropped",
    }
    size = toys.VOCAB * toys.HIDDEN * np.dtype(dtype).itemsize
    assert [c.bytes for c in report.copies] == [size, size]
    assert report.base == str(base)
    key = f"{toys.PREFIX}{toys.EMBED}.lora_embedding_"
    assert toys.load(tmp_path / "s").keys() == {f"{key}A", f"{key}B"}
    regraft.shrink(adapter, tmp_path / "wide", base=base, dtype="float32")
    regraft.merge(base, tmp_path / "wide", tmp_path / "m1")
    regraft.merge(base, adapter, tmp_path / "m2")
    one, other = toys.load(tmp_path / "m1"), toys.load(tmp_path / "m2")
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}


def test_a_wider_base_is_rounded_to_the_copys_dtype_first(tmp_path: Path) -> None:
    wide = {n: t.astype(np.float32) * np.float32(1.0001) for n, t in toys.llama_tensors().items()}
    base = toys.write_base(tmp_path / "base", wide)
    name = f"{LM_HEAD}.weight"
    tensors = lowrank() | {name: wide["lm_head.weight"].astype(toys.BF16)}
    adapter = write_adapter(tmp_path / "a", tensors)
    (copy,) = regraft.shrink(adapter, tmp_path / "s", base=base).copies
    assert copy.outcome == "dropped"


def test_a_copy_that_differs_in_one_value_is_kept_and_told(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base")
    adapter = with_copies(tmp_path / "a", change=0.125)
    report = regraft.shrink(adapter, tmp_path / "s", base=base)
    name = f"{toys.PREFIX}{toys.EMBED}.base_layer.weight"
    assert {c.name: c.outcome for c in report.copies}[name] == "differs"
    assert name in toys.load(tmp_path / "s")
    assert f"{LM_HEAD}.weight" not in toys.load(tmp_path / "s")
    assert any(name in note and "differ" in note for note in report.notes)


def test_a_vocabulary_that_grew_is_kept(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base")
    adapter = with_copies(tmp_path / "a", rows=toys.VOCAB + 2)
    report = regraft.shrink(adapter, tmp_path / "s", base=base)
    assert [c.outcome for c in report.copies] == ["dropped", "differs"]


def test_a_tied_head_is_held_against_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    tensors = toys.llama_tensors()
    embed = tensors[f"{toys.EMBED}.weight"]
    del tensors["lm_head.weight"]
    base = toys.write_base(tmp_path / "base", tensors, toys.CONFIG | {"tie_word_embeddings": True})
    adapter = write_adapter(tmp_path / "a", lowrank() | {f"{LM_HEAD}.weight": embed})
    (copy,) = regraft.shrink(adapter, tmp_path / "s", base=base).copies
    assert copy.outcome == "dropped"


def test_without_a_base_copies_are_kept_and_their_size_is_told(tmp_path: Path) -> None:
    report = regraft.shrink(with_copies(tmp_path / "a"), tmp_path / "s")
    assert {c.outcome for c in report.copies} == {"not compared"}
    (note,) = report.notes
    assert "--base" in note
    assert f"{2 * toys.VOCAB * toys.HIDDEN * 4 / 1e6:.3g} MB" in note
    assert toys.load(tmp_path / "s")[f"{LM_HEAD}.weight"].dtype == np.dtype(toys.BF16)


def test_a_base_without_the_embedding_or_with_integers_is_told(tmp_path: Path) -> None:
    tensors = toys.llama_tensors()
    tensors[f"{toys.EMBED}.weight"] = np.zeros((toys.VOCAB, toys.HIDDEN), np.int8)
    del tensors["lm_head.weight"]
    base = toys.write_base(tmp_path / "base", tensors)
    report = regraft.shrink(with_copies(tmp_path / "a"), tmp_path / "s", base=base)
    assert [c.outcome for c in report.copies] == ["absent", "incomparable"]
    assert len(report.notes) == 2


def test_embeddings_that_were_trained_whole_are_no_copies(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base")
    name = f"{LM_HEAD}.weight"
    tensors = lowrank() | {name: toys.llama_tensors()["lm_head.weight"].astype(np.float32)}
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"])
    report = regraft.shrink(adapter, tmp_path / "s", base=base)
    assert report.copies == ()
    assert name in toys.load(tmp_path / "s")
    assert any("was not read" in note for note in report.notes)


# -- the size of a real one

HIDDEN, LAYERS, VOCAB_7B = 4096, 32, 32_000


def _write_sparse(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """Write a file whose tensors are all zero and take no disk."""
    header = build_header(tensors, {"format": "pt"})
    size = sum(math.prod(shape) * (4 if dtype == "F32" else 2) for _, dtype, shape in tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def test_an_adapter_of_a_7b_model_takes_less_than_10_mb(tmp_path: Path) -> None:
    modules = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(LAYERS) for n in "qv"]
    numbers = np.random.default_rng(1)
    tensors: Arrays = {}
    for module in modules:
        key = f"{toys.PREFIX}{module}.lora_"
        tensors[f"{key}A.weight"] = numbers.standard_normal((8, HIDDEN), np.float32)
        tensors[f"{key}B.weight"] = numbers.standard_normal((HIDDEN, 8), np.float32)
    adapter = toys.write_adapter(tmp_path / "a", tensors, r=8, lora_alpha=16)
    report = regraft.shrink(adapter, tmp_path / "s")
    size = (tmp_path / "s" / "adapter_model.safetensors").stat().st_size
    factors = LAYERS * 2 * 2 * 8 * HIDDEN * 2
    assert factors == 8_388_608
    assert factors < size == report.bytes_after < factors + 20_000 < 10_000_000
    assert report.bytes_before > 16_777_216
    assert 0 < report.error < 2**-8
    assert len(report.modules) == 64


MEASURED = """
import json, sys
import regraft
adapter, out, base = sys.argv[1:]
report = regraft.shrink(adapter, out, base=base)
print(json.dumps([report.peak_memory, report.bytes_before, report.bytes_after,
                  [copy.outcome for copy in report.copies]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "outcome"), [(True, "dropped"), (False, "differs")])
def test_a_copy_of_262_mb_is_compared_or_carried_in_pieces(
    tmp_path: Path, tied: bool, outcome: str
) -> None:
    adapter = write_adapter(tmp_path / "a", {})
    shape = (VOCAB_7B, HIDDEN)
    factors = [("lora_A", (8, HIDDEN)), ("lora_B", (HIDDEN, 8))]
    key = f"{toys.PREFIX}{MODULES[0]}"
    _write_sparse(
        adapter / "adapter_model.safetensors",
        [
            *((f"{key}.{name}.weight", "F32", size) for name, size in factors),
            (f"{LM_HEAD}.weight", "BF16", shape),
        ],
    )
    base = tmp_path / "base"
    _write_sparse(base / "model.safetensors", [("lm_head.weight", "BF16", shape)])
    toys.write_json(base / "config.json", toys.CONFIG)
    if not tied:
        with (base / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x80\x3f")  # the last value is 1
    done = python(MEASURED, adapter, tmp_path / "s", base)
    assert done.returncode == 0, done.stderr
    peak, before, after, outcomes = json.loads(done.stdout)
    assert outcomes == [outcome]
    assert before > 262_144_000
    assert (after < 200_000) == (outcome == "dropped")
    assert peak < 150 * 2**20
