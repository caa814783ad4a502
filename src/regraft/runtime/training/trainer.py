"""A live model as transformers' Trainer wants one: the adapter is what it trains and saves.

Trainer trains the parameters of the model that it is given, and saves and loads that model. A live
model has none of its adapter's. So it gets a twin: a second object of the model's class that shares
every module and hook with it, has the adapter's tensors as parameters, and whose ``state_dict`` is
the adapter. The model itself is not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from regraft.errors import UnsupportedError, UsageError
from regraft.formats.layout import ADAPTER_SAFE
from regraft.merging.output import out_path
from regraft.runtime.handle import Adapters
from regraft.runtime.matching import LiveAdapter
from regraft.runtime.saving.saved import of_live, write_saved

_PARAMETERS = "regraft_adapter"
_CHECKPOINT, _WEIGHTS = "checkpoint-", "model.safetensors"
"""What Trainer calls its checkpoints, and the weights that it looks for in them."""


def trainer_model(adapters: Adapters, name: str | None = None) -> Any:
    """Return what to give to ``transformers.Trainer(model=...)`` to train a live adapter.

    It runs as the model does, in the same modules, and is of its class. Trainer finds the adapter's
    tensors among its parameters, saves the adapter in PEFT's format, and goes on from a checkpoint
    (``resume_from_checkpoint``, ``load_best_model_at_end``), on a quantized base too. In
    checkpoints ``model.safetensors`` is a second name of the adapter's weights, because Trainer
    looks for it.

    Args:
        adapters: what ``attach`` returned.
        name: the adapter to train; the only one that is trainable if None.

    Raises:
        UsageError: no adapter is trainable, several are, or the one to train does not answer.
    """
    adapter = _chosen(adapters, name)
    base: Any = adapters.model
    make: Any = type
    names = {"__module__": type(base).__module__}
    cls = make(type(base).__name__, (_Twin, type(base)), names)
    twin: Any = cls.__new__(cls)
    twin.__dict__.update(base.__dict__)
    twin.__dict__.update(
        _modules={**base._modules, _PARAMETERS: _holder(adapter)},
        _parameters=dict(base._parameters),
        _regraft_model=base,
        _regraft_adapters=adapters,
        _regraft_adapter=adapter,
        _hf_peft_config_loaded=True,  # Trainer takes a quantized model only with adapters on it
    )
    return twin


def _chosen(adapters: Adapters, name: str | None) -> LiveAdapter:
    """Return the adapter to train.

    Raises:
        UsageError: as :func:`trainer_model`.
    """
    trainable = [each for each in adapters.names if adapters.adapter(each).is_trainable]
    if name is None and len(trainable) == 1:
        name = trainable[0]
    if name is None:
        raise UsageError(
            "several adapters can be trained" if trainable else "no adapter can be trained",
            found=", ".join(map(repr, trainable)) or "none",
            hint="Pass name=... to say which" if trainable
            else "Attach a LoraConfig, or load one with is_trainable=True",
        )  # fmt: skip
    adapter: LiveAdapter = adapters.adapter(name)
    if not adapter.is_trainable:
        raise UsageError("this adapter cannot be trained", where=repr(name),
                         hint="Load it with is_trainable=True")  # fmt: skip
    if name not in adapters.active_adapters:
        raise UsageError("the adapter to train does not answer", where=repr(name),
                         hint=f"Call set_adapter({name!r}) first")  # fmt: skip
    return adapter


def _holder(adapter: LiveAdapter) -> nn.Module:
    """Return a module that has an adapter's trained tensors, in an order that a file keeps too.

    An optimizer's state goes by the order of parameters, and an adapter that was loaded has them in
    another one than an adapter that was made.
    """
    holder = nn.Module()
    for key in sorted(adapter.tensors):
        tensor = adapter.tensors[key]
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            holder._parameters[key] = tensor  # register_parameter takes no names with dots
    return holder


class _Twin(nn.Module):  # type: ignore[misc]
    """What the twin does otherwise than the model's class."""

    _regraft_model: Any
    _regraft_adapters: Adapters
    _regraft_adapter: LiveAdapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            UnsupportedError: the adapter's tensors, or the model's, are sharded over processes.
        """
        check_whole(self, self._modules[_PARAMETERS], self._regraft_adapter)
        return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> _Twin:
        """Switch the shared modules, and the model itself, which is not among them."""
        super().train(mode)
        self._regraft_model.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the adapter's tensors by PEFT's keys, after ``prefix``."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        found: dict[str, Any] = kwargs.get("destination", args[0] if args else None) or {}
        keep = kwargs.get("keep_vars", False)
        for key, tensor in self._regraft_adapter.tensors.items():
            found[f"{prefix}{key}"] = tensor if keep else tensor.detach()
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Copy tensors by PEFT's keys into the adapter's.

        Raises:
            RuntimeError: some are missing or unknown and ``strict`` is true, or a shape differs.
        """
        del assign  # the handle knows the tensors that there are
        own = self._regraft_adapter.tensors
        missing = [key for key in own if key not in state_dict]
        unknown = [key for key in state_dict if key not in own]
        bad = [k for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
        if bad or (strict and (missing or unknown)):
            raise RuntimeError(
                f"the state is not this adapter's: missing {missing}, unknown {unknown}, of "
                f"another shape {bad}"
            )
        with torch.no_grad():
            for key in own.keys() & state_dict.keys():
                own[key].copy_(state_dict[key])
        return _IncompatibleKeys(missing, unknown)

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the adapter, as :func:`regraft.save` does.

        Args:
            save_directory: the folder.
            is_main_process: nothing is written if false.
            **kwargs: of those of transformers ``state_dict``: values that sharded training has
                gathered, in place of the adapter's own. The others say nothing about an adapter.
        """
        if not is_main_process:
            return
        adapters, adapter = self._regraft_adapters, self._regraft_adapter
        merged = bool(adapters.merged_adapters)
        saved = of_live(adapter, adapters.base, None, merged=merged)
        gathered = kwargs.get("state_dict") or {}
        tensors = {key: gathered.get(key, tensor) for key, tensor in saved.tensors.items()}
        folder = out_path(save_directory)
        write_saved(saved.with_tensors(tensors), folder)
        if folder.absolute().name.startswith(_CHECKPOINT):
            _second_name(folder / ADAPTER_SAFE, folder / _WEIGHTS)


_SHARDED = ("FSDPModule", "FullyShardedDataParallel")
"""Classes of modules whose parameters are spread over processes."""


def check_whole(twin: nn.Module, holder: Any, adapter: LiveAdapter) -> None:
    """Refuse to train an adapter that is sharded over processes.

    Its own tensors are what answers. Sharding puts others in their places, which would be trained
    and not used; with the model's layers alone sharded, no process would hear of the others'
    gradients.

    Raises:
        UnsupportedError: it is.
    """
    replaced = any(adapter.tensors[key] is not value for key, value in holder._parameters.items())
    gone = len(holder._parameters) < sum(
        isinstance(each, nn.Parameter) and each.requires_grad for each in adapter.tensors.values()
    )
    parted = any(hasattr(each, "ds_id") and not each.numel() for each in adapter.tensors.values())
    if replaced or gone or parted or _has_sharded_layers(twin):
        raise UnsupportedError(
            "an adapter cannot be trained sharded over processes", where=repr(adapter.name),
            found="fully_shard, FullyShardedDataParallel or DeepSpeed's stage 3",
            hint="Train with DistributedDataParallel (torchrun or accelerate launch without FSDP; "
            "DeepSpeed's stage 1 or 2): only the adapter has gradients and an optimizer's state. "
            "If the base does not fit on one device, load it in 4 bits",
        )  # fmt: skip


def _has_sharded_layers(twin: nn.Module) -> bool:
    """Whether a module is sharded; looked for once, before the first step."""
    if "_regraft_is_whole" not in twin.__dict__:
        names = {cls.__name__ for each in twin.modules() for cls in type(each).__mro__}
        if not names.isdisjoint(_SHARDED):
            return True
        twin.__dict__["_regraft_is_whole"] = True
    return False


def _second_name(path: Path, other: Path) -> None:
    """Give a file a second name: a link, or a copy where there are no links."""
    new = other.with_name(f".{other.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    try:
        os.link(path, new)
    except OSError:  # a file system without links
        shutil.copyfile(path, new)
    new.replace(other)
