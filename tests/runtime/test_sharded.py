"""An adapter that is sharded over processes is refused before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import distributed
from torch.distributed.fsdp import fully_shard

import regraft


@pytest.fixture
def alone() -> Iterator[None]:
    """Let this process be the only one of a group."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def twin() -> Any:
    """Return what Trainer is given of a tiny model with a new adapter."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    handle = regraft.attach(
        transformers.LlamaForCausalLM(config), regraft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    return handle.for_trainer()


def all_of_it(model: Any, mesh: Any) -> Any:
    return fully_shard(model, mesh=mesh)


def its_layers(model: Any, mesh: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return model


@pytest.mark.parametrize("shard", [all_of_it, its_layers])
@pytest.mark.usefixtures("alone")
def test_a_sharded_adapter_is_refused_before_the_first_step(
    shard: Callable[[Any, Any], Any],
) -> None:
    mesh = distributed.init_device_mesh("cpu", (1,))
    model = shard(twin(), mesh)
    ids = torch.arange(6).reshape(1, 6)
    with pytest.raises(regraft.UnsupportedError, match="DistributedDataParallel"):
        model(input_ids=ids, labels=ids)


@pytest.mark.usefixtures("alone")
def test_a_model_copied_to_each_process_is_trained() -> None:
    model = torch.nn.parallel.DistributedDataParallel(twin())
    ids = torch.arange(6).reshape(1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)
