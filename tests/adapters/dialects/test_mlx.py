"""MLX's dialect: what it says is what PEFT says, and comes back to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regraft
from merging import toys
from regraft.errors import AdapterError, InputError, UnsupportedError
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


def test_of_a_run_the_last_adapter_is_taken_and_any_can_be_named(tmp_path: Path) -> None:
    folder = mlx_adapter(tmp_path / "mlx")
    early = {k: v * 2 for k, v in load_file(folder / "adapters.safetensors").items()}
    save_file(early, folder / "0000100_adapters.safetensors")
    convert_adapter(folder, tmp_path / "last")
    convert_adapter(folder / "0000100_adapters.safetensors", tmp_path / "early")
    last, first = toys.load(tmp_path / "last"), toys.load(tmp_path / "early")
    assert last
    assert all(np.array_equal(first[name], 2 * last[name]) for name in last)


def stack_adapter(folder: Path, name: str, experts: int = 3) -> Path:
    """Write an adapter of one stack of experts."""
    mlx_adapter(folder)
    tensors = {
        f"{name}.lora_a": toys.draw(experts, 3, toys.HIDDEN),
        f"{name}.lora_b": toys.draw(experts, toys.INTER, 3),
    }
    save_file(tensors, folder / "adapters.safetensors")
    return folder


@pytest.mark.parametrize(("owner", "leaf"), [("mlp", "up_proj"), ("block_sparse_moe", "w3")])
def test_a_stack_is_read_expert_by_expert_and_comes_back(
    tmp_path: Path, owner: str, leaf: str
) -> None:
    name = f"model.layers.0.{owner}.switch_mlp.up_proj"
    folder = stack_adapter(tmp_path / "mlx", name)
    convert_adapter(folder, tmp_path / "peft")
    found = toys.load(tmp_path / "peft")
    stack = load_file(folder / "adapters.safetensors")
    for expert in range(3):
        key = f"{toys.PREFIX}model.layers.0.{owner}.experts.{expert}.{leaf}.lora_"
        assert np.array_equal(found[f"{key}A.weight"], stack[f"{name}.lora_a"][expert])
        assert np.array_equal(found[f"{key}B.weight"], stack[f"{name}.lora_b"][expert])
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="mlx")
    back = load_file(tmp_path / "back" / "adapters.safetensors")
    assert back.keys() == stack.keys()
    assert all(np.array_equal(back[key], stack[key]) for key in stack)


def test_a_stack_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {}
    for expert in (0, 2):
        tensors |= toys.lora(f"model.layers.0.mlp.experts.{expert}.up_proj", 24, 16)
    peft = toys.write_adapter(tmp_path / "peft", tensors, target_modules=["up_proj"])
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts.*none for 1"):
        convert_adapter(peft, tmp_path / "mlx", to="mlx")


def test_dora_beside_modules_without_magnitudes_is_refused(tmp_path: Path) -> None:
    tensors = {**toys.attention(), **toys.dora(toys.Q0, toys.HIDDEN, toys.HIDDEN)}
    peft = toys.write_adapter(tmp_path / "peft", tensors, use_dora=True)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.v_proj") as caught:
        convert_adapter(peft, tmp_path / "mlx", to="mlx")
    assert len(caught.value.problems) == 3


def _q(folder: Path, **tensors: np.ndarray) -> None:
    save_file({f"{toys.Q0}.{k}": v for k, v in tensors.items()}, folder / "adapters.safetensors")


BAD: dict[str, tuple[Any, str]] = {
    "a kind that is not known": (lambda f: toys.write_json(
        f / "adapter_config.json", {"fine_tune_type": "qlora2"}), "not known"),
    "a scale that is no number": (lambda f: (f / "adapter_config.json").write_text(
        '{"lora_parameters": {"scale": NaN}}'), "scale|NaN"),
    "a stack of an unknown name": (lambda f: save_file(
        {f"model.layers.0.mlp.switch_mlp.fc1.lora_{n}": toys.draw(2, 3, 3) for n in "ab"},
        f / "adapters.safetensors"), "fc1"),
    "one factor": (lambda f: _q(f, lora_a=toys.draw(16, 3)), "lacks a factor"),
    "ranks that differ": (lambda f: _q(f, lora_a=toys.draw(16, 3), lora_b=toys.draw(4, 16)),
                          "do not fit"),
    "magnitudes of another size": (lambda f: _q(
        f, lora_a=toys.draw(16, 3), lora_b=toys.draw(3, 16), m=toys.draw(5)), "magnitudes"),
    "vectors": (lambda f: _q(f, lora_a=toys.draw(16), lora_b=toys.draw(16)), "odd shapes"),
    "whole numbers": (lambda f: _q(f, lora_a=np.zeros((16, 3), np.int32),
                                   lora_b=toys.draw(3, 16)), "dtype"),
    "another tensor": (lambda f: _q(f, lora_a=toys.draw(16, 3), lora_b=toys.draw(3, 16),
                                    weight=toys.draw(16, 16)), "name that this dialect"),
    "nothing": (lambda f: save_file({}, f / "adapters.safetensors"), "no tensors"),
    "a file cut short": (lambda f: (f / "adapters.safetensors").write_bytes(
        (f / "adapters.safetensors").read_bytes()[:-5]), "bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_refused_and_nothing_is_written(
    base: Path, tmp_path: Path, what: str
) -> None:
    spoil, said = BAD[what]
    folder = mlx_adapter(tmp_path / "mlx")
    spoil(folder)
    for ask in (
        lambda: regraft.merge(base, folder, tmp_path / "out"),
        lambda: convert_adapter(folder, tmp_path / "out", base=base),
    ):
        with pytest.raises(InputError, match=said):
            ask()
        assert not (tmp_path / "out").exists()
