"""A model in another dtype, in other files, or as safetensors, without an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import regraft
from merging import toys
from regraft.cli.app import app
from regraft.errors import NumericError, UnsupportedError, UsageError
from regraft.merging.options import parse_dtype


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base")


@pytest.mark.parametrize(
    ("dtype", "numpy"), [("fp32", np.float32), ("half", np.float16), ("bf16", toys.BF16)]
)
def test_values_are_rounded_to_the_dtype_and_the_config_follows(
    base: Path, tmp_path: Path, dtype: str, numpy: type
) -> None:
    receipt = regraft.convert(base, tmp_path / "out", dtype=dtype)
    old, new = toys.load(base), toys.load(tmp_path / "out")
    assert old.keys() == new.keys()
    for name, values in old.items():
        assert new[name].tobytes() == values.astype(np.float32).astype(numpy).tobytes()
    config = toys.read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == {"fp32": "float32", "half": "float16", "bf16": "bfloat16"}[dtype]
    assert receipt.adapters == ()
    assert regraft.verify(tmp_path / "out").ok


def test_shards_are_cut_anew_and_every_byte_stays(base: Path, tmp_path: Path) -> None:
    regraft.convert(base, tmp_path / "out", shard_size=4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert {n: t.tobytes() for n, t in toys.load(base).items()} == {
        n: t.tobytes() for n, t in toys.load(tmp_path / "out").items()
    }
    regraft.convert(tmp_path / "out", tmp_path / "one", shard_size="1GB")
    assert (tmp_path / "one" / "model.safetensors").is_file()


def test_a_bin_file_becomes_safetensors(base: Path, tmp_path: Path) -> None:
    old = toys.load(base)
    (base / "model.safetensors").unlink()
    tensors = {n: torch.from_numpy(t.astype(np.float32)) for n, t in old.items()}
    torch.save(tensors, base / "pytorch_model.bin")
    regraft.convert(base, tmp_path / "out")
    new = toys.load(tmp_path / "out")
    assert all(np.array_equal(new[n], tensors[n].numpy()) for n in tensors)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_what_the_dtype_cannot_hold_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    tensors = toys.load(base)
    name = next(iter(tensors))
    tensors[name] = np.full_like(tensors[name], 1e6)
    toys.write_base(base, tensors)
    with pytest.raises(NumericError, match=name):
        regraft.convert(base, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_and_nothing_to_do_are_refused_with_what_to_do(
    base: Path, tmp_path: Path
) -> None:
    regraft.quantize(base, tmp_path / "int8", "int8")
    with pytest.raises(UnsupportedError, match="regraft dequantize"):
        regraft.convert(tmp_path / "int8", tmp_path / "out", dtype="bf16")
    with pytest.raises(UnsupportedError, match="Give --dtype or --shard-size"):
        regraft.convert(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_claims_no_merge(base: Path, tmp_path: Path) -> None:
    regraft.convert(base, tmp_path / "out", dtype="fp32")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "converted from another" in card
    assert "- merge\n" not in card
    assert "- lora\n" not in card
    assert "regraft.convert('base', 'out', dtype='float32')" in card


def test_the_command_says_what_it_did(base: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(base), "-o", str(tmp_path / "out"), "--dtype", "fp32", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert answer["totals"]["converted"] == answer["totals"]["tensors"]
    assert "--dtype float32" in answer["command"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("bf16", "BF16"), ("BF16", "BF16"), ("torch.bfloat16", "BF16")),
        *(("half", "F16"), ("fp16", "F16"), ("torch.half", "F16"), ("float16", "F16")),
        *(("float", "F32"), ("fp32", "F32"), ("F32", "F32"), ("torch.float", "F32")),
    ],
)
def test_dtypes_go_by_all_their_names(name: str, expected: str) -> None:
    assert parse_dtype(name) == expected


@pytest.mark.parametrize("name", ["int8", "I8", "float64", "float8_e4m3fn", "torch.bool", "many"])
def test_other_dtypes_are_refused_with_those_that_can_be_written(
    base: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=f"cannot write dtype '{name}'") as caught:
        regraft.convert(base, tmp_path / "out", dtype=name)
    assert caught.value.problems[0].expected == "float32, bfloat16 or float16"
    assert not (tmp_path / "out").exists()
