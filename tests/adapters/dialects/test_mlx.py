"""MLX's dialect: what it says is what PEFT says, and comes back to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regraft
from merging import toys
from regraft.errors import AdapterError, UnsupportedError
from regraft.translating import convert_adapter


def mlx_adapter(folder: Path, scale: float = 2.0, **config: Any) -> Path:
    """Write the attention adapter as mlx-lm saves one."""
    folder.mkdir()
    tensors = {}
    for key, value in toys.attention().items():
        name = key.removeprefix(toys.PREFIX)
        name = name.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
        tensors[name] = np.ascontiguousarray(value.T)
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    said = {"rank": toys.RANK, "scale": scale, "dropout": 0.0}
    toys.write_json(
        folder / "adapter_config.json",
        {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": said, **config},
    )
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base")


def test_a_merge_is_that_of_the_same_adapter_in_pefts_format(base: Path, tmp_path: Path) -> None:
    peft = toys.write_adapter(tmp_path / "peft")  # alpha 6, rank 3
    regraft.merge(base, peft, tmp_path / "one")
    receipt = regraft.merge(base, mlx_adapter(tmp_path / "mlx"), tmp_path / "other")
    one, other = toys.load(tmp_path / "one"), toys.load(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert receipt.adapters[0].source == str(tmp_path / "mlx")
    regraft.unmerge(tmp_path / "other", tmp_path / "back")
    before = (base / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == before
    assert regraft.verify(tmp_path / "other", base=base, adapters=tmp_path / "mlx").ok


def test_there_and_back_keeps_every_byte(tmp_path: Path) -> None:
    peft = toys.write_adapter(tmp_path / "peft")
    convert_adapter(peft, tmp_path / "mlx", to="mlx")
    convert_adapter(tmp_path / "mlx", tmp_path / "back", to="peft")
    before = load_file(peft / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_what_mlx_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    saved = {toys.PREFIX + "lm_head.weight": toys.draw(toys.VOCAB, toys.HIDDEN)}
    peft = toys.write_adapter(
        tmp_path / "peft", {**toys.attention(), **saved}, modules_to_save=["lm_head"]
    )
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight"):
        convert_adapter(peft, tmp_path / "mlx", to="mlx")
    assert not (tmp_path / "mlx").exists()


def test_a_config_without_a_scale_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = mlx_adapter(tmp_path / "mlx", lora_parameters={"rank": 3})
    with pytest.raises(AdapterError, match="scale"):
        regraft.merge(base, adapter, tmp_path / "out")


def test_whole_weights_are_no_adapter(base: Path, tmp_path: Path) -> None:
    adapter = mlx_adapter(tmp_path / "mlx", fine_tune_type="full")
    with pytest.raises(UnsupportedError, match="whole weights"):
        regraft.merge(base, adapter, tmp_path / "out")
