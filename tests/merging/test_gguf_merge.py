"""Merging into GGUF models: the weights that transformers reads, and the way back to the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import regraft
from merging import toys
from merging.inputs.test_gguf_base import loaded, save
from merging.test_undo import comparable
from merging.toys import write_adapter
from regraft.errors import UnsupportedError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = {**toys.lora(Q, 64, 64), **toys.lora(DOWN, 64, 96)}
    return write_adapter(tmp_path / "adapter", tensors, target_modules=["q_proj", "down_proj"])


@pytest.fixture(params=["Q8_0", "Q4_0"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a tiny llama in GGUF, whose queries and keys lie in llama.cpp's order."""
    (tmp_path / "gguf").mkdir()
    return save(tmp_path / "gguf", "llama", request.param)


def test_dequantizing_gives_what_transformers_loads(model: Path, tmp_path: Path) -> None:
    regraft.dequantize(model, tmp_path / "plain", dtype="float32")
    regraft.dequantize(model, tmp_path / "bf16")
    wide, found = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "bf16"))
    for name, tensor in loaded(model).items():
        kept = torch.bfloat16 if tensor.dim() > 1 else torch.float32  # vectors are F32 in GGUF
        assert torch.equal(wide[name], tensor), name
        assert torch.equal(found[name], tensor.to(kept)), name


def test_a_merge_is_that_into_the_dequantized_model(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    receipt = regraft.merge(model, adapter, tmp_path / "out")
    regraft.dequantize(model, tmp_path / "plain")
    regraft.merge(tmp_path / "plain", adapter, tmp_path / "later")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "later")]
    assert weights[0] == weights[1]
    assert set(receipt.base_formats) & {"Q8_0", "Q4_0"}
    report = regraft.verify(tmp_path / "out", base=model, adapters=[adapter])
    assert report.verdict == "exact"
    assert regraft.check(model, adapter).ok


def test_the_gguf_file_comes_back(model: Path, adapter: Path, tmp_path: Path) -> None:
    regraft.merge(model, [(adapter, 0.5)], tmp_path / "out")
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / model.name).read_bytes() == model.read_bytes()
    regraft.swap(tmp_path / "out", adapter, tmp_path / "swapped")
    regraft.merge(model, adapter, tmp_path / "fresh")
    assert comparable(tmp_path / "swapped") == comparable(tmp_path / "fresh")


def test_a_gguf_model_becomes_one_of_bitsandbytes(model: Path, tmp_path: Path) -> None:
    regraft.quantize(model, tmp_path / "nf4", "nf4")
    regraft.dequantize(model, tmp_path / "plain")
    regraft.quantize(tmp_path / "plain", tmp_path / "nf4-later", "nf4")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("nf4", "nf4-later"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[n].view(torch.uint8), two[n].view(torch.uint8)) for n in one)


def test_gguf_is_not_written(model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="read, but not written"):
        regraft.merge(model, adapter, tmp_path / "out", quantize="keep")


def test_a_gguf_model_is_looked_at_from_its_header(model: Path) -> None:
    found = regraft.inspect(model)
    assert found.model is not None
    assert (found.kind, found.model.quantization, found.model.layers) == ("base", "gguf", 2)
