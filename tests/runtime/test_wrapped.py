"""Models that are wrapped, in whole or in part: compiled, distributed, checkpointed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import regraft
from regraft import attach
from regraft.errors import UsageError
from regraft.testing.adapters import perturb
from runtime.toys import TOYS


def compiled_layer(model: Any) -> Any:
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    return model


def compiled_linear(model: Any) -> Any:
    model.layers[1]["up"] = torch.compile(model.layers[1]["up"], backend="eager")
    return model


def checkpointed(model: Any) -> Any:
    model.layers[0]["down"] = checkpoint_wrapper(model.layers[0]["down"])
    return model


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a-compiled-layer": compiled_linear,
    "data-parallel": lambda model: nn.DataParallel(model, device_ids=[]),
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager"), device_ids=[]),
    "a-checkpointed-layer": checkpointed,
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    live = get_peft_model(TOYS["deep"].model(), LoraConfig(r=2, target_modules=["up", "down"]))
    perturb(live, 2)
    live.save_pretrained(folder)
    return folder


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOYS["deep"].inputs())


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPED)
def test_adapters_work_in_wrapped_models(how: str, adapter: Path, tmp_path: Path) -> None:
    plain = TOYS["deep"].model()
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    attach(plain, adapter)
    expected = answer(plain)
    inner = TOYS["deep"].model()
    inner.load_state_dict(state)
    without = answer(inner)
    model = WRAPPED[how](inner)
    handle = attach(model, adapter)
    assert regraft.handle_of(model) is handle
    assert torch.allclose(answer(model), expected, atol=1e-6)
    with handle.disable_adapter():
        assert torch.allclose(answer(model), without, atol=1e-6)
    regraft.save(model, tmp_path / "saved")
    with (
        safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as saved,
        safe_open(adapter / "adapter_model.safetensors", "pt") as given,
    ):
        assert set(saved.keys()) == set(given.keys())
    assert handle.merge_and_unload() is model
    assert torch.allclose(answer(model), expected, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["a-compiled-layer", "a-checkpointed-layer"])
def test_layers_that_are_wrapped_later_keep_the_adapter(how: str, adapter: Path) -> None:
    model = TOYS["deep"].model()
    handle = attach(model, adapter)
    expected = answer(model)
    WRAPPED[how](model)
    assert torch.allclose(answer(model), expected, atol=1e-6)
    handle.merge_and_unload()
    assert torch.allclose(answer(model), expected, atol=1e-6)
    torch.compiler.reset()


def test_a_new_adapter_of_a_wrapped_model_has_plain_names(tmp_path: Path) -> None:
    model = WRAPPED["a-compiled-layer"](TOYS["deep"].model())
    handle = attach(model, regraft.LoraConfig(r=2, target_modules=["up"]), "new")
    names = [name for name, _ in handle.named_parameters()]
    assert "new.base_model.model.layers.1.up.lora_A.weight" in names
    handle.save_pretrained(tmp_path)
    assert "_orig_mod" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which wants more than one process."""

    __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which wants a process group."""

    __module__ = "torch.nn.parallel.distributed"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_sharded_models_are_refused(adapter: Path) -> None:
    with pytest.raises(UsageError, match=r"sharded.*before it is wrapped"):
        attach(FullyShardedDataParallel(TOYS["deep"].model()), adapter)


def test_distributed_models_answer_and_are_not_trained(adapter: Path) -> None:
    inner = TOYS["deep"].model()
    handle = attach(inner, adapter)
    expected = answer(inner)
    handle.detach()
    model = DistributedDataParallel(inner)
    handle = attach(model, adapter)
    assert torch.equal(answer(model), expected)
    with pytest.raises(UsageError, match="for_trainer"):
        handle.add_adapter("new", regraft.LoraConfig(r=2, target_modules=["up"]))
    assert handle.names == ("default",)


PEFTS: dict[str, Any] = {
    "lora": LoraConfig(target_modules=["up"]),
    "ia3": peft.IA3Config(target_modules=["up"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(target_modules=["up"]),
    "whole": None,
}


@pytest.mark.parametrize("kind", PEFTS)
def test_models_with_pefts_layers_are_refused_by_name(kind: str, adapter: Path) -> None:
    if kind == "whole":
        model: Any = get_peft_model(
            TOYS["deep"].model(), LoraConfig(target_modules=["up"], modules_to_save=["head"])
        ).get_base_model()
    else:
        model = inject_adapter_in_model(PEFTS[kind], TOYS["deep"].model())
    with pytest.raises(UsageError, match=r"PEFT's adapters in it.*from_pretrained"):
        attach(model, adapter)
