"""Methods on elements into quantized bases, and into formats: out, kept, made, and GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regraft
from merging import toys
from merging.quantized_bases import BASES, write_quantized
from merging.test_gguf_output import PLAIN, Q, model
from merging.test_undo import assert_restores
from merging.toys import tree, write_adapter
from regraft.errors import MismatchError

TARGETS = {toys.Q0: (toys.HIDDEN, toys.HIDDEN), "model.layers.1.mlp.down_proj": (16, 24)}


def small(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return factors whose product is small against the steps of codes."""
    return {name: each * 0.2 if "lora_B" in name else each for name, each in tensors.items()}


@pytest.fixture
def adapters(tmp_path: Path) -> list[tuple[Path, float]]:
    """Return two adapters on linear layers, with weights."""
    found = []
    for seed, weight in ((1, 1.0), (31, 0.5)):
        factors = {
            name: values
            for module, (out, inputs) in TARGETS.items()
            for name, values in toys.lora(module, out, inputs, 3, seed).items()
        }
        folder = write_adapter(
            tmp_path / f"adapter{seed}", small(factors), target_modules=["q_proj", "down_proj"]
        )
        found.append((folder, weight))
    return found


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_merge_out_is_that_into_the_dequantized_base(
    kind: str, method: str, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    base = write_quantized(tmp_path / "base", kind)
    regraft.dequantize(base, tmp_path / "plain")
    regraft.merge(base, adapters, tmp_path / "direct", method=method, seed=2)
    regraft.merge(tmp_path / "plain", adapters, tmp_path / "later", method=method, seed=2)
    for path in (tmp_path / "later").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "direct" / path.name).read_bytes()
    assert_restores(base, tmp_path / "direct", tmp_path)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_codes_are_kept_and_come_back(
    kind: str, rounding: str, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    base, out = write_quantized(tmp_path / "base", kind), tmp_path / "out"
    chosen: dict[str, Any] = {"quantize": "keep", "rounding": rounding, "method": "dare"}
    receipt = regraft.merge(base, adapters, out, **chosen)
    assert receipt.totals.changed_share > 0
    assert regraft.verify(out).verdict == "exact"
    assert_restores(base, out, tmp_path)


def test_codes_that_are_made_are_those_of_the_merged_model(
    adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    base = toys.write_base(tmp_path / "base", toys.llama_tensors(dtype="float32"))
    regraft.merge(base, adapters, tmp_path / "direct", method="ties", quantize="nf4")
    regraft.merge(base, adapters, tmp_path / "merged", method="ties")
    regraft.quantize(tmp_path / "merged", tmp_path / "later", "nf4")
    one, other = (tmp_path / n / "model.safetensors" for n in ("direct", "later"))
    assert one.read_bytes() == other.read_bytes()


def of_gguf(folder: Path) -> list[tuple[Path, float]]:
    """Write two adapters for the tiny llama in GGUF; return them with weights."""
    return [
        (write_adapter(folder / f"a{seed}", small(toys.lora(Q, 64, 64, 3, seed)),
                       target_modules=["q_proj"]), weight)
        for seed, weight in ((1, 1.0), (31, 0.5))
    ]  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_a_gguf_file_has_what_a_folder_has(kind: str, tmp_path: Path) -> None:
    from merging.inputs.test_gguf_base import loaded

    base, given = model(tmp_path / "base", kind), of_gguf(tmp_path)
    regraft.merge(base, given, tmp_path / "out.gguf", method="dare_ties")
    regraft.merge(base, given, tmp_path / "wide", method="dare_ties", dtype="float32")
    due, found = load_file(tmp_path / "wide" / "model.safetensors"), loaded(tmp_path / "out.gguf")
    for name, tensor in due.items():
        rounded = tensor.to(PLAIN[kind]).float() if tensor.dim() > 1 else tensor
        assert torch.equal(found[name], rounded), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_of_gguf_are_kept_and_verified(kind: str, tmp_path: Path) -> None:
    base, given = model(tmp_path / "base", kind), of_gguf(tmp_path)
    receipt = regraft.merge(base, given, tmp_path / "out.gguf", method="ties")
    assert receipt.options["method"] == "ties"
    assert regraft.verify(tmp_path / "out.gguf").verdict == "exact"
    regraft.merge(base, given, tmp_path / "again.gguf", method="ties", threads=1)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()
    regraft.merge(base, given, tmp_path / "undo.gguf", method="ties", undo=True)
    regraft.unmerge(tmp_path / "undo.gguf", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()


def test_codes_that_lie_as_columns_refuse_della(
    adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    base = write_quantized(tmp_path / "base", "gptq")
    with pytest.raises(MismatchError, match="della"):
        regraft.merge(base, adapters, tmp_path / "out", quantize="keep", method="della")
    regraft.merge(base, adapters, tmp_path / "out", method="della")
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)
