"""Wrappers of training leave segments in names; an adapter means the modules without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regraft
from merging import toys
from merging.toys import HIDDEN, INTER, Q0, adapter_config, attention, lora, write_adapter
from regraft.adapters.settings import read_settings
from regraft.adapters.wrappers import peft_key, plain_config, plain_key, without_wrappers

WRAPPED = {
    "torch.compile": "base_model.model._orig_mod.{}",
    "torch.compile around PEFT": "_orig_mod.base_model.model.{}",
    "FSDP": "_fsdp_wrapped_module.base_model.model.{}",
    "FSDP inside": "base_model.model._fsdp_wrapped_module.{}",
    "FSDP between": "base_model._fsdp_wrapped_module.model.{}",
    "checkpointing": "base_model.model._checkpoint_wrapped_module.{}",
    "FairScale": "_fpw_module.base_model.model.{}",
    "Fabric": "_forward_module.module.base_model.model.{}",
    "DataParallel": "module.base_model.model.{}",
    "DataParallel in DeepSpeed": "module.module.base_model.model.{}",
    "DataParallel inside PEFT": "base_model.model.module.{}",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An untied llama of two layers in bfloat16."""
    return toys.write_base(tmp_path / "base")


def wrapped(tensors: toys.Tensors, form: str) -> dict[str, np.ndarray]:
    """Return an adapter's tensors with the names that a wrapper leaves."""
    return {form.format(key.removeprefix(toys.PREFIX)): t for key, t in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_an_adapter_is_merged_as_without_the_wrapper(
    base: Path, tmp_path: Path, wrapper: str
) -> None:
    plain = write_adapter(tmp_path / "plain")
    other = write_adapter(tmp_path / "other", wrapped(attention(), WRAPPED[wrapper]))
    regraft.merge(base, plain, tmp_path / "a")
    regraft.merge(base, other, tmp_path / "b")
    expected, found = toys.load(tmp_path / "a"), toys.load(tmp_path / "b")
    assert expected.keys() == found.keys()
    assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)


def test_each_layer_may_be_wrapped_for_itself(base: Path, tmp_path: Path) -> None:
    names = {"layers.0.": "layers.0._checkpoint_wrapped_module._fsdp_wrapped_module."}
    tensors = attention()
    for plain, long in names.items():
        tensors = {key.replace(plain, long): tensor for key, tensor in tensors.items()}
    report = regraft.check(base, write_adapter(tmp_path / "adapter", tensors))
    assert report.ok, report.problems


def test_a_module_that_is_called_module_stays_one(tmp_path: Path) -> None:
    tensors = {f"{at}model.q_proj.weight": np.zeros((4, 4), np.float32) for at in ("", "module.")}
    base = toys.write_base(tmp_path / "base", tensors, config=None)
    for form in ("base_model.model.{}", "module.base_model.model.{}"):
        adapter = tmp_path / form.partition(".")[0]
        write_adapter(adapter, wrapped(lora("module.model.q_proj", 4, 4), form))
        regraft.merge(base, adapter, tmp_path / "out", overwrite=True)
        merged = toys.load(tmp_path / "out")
        assert not merged["model.q_proj.weight"].any()
        assert merged["module.model.q_proj.weight"].any()


def test_names_in_the_config_lose_their_wrappers_too() -> None:
    config = adapter_config(
        target_modules=["_orig_mod.model.layers.0.self_attn.q_proj", "o_proj"],
        rank_pattern={r"model\.layers\.0\._checkpoint_wrapped_module\.self_attn.q_proj": 2},
        modules_to_save=["_fsdp_wrapped_module.lm_head"],
        trainable_token_indices={"_orig_mod.model.embed_tokens": [1]},
    )
    settings = read_settings(config, "here")
    assert settings.targets(Q0)
    assert settings.rank_of(Q0) == 2
    assert settings.saves("lm_head.weight")
    assert settings.trainable_token_indices == (("model.embed_tokens", (1,)),)
    by_expression = adapter_config(target_modules=r"(_orig_mod\.)?model\.layers\.0\..*q_proj")
    assert read_settings(by_expression, "here").targets(Q0)
    assert plain_config(adapter_config()) == adapter_config()


def test_only_whole_segments_are_wrappers() -> None:
    assert without_wrappers("a.my_orig_mod.b") == "a.my_orig_mod.b"
    assert without_wrappers("a._orig_mod") == "a"
    assert without_wrappers("_orig_mod") == "_orig_mod"
    assert peft_key("module.a.weight") == "module.a.weight"
    assert plain_key("module._orig_mod.base_model.model.a.weight") == "a.weight"


def test_one_factor_under_two_names_is_refused(base: Path, tmp_path: Path) -> None:
    twice = {**attention(), **wrapped(lora(Q0, HIDDEN, HIDDEN), "base_model.model._orig_mod.{}")}
    report = regraft.check(base, write_adapter(tmp_path / "adapter", twice))
    assert len(report.problems) == 2
    assert all("two tensors of the file are one" in p.what for p in report.problems)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_a_base_with_wrappers_in_its_names_is_refused_for_them(
    tmp_path: Path, wrapper: str
) -> None:
    tensors = {wrapper + name: tensor for name, tensor in toys.llama_tensors().items()}
    base = toys.write_base(tmp_path / "base", tensors)
    report = regraft.check(base, write_adapter(tmp_path / "adapter"))
    assert report.problems
    assert all("Training left a wrapper" in problem.hint for problem in report.problems)


def test_a_shrunk_adapter_has_the_names_of_peft(tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": [f"_orig_mod.{Q0}"]}
    tensors = wrapped(lora(Q0, HIDDEN, HIDDEN), "_orig_mod.base_model.model._orig_mod.{}")
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    for options in ({"dtype": "bfloat16"}, {"rank": 2}):
        out = tmp_path / next(iter(options))
        regraft.shrink(adapter, out, **options)  # type: ignore[arg-type]
        assert toys.load(out).keys() == lora(Q0, HIDDEN, HIDDEN).keys()
        assert toys.read_json(out / "adapter_config.json")["target_modules"] == [Q0]


def test_what_is_attached_and_saved_has_the_names_of_peft(tmp_path: Path) -> None:
    model = nn.ModuleDict({"up_proj": nn.Linear(HIDDEN, INTER, bias=False)})
    tensors = wrapped(lora("up_proj", INTER, HIDDEN), "module.base_model.model._orig_mod.{}")
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["up_proj"])
    handle = regraft.attach(model, adapter)
    x = torch.ones(1, HIDDEN)
    a, b = (torch.from_numpy(t) for t in lora("up_proj", INTER, HIDDEN).values())
    expected = x @ (model["up_proj"].weight + 2 * b @ a).T
    torch.testing.assert_close(model["up_proj"](x), expected)
    regraft.save(handle, tmp_path / "saved")
    assert toys.load(tmp_path / "saved").keys() == lora("up_proj", INTER, HIDDEN).keys()
