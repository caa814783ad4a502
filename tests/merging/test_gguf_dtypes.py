"""What GGUF stores in F32, F16 or BF16 keeps that; blocks are decoded to what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regraft
from merging import toys
from merging.inputs.test_gguf_base import converted, loaded, metadata, save, tiny, write
from merging.test_undo import comparable
from merging.toys import write_adapter

UP, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", toys.lora(UP, 96, 64), target_modules=["up_proj"])


def model(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    return save(folder, "llama", kind)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "matrices", "named"),
    [("F32", torch.float32, "float32"), ("F16", torch.float16, "float16"),
     ("BF16", torch.bfloat16, "bfloat16"), ("Q8_0", torch.bfloat16, "bfloat16")],
)  # fmt: skip
def test_plain_numbers_keep_their_dtype_and_the_config_names_that_of_most(
    tmp_path: Path, adapter: Path, kind: str, matrices: torch.dtype, named: str
) -> None:
    path = model(tmp_path / "gguf", kind)
    regraft.merge(path, adapter, tmp_path / "out")
    found, values = weights(tmp_path / "out"), loaded(path)
    assert found[EMBED].dtype == matrices
    assert torch.equal(found[EMBED], values[EMBED].to(matrices))
    assert torch.equal(found[NORM], values[NORM])  # F32, as vectors in GGUF are
    assert config(tmp_path / "out")["dtype"] == named


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_dtype_that_is_asked_for_is_rounded_to_once(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    path = model(tmp_path / "gguf", kind)
    regraft.dequantize(path, tmp_path / "plain", dtype=dtype)
    for name, tensor in loaded(path).items():
        wanted = tensor.to(getattr(torch, dtype))
        assert torch.equal(weights(tmp_path / "plain")[name], wanted), name
    assert config(tmp_path / "plain")["dtype"] == dtype


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_every_verb_sees_the_same_base(
    tmp_path: Path, adapter: Path, kind: str, dtype: str | None
) -> None:
    path = model(tmp_path / "gguf", kind)
    out = tmp_path / "out"
    regraft.merge(path, [(adapter, 0.5)], out, dtype=dtype)
    assert regraft.verify(out, base=path, adapters=[(adapter, 0.5)]).verdict == "exact"
    (out / "regraft" / "receipt.json").rename(tmp_path / "receipt.json")
    assert regraft.verify(out, base=path, adapters=[(adapter, 0.5)]).verdict == "exact"
    (tmp_path / "receipt.json").rename(out / "regraft" / "receipt.json")
    regraft.unmerge(out, tmp_path / "back")
    assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    in_memory = regraft.load_merged(path, [(adapter, 0.5)], dtype=dtype).state_dict()
    for name, tensor in weights(out).items():
        assert torch.equal(in_memory[name], tensor.to(in_memory[name].dtype)), name


def test_a_swap_into_another_dtype_is_the_merge_in_it(tmp_path: Path, adapter: Path) -> None:
    path = model(tmp_path / "gguf", "Q8_0")
    regraft.merge(path, [(adapter, 0.5)], tmp_path / "out")
    regraft.swap(tmp_path / "out", adapter, tmp_path / "swapped", dtype="float32")
    regraft.merge(path, adapter, tmp_path / "fresh", dtype="float32")
    assert comparable(tmp_path / "swapped") == comparable(tmp_path / "fresh")


def test_a_config_beside_the_file_does_not_round_what_the_file_holds(
    tmp_path: Path, adapter: Path
) -> None:
    path = model(tmp_path / "gguf", "F16")
    made = {"model_type": "llama", "torch_dtype": "bfloat16", "own": 1}
    (path.parent / "config.json").write_text(json.dumps(made))
    regraft.merge(path, adapter, tmp_path / "out")
    assert config(tmp_path / "out") == made | {"torch_dtype": "float16"}
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert config(tmp_path / "back") == made


def test_norms_that_one_was_added_to_come_back_in_their_own_dtype(tmp_path: Path) -> None:
    tensors = converted(tiny("gemma2"), "gemma2", "F16")
    path = write(tmp_path / "m.gguf", "gemma2", metadata("gemma2"), tensors)
    regraft.dequantize(path, tmp_path / "plain")
    found = weights(tmp_path / "plain")
    assert found[NORM].dtype == torch.float32
    for name, tensor in loaded(path).items():
        if name in found:
            assert torch.equal(found[name].float(), tensor), name
