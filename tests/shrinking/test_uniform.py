"""The uniform form: one scale and one rank, for programs that read no patterns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.adapters.fingerprint import KEY
from regraft.errors import UnsupportedError
from shrinking.small import (
    EXPERTS,
    MODULES,
    OUT,
    RANK,
    STACK,
    WIDTH,
    Arrays,
    config_of,
    lowrank,
    product,
    stack,
    write_adapter,
)

_V = "self_attn.v_proj"


def _scale(config: dict[str, Any], module: str) -> float:
    """Return the scale PEFT gives a module of ``small``'s, by patterns of the kinds used here."""
    r, alpha = config["r"], config["lora_alpha"]
    for pattern, value in config.get("rank_pattern", {}).items():
        r = value if module.endswith(pattern) else r
    for pattern, value in config.get("alpha_pattern", {}).items():
        alpha = value if module.endswith(pattern) else alpha
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {_V: 3}},
        {"rank_pattern": {_V: 2}},
        {"rank_pattern": {_V: 2}, "alpha_pattern": {_V: 7}, "use_rslora": True},
        {"use_rslora": True},
    ],
)
def test_deltas_stay_with_one_scale_and_one_rank(tmp_path: Path, config: dict[str, Any]) -> None:
    rank = 2 if "rank_pattern" in config else 8
    tensors = lowrank(MODULES[::2]) | lowrank(MODULES[1::2], rank=rank)
    adapter = write_adapter(tmp_path / "a", tensors, **config)
    report = regraft.shrink(adapter, tmp_path / "s", rank=8, dtype="float32")
    new, written = toys.load(tmp_path / "s"), config_of(tmp_path / "s")
    assert (written["r"], written["lora_alpha"]) == (8, 8)
    assert not any(written.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    for module in MODULES:
        assert new[f"{toys.PREFIX}{module}.lora_A.weight"].shape == (8, WIDTH)
        wanted = _scale(config_of(adapter), module) * product(tensors, module)
        assert np.allclose(product(new, module), wanted, rtol=0, atol=1e-6)
    assert report.uniform
    assert report.error < 1e-6
    assert any("have rank 8" in note and "in its B" in note for note in report.notes)
    assert not any("another scale" in note for note in report.notes)
    assert "multiplied into its B" in (tmp_path / "s" / "README.md").read_text()


def test_a_scale_that_is_a_power_of_two_changes_no_bit_of_the_delta(tmp_path: Path) -> None:
    tensors = {name: value.astype(toys.BF16) for name, value in lowrank().items()}
    adapter = write_adapter(tmp_path / "a", tensors, lora_alpha=16, alpha_pattern={_V: 2})
    report = regraft.shrink(adapter, tmp_path / "s", uniform=True)
    assert report.error == 0
    assert report.uniform


def test_a_cut_and_a_uniform_form_go_together(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", use_rslora=True)
    report = regraft.shrink(adapter, tmp_path / "s", rank=3, dtype="float32")
    patterned = regraft.shrink(adapter, tmp_path / "t", rank=3, dtype="float32", uniform=False)
    assert (report.uniform, patterned.uniform) == (True, False)
    assert report.error == pytest.approx(patterned.error, rel=1e-4)
    for module in MODULES:
        scale = _scale(config_of(tmp_path / "t"), module)
        wanted = scale * product(toys.load(tmp_path / "t"), module)
        assert np.allclose(product(toys.load(tmp_path / "s"), module), wanted, rtol=0, atol=1e-5)


def test_a_share_of_energy_keeps_its_ranks_unless_asked(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    report = regraft.shrink(adapter, tmp_path / "s", energy=0.99)
    assert not report.uniform
    assert any("--uniform" in note for note in report.notes)
    report = regraft.shrink(adapter, tmp_path / "t", energy=0.99, uniform=True)
    assert len({module.rank_after for module in report.modules}) == 1
    assert report.uniform


@pytest.mark.parametrize("uniform", [None, True])
def test_what_is_uniform_already_keeps_its_config(tmp_path: Path, uniform: bool | None) -> None:
    adapter = write_adapter(tmp_path / "a")
    report = regraft.shrink(adapter, tmp_path / "s", rank=8, uniform=uniform)
    assert not report.uniform
    assert config_of(tmp_path / "s") == config_of(adapter)


def _with_bias() -> Arrays:
    return lowrank() | {f"{toys.PREFIX}{m}.lora_B.bias": toys.draw(WIDTH) for m in MODULES}


def test_the_bias_of_b_is_scaled_with_it(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", _with_bias(), lora_bias=True, alpha_pattern={_V: 3})
    regraft.shrink(adapter, tmp_path / "s", uniform=True, dtype="float32")
    new = toys.load(tmp_path / "s")
    for module in MODULES:
        key = f"{toys.PREFIX}{module}.lora_B.bias"
        scale = _scale(config_of(adapter), module)
        assert np.allclose(new[key], _with_bias()[key] * scale, rtol=1e-6)


def test_a_bias_that_its_scale_makes_too_large_is_refused(tmp_path: Path) -> None:
    key = f"{toys.PREFIX}{MODULES[0]}.lora_B.bias"
    tensors = _with_bias() | {key: np.full(WIDTH, 6e4, np.float32)}
    adapter = write_adapter(tmp_path / "a", tensors, lora_bias=True, alpha_pattern={_V: 3})
    with pytest.raises(regraft.NumericError, match="does not fit float16") as caught:
        regraft.shrink(adapter, tmp_path / "s", uniform=True, dtype="float16")
    assert key in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_stacks_are_filled_up_expert_by_expert(tmp_path: Path) -> None:
    tensors = stack() | lowrank(MODULES[:1])
    adapter = write_adapter(
        tmp_path / "a", tensors, target_modules=["q_proj"],
        target_parameters=["experts.down_proj"], rank_pattern={"experts.down_proj": RANK},
    )  # fmt: skip
    regraft.shrink(adapter, tmp_path / "s", rank=8, dtype="float32")
    new, key = toys.load(tmp_path / "s"), f"{toys.PREFIX}{STACK}.lora_"

    def deltas(source: Arrays, rank: int) -> list[np.ndarray[Any, Any]]:
        a = source[f"{key}A.weight"].reshape(EXPERTS, rank, WIDTH)
        b = source[f"{key}B.weight"].reshape(OUT, rank, EXPERTS)
        return [b[:, :, expert] @ a[expert] for expert in range(EXPERTS)]

    for found, was in zip(deltas(new, 8), deltas(tensors, RANK), strict=True):
        assert np.allclose(found, 12 / RANK * was, atol=1e-5)


def test_peft_answers_as_with_the_adapter_as_it_was(tmp_path: Path) -> None:
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=6, lora_alpha=5, use_rslora=True, use_dora=True, init_lora_weights=False,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"down_proj": 3}, alpha_pattern={"0.self_attn.q_proj": 9},
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "a")
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
    regraft.shrink(tmp_path / "a", tmp_path / "s", uniform=True, dtype="float32")
    again = peft.PeftModel.from_pretrained(model.unload(), tmp_path / "s").eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_that_the_base_was_changed_by_keep_their_scale(tmp_path: Path, init: str) -> None:
    adapter = write_adapter(tmp_path / "a", init_lora_weights=init, use_rslora=True)
    with pytest.raises(UnsupportedError, match="no uniform form") as caught:
        regraft.shrink(adapter, tmp_path / "s", uniform=True)
    assert "Leave --uniform out" in str(caught.value)
    assert not regraft.shrink(adapter, tmp_path / "s", rank=8).uniform


def test_what_the_base_looked_like_goes_along(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    adapter = write_adapter(tmp_path / "a")
    save_file(lowrank(), adapter / "adapter_model.safetensors", {"format": "pt", KEY: "of a base"})
    regraft.shrink(adapter, tmp_path / "s", rank=2)
    with safe_open(tmp_path / "s" / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", KEY: "of a base"}
