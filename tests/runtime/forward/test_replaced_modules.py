"""Modules that are replaced while adapters are attached: followed where they fit, refused else."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import regraft
from faithful.cases import lora
from regraft import Adapters, MismatchError, attach
from regraft.errors import RegraftError, UsageError
from regraft.testing.adapters import perturb
from runtime.toys import TOYS

KINDS: dict[str, tuple[str, Any]] = {
    "linear": ("mlp", lora(["lin0", "lin1"])),
    "dora": ("mlp", lora(["lin0"], use_dora=True)),
    "biases": ("mlp", lora(["lin0"], lora_bias=True)),
    "whole": ("mlp", lora(["lin0"], modules_to_save=["lin1"])),
    "embedding": ("embedded", lora(["emb", "conv1d"])),
    "token-rows": ("embedded", lora(["lin0"], trainable_token_indices={"emb": [3, 9]})),
    "convolution": ("conv2d", lora(["conv", "same"])),
    "attention": ("attention", lora(["mha"])),
    "parameters": ("mixture", lora([], target_parameters=["experts.weight"])),
}


def attached(kind: str, folder: Path) -> tuple[Any, Adapters, Any]:
    """Return a toy with an adapter that PEFT made, and its inputs."""
    toy, config = KINDS[kind]
    model = TOYS[toy].model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
        perturb(live, 1)
        live.save_pretrained(folder)
    return model, attach(model, folder, "a"), TOYS[toy].inputs()


def answer(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found[0] if isinstance(found, tuple) else found


def replace_all(model: nn.Module, new: Callable[[nn.Module], nn.Module] = copy.deepcopy) -> None:
    """Put another module with weights of its own in the place of each child."""
    for name, child in list(model.named_children()):
        made = new(child)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(0.75)
        setattr(model, name, made)


def linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight = nn.Parameter(weight.clone())
    return made.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_go_along_with_layers_of_the_same_kind(kind: str, tmp_path: Path) -> None:
    model, adapters, inputs = attached(kind, tmp_path)
    before = answer(model, inputs)
    replace_all(model)
    found = answer(model, inputs)
    adapters.detach()
    plain = answer(model, inputs)
    attach(model, tmp_path)
    assert not torch.equal(found, before)
    assert not torch.equal(found, plain)
    assert torch.equal(found, answer(model, inputs))


def test_a_merge_goes_into_the_new_layer(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    replace_all(model)
    expected = answer(model, inputs)
    adapters.merge_and_unload()
    assert torch.allclose(answer(model, inputs), expected, atol=1e-6)


def test_what_is_chosen_in_a_block_goes_along(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    adapters.set_adapter(None)
    with adapters.using({"a": 0.5}):
        replace_all(model)
        in_block = answer(model, inputs)
    with adapters.rows(["a", None, "a", "a"]):
        replace_all(model)
        in_rows = answer(model, inputs)
        adapters.detach()
        plain = answer(model, inputs)
    assert not torch.equal(in_block, plain)
    assert torch.allclose(in_rows[1], plain[1], atol=1e-6)
    assert not torch.allclose(in_rows[0], plain[0], atol=1e-3)


def test_a_replaced_parent_is_followed() -> None:
    model = TOYS["deep"].model()
    adapters = attach(model, regraft.LoraConfig(r=2, target_modules=["up", "down"]))
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    inputs = TOYS["deep"].inputs()
    expected = answer(model, inputs)
    model.layers[1] = copy.deepcopy(model.layers[1])
    model.layers = nn.ModuleList(model.layers)
    assert torch.equal(answer(model, inputs), expected)


def test_the_new_layer_is_frozen_while_an_adapter_is_trained() -> None:
    model = TOYS["mlp"].model()
    adapters = attach(model, regraft.LoraConfig(r=2, target_modules=["lin0"]))
    model.lin0 = linear(model.lin0.weight)
    answer(model, TOYS["mlp"].inputs())
    assert not model.lin0.weight.requires_grad
    adapters.detach()
    assert model.lin0.weight.requires_grad


@pytest.mark.slow
def test_old_layers_are_let_go(tmp_path: Path) -> None:
    model, _adapters, inputs = attached("dora", tmp_path)
    old = weakref.ref(model.lin0)
    replace_all(model)
    answer(model, inputs)
    gc.collect()
    assert old() is None


REPLACED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "another-shape": lambda _: nn.Linear(10, 20 + 1),
    "another-kind": lambda _: nn.Sequential(nn.Linear(10, 20)),
}


@pytest.mark.parametrize("how", REPLACED)
def test_another_layer_is_refused_at_each_step(how: str, tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    old, model.lin0 = model.lin0, REPLACED[how](model.lin0)
    verbs: list[Callable[[], Any]] = [
        lambda: answer(model, inputs), lambda: adapters.set_adapter("a"), adapters.merge_adapter,
        adapters.merge_and_unload, lambda: adapters.using("a").__enter__(),
        lambda: adapters.rows(["a"]).__enter__(), lambda: adapters.load_adapter(tmp_path, "b"),
        lambda: regraft.save(model, tmp_path / "out"),
        lambda: adapters.add_adapter("new", regraft.LoraConfig(target_modules=["lin1"])),
        lambda: adapters.disable_adapter().__enter__(),
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(MismatchError, match=r"lin0.*replaced"):
            verb()
    assert not (tmp_path / "out").exists()
    model.lin0 = old
    answer(model, inputs)
    model.lin0 = REPLACED[how](old)
    assert adapters.detach() is model
    assert not model._forward_pre_hooks


def test_a_layer_that_is_gone_is_refused(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    model.lin0 = nn.Identity()
    with pytest.raises(MismatchError, match="Identity"):
        adapters.set_adapter("a")
    del model.lin0
    with pytest.raises(MismatchError, match="no module"):
        answer(model, inputs)


def test_a_merged_layer_with_the_same_values_stays_merged(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    adapters.merge_adapter()
    expected = answer(model, inputs)
    model.lin0 = copy.deepcopy(model.lin0)
    assert torch.equal(answer(model, inputs), expected)
    with pytest.raises(UsageError, match="not kept"):
        adapters.unmerge_adapter()
    adapters.merge_and_unload()
    assert torch.equal(answer(model, inputs), expected)


def test_a_merged_layer_with_other_values_is_refused(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    base = model.lin0.weight.detach().clone()
    adapters.merge_adapter()
    old = model.lin0
    model.lin0 = linear(base)
    for verb in (lambda: answer(model, inputs), adapters.unmerge_adapter, adapters.detach):
        with pytest.raises(RegraftError, match="merged into was replaced"):
            verb()
    model.lin0 = old
    adapters.unmerge_adapter()
    assert torch.equal(model.lin0.weight, base)


def test_a_merge_reads_the_dtype_that_the_model_has_now(tmp_path: Path) -> None:
    model, adapters, _ = attached("linear", tmp_path)
    fresh = copy.deepcopy(model)
    model.bfloat16()
    adapters.merge_and_unload()
    plain = TOYS["mlp"].model()
    plain.load_state_dict(fresh.state_dict())
    attach(plain.bfloat16(), tmp_path).merge_and_unload()
    assert torch.equal(model.lin0.weight, plain.lin0.weight)
    assert torch.equal(model.lin1.weight, plain.lin1.weight)


def test_parameters_that_are_assigned_are_what_is_merged(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    state = {key: value * 0.5 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.lin1.weight = nn.Parameter(model.lin1.weight.detach() * 3)
    expected = answer(model, inputs)
    adapters.merge_and_unload()
    assert torch.allclose(answer(model, inputs), expected, atol=1e-6)


def test_a_copy_whose_layers_were_replaced_is_refused(tmp_path: Path) -> None:
    model, _adapters, inputs = attached("linear", tmp_path)
    expected, twin = answer(model, inputs), copy.deepcopy(model)
    assert torch.equal(answer(twin, inputs), expected)
    twin.lin0 = linear(twin.lin0.weight)
    with pytest.raises(MismatchError, match=r"lin0.*in this copy"):
        answer(twin, inputs)
    assert torch.equal(answer(model, inputs), expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_layers_that_torch_quantizes_keep_the_adapter(in_place: bool, tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    expected = answer(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=in_place)
    found = answer(made, inputs)
    with adapters.disable_adapter():
        plain = answer(made, inputs)
    assert (found - expected).abs().max() < 0.2 * (plain - expected).abs().max()


@pytest.mark.slow
def test_compiled_code_follows(tmp_path: Path) -> None:
    model, adapters, inputs = attached("linear", tmp_path)
    compiled = torch.compile(model, backend="eager")
    answer(compiled, inputs)
    model.lin0 = nn.Sequential(linear(model.lin0.weight))
    with pytest.raises(MismatchError, match="lin0"):
        answer(compiled, inputs)
    model.lin0 = linear(model.lin0[0].weight)
    expected = answer(model, inputs)
    assert torch.allclose(answer(compiled, inputs), expected, atol=1e-6)
    with adapters.disable_adapter():
        assert not torch.allclose(answer(compiled, inputs), expected, atol=1e-3)
    torch.compiler.reset()


def test_embeddings_that_grow_are_refused_only_where_an_adapter_has_them() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    for target, refused in (("q_proj", False), ("lm_head", True)):
        model = transformers.LlamaForCausalLM(copy.deepcopy(config)).eval()
        adapters = attach(model, regraft.LoraConfig(r=2, target_modules=[target]))
        model.resize_token_embeddings(24)
        inputs = {"input_ids": torch.tensor([[1, 20]])}
        if refused:
            with pytest.raises(MismatchError, match="lm_head"):
                model(**inputs)
        else:
            assert model(**inputs).logits.shape[-1] == 24
            adapters.add_adapter("head", regraft.LoraConfig(r=2, target_modules=["lm_head"]))
            grown = adapters.adapter("head").tensors["base_model.model.lm_head.lora_B.weight"]
            assert grown.shape[0] == 24
