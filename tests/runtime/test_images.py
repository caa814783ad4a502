"""Live models of images, and layers of models that are more than a linear layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import regraft
from regraft.errors import AdapterError, UnsupportedError
from regraft.testing import zoo

CONVOLUTIONS = {"r": 2, "target_modules": ["convolution"], "init_lora_weights": False}
IMAGE = torch.arange(192.0).reshape(1, 3, 8, 8) / 192


@pytest.fixture(scope="module")
def resnet() -> Any:
    torch.manual_seed(0)
    config = tf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return tf.ResNetForImageClassification(config).eval()


@pytest.fixture(scope="module")
def llama4() -> Any:
    config = tf.Llama4TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, intermediate_size_mlp=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, moe_layers=[0], pad_token_id=0, attention_chunk_size=8,
    )  # fmt: skip
    model = tf.Llama4ForCausalLM(config)
    zoo.randomize(model)
    return model.eval()


def test_a_model_without_word_embeddings_is_trained_as_pefts(resnet: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(resnet), peft.LoraConfig(**CONVOLUTIONS))
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(resnet)
    adapters = regraft.attach(model, tmp_path, "one", is_trainable=True)
    for each, parameters in (
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        (model, list(adapters.parameters())),
    ):
        each.eval()(pixel_values=IMAGE).logits.square().sum().backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    found, expected = model(pixel_values=IMAGE).logits, theirs(pixel_values=IMAGE).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, resnet(pixel_values=IMAGE).logits)


def test_a_new_adapter_does_not_train_batch_norms_whole(resnet: Any) -> None:
    model = copy.deepcopy(resnet)
    config = regraft.LoraConfig(**CONVOLUTIONS, modules_to_save=["embedder.normalization"])
    with pytest.raises(UnsupportedError, match="a module with statistics") as caught:
        regraft.attach(model, config, "one")
    (problem,) = caught.value.problems
    assert problem.where == "resnet.embedder.embedder.normalization"
    assert "running_mean" in str(problem.found)
    assert "Leave it out of modules_to_save" in str(problem.hint)
    assert all(each.requires_grad for each in model.parameters())


def test_an_adapter_with_statistics_of_batch_norms_is_refused_for_what_it_is(
    resnet: Any, tmp_path: Path
) -> None:
    config = peft.LoraConfig(**CONVOLUTIONS, modules_to_save=["embedder.normalization"])
    peft.get_peft_model(copy.deepcopy(resnet), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="of a batch norm, whose statistics are not") as caught:
        regraft.attach(copy.deepcopy(resnet), tmp_path)
    assert "merge_and_unload" in str(caught.value)


@pytest.mark.parametrize("dora", [False, True])
def test_a_router_that_returns_several_tensors_is_adapted_in_its_weight(
    llama4: Any, dora: bool
) -> None:
    config = {"r": 2, "target_modules": ["router", "q_proj"], "use_dora": dora}
    model = copy.deepcopy(llama4)
    adapters = regraft.attach(model, regraft.LoraConfig(**config), "one")
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3) if parameter.dim() > 1 else None
    live = model(input_ids=ids).logits
    live.square().mean().backward()
    assert all(each.grad is not None for each in adapters.parameters())
    with adapters.rows(["one", None]):
        mixed = model(input_ids=ids).logits
    torch.testing.assert_close(mixed[:1], model(input_ids=ids[:1]).logits)
    torch.testing.assert_close(mixed[1:], llama4(input_ids=ids[1:]).logits)
    adapters.merge_adapter("one")
    torch.testing.assert_close(model(input_ids=ids).logits, live, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(live, llama4(input_ids=ids).logits, atol=1e-3)
