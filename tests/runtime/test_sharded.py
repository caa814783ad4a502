"""An adapter that is sharded over processes is refused before its first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed, multiprocessing
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import regraft

LONG = timedelta(seconds=240)
"""What the two processes wait for each other, at most."""


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


def wrapped(model: Any, mesh: Any) -> Any:
    del mesh
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def of_two(rank: int, folder: str) -> None:
    """Try each way to shard in one of two processes; write down what became of it."""
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=LONG)
    try:
        torch.save(what_became(rank), f"{folder}/{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def what_became(rank: int) -> dict[str, Any]:
    """Return what became of each way to shard, and the gradients of the way that is none."""
    mesh, ids = distributed.init_device_mesh("cpu", (2,)), torch.arange(6).reshape(1, 6)
    found: dict[str, Any] = {}
    for shard in (all_of_it, its_layers, wrapped):
        torch.manual_seed(0)
        try:
            model = shard(twin(), mesh)
            model(input_ids=ids, labels=ids)
            found[shard.__name__] = "trained"
        except Exception as error:
            found[shard.__name__] = f"{type(error).__name__}: {error}"
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(twin())
    model(input_ids=ids + rank, labels=ids + rank).loss.backward()
    found["gradients"] = {n: p.grad for n, p in model.module.named_parameters() if p.requires_grad}
    return found


def second(_: int, folder: str) -> None:
    of_two(1, folder)


@pytest.mark.slow
def test_two_processes_are_refused_or_train_as_one(tmp_path: Path) -> None:
    # This process is the first. The second is not forked: what torch's threads hold here would be
    # held there for ever.
    processes = multiprocessing.start_processes(
        second, (str(tmp_path),), 1, join=False, start_method="spawn"
    )
    of_two(0, str(tmp_path))
    end = time.monotonic() + LONG.total_seconds()
    while not processes.join(timeout=5):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail("the other process does not end")
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in both:
        for shard in (all_of_it, its_layers, wrapped):
            assert "DistributedDataParallel" in found[shard.__name__], found[shard.__name__]
    ids = torch.arange(6).reshape(1, 6)
    torch.manual_seed(0)
    alone = twin()
    sum(alone(input_ids=ids + at, labels=ids + at).loss / 2 for at in range(2)).backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
    for found in both:
        torch.testing.assert_close(found["gradients"], expected)
