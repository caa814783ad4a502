"""A live model as transformers' Trainer wants one: the adapter is what it trains and saves.

Trainer trains the parameters of the model that it is given, and saves and loads that model. A live
model has none of its adapter's. So it gets a twin: a second object of the model's class that shares
every module and hook with it, has the adapter's tensors as parameters, and whose ``state_dict`` is
the adapter. The model itself is not touched.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from regraft.adapters.wrappers import PREFIX
from regraft.errors import UnsupportedError, UsageError
from regraft.merging.files.publish import out_path
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter
from regraft.runtime.saving.saved import of_live, write_saved
from regraft.runtime.training.as_peft import in_order_of_peft, names_in_peft
from regraft.runtime.training.checkpoints import complete, write_for_trainer

if TYPE_CHECKING:
    from regraft.runtime.handle import Adapters

_PARAMETERS = "regraft_adapter"
_CHECKPOINT = "checkpoint-"
"""What Trainer calls its checkpoints."""


def trainer_model(
    adapters: Adapters, name: str | None = None, checkpoint: str | Path | None = None
) -> Any:
    """Return what to give to ``transformers.Trainer(model=...)`` to train a live adapter.

    It runs as the model does, in the same modules, and is of its class. Trainer finds the adapter's
    tensors among its parameters, saves the adapter in PEFT's format, and goes on from a checkpoint
    (``resume_from_checkpoint``, ``load_best_model_at_end``), on a quantized base too. In
    checkpoints ``model.safetensors`` has the adapter's weights once more, because Trainer looks for
    it, by the names of PEFT's model: a run can go on with a ``PeftModel``.

    Args:
        adapters: what ``attach`` returned.
        name: the adapter to train; the only one that is trainable if None.
        checkpoint: of a run that PEFT began and that is to go on: the file that Trainer looks for
            is added to it.

    Raises:
        UsageError: no adapter is trainable, several are, or the one to train does not answer.
        MismatchError: the checkpoint is another adapter's.
        AdapterError, MissingFileError: the checkpoint holds no adapter.
    """
    adapter = _chosen(adapters, name)
    if checkpoint is not None:
        complete(Path(checkpoint), adapter)
    base: Any = adapters.base.model
    make: Any = type
    names = {"__module__": type(base).__module__}
    cls = make(type(base).__name__, (_Twin, type(base)), names)
    twin: Any = cls.__new__(cls)
    twin.__dict__.update(base.__dict__)
    twin.__dict__.update(
        _modules={**base._modules, _PARAMETERS: _holder(adapter, adapters.base)},
        _parameters=dict(base._parameters),
        _regraft_model=base,
        _regraft_adapters=adapters,
        _regraft_adapter=adapter,
        _load_state_dict_post_hooks=OrderedDict({0: _only_adapters}),
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


def _holder(adapter: LiveAdapter, base: LiveBase) -> nn.Module:
    """Return a module that has an adapter's trained tensors, in the order that PEFT has them in.

    An optimizer's state goes by the order of parameters; so a run that PEFT began can go on here,
    and the other way round.
    """
    holder = _Holder(adapter.name)
    for key in in_order_of_peft(adapter.tensors, list(base.modules)):
        tensor = adapter.tensors[key]
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            # register_parameter takes no names with dots
            holder._parameters[_NORM * _is_of_norm(key, base) + key] = tensor
    return holder


_NORM = "norm."
"""Begins the names of the copies of layer norms.

Trainer lets no weight decay touch a LayerNorm, which it knows by the class of the module. Here
there is no such module; it knows them by this name too.
"""


def _is_of_norm(key: str, base: LiveBase) -> bool:
    path = key.removeprefix(PREFIX).rpartition(".")[0]
    return isinstance(base.modules.get(path), nn.LayerNorm)


def _only_adapters(twin: Any, keys: _IncompatibleKeys) -> None:
    """Take from the keys that are missing those of the base, which the twin does not save."""
    prefix, own = twin._regraft_prefix, twin._regraft_missing
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.startswith(prefix) or k in own]


class _Twin(nn.Module):  # type: ignore[misc]
    """What the twin does otherwise than the model's class."""

    _regraft_model: Any
    _regraft_adapters: Any
    _regraft_adapter: LiveAdapter
    _regraft_prefix: str = ""
    _regraft_missing: Sequence[str] = ()

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
        given = kwargs.get("destination", args[0] if args else None)
        found: dict[str, Any] = {} if given is None else given
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
        saved = {name: key for key, name in names_in_peft(self._regraft_adapter).items()}
        state_dict = {saved.get(name, name): tensor for name, tensor in state_dict.items()}
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

    def add_model_tags(self, tags: Any) -> None:
        """Accept the model tags that TRL's trainers set once they have their reference model.

        Raises:
            UsageError: the reference is the base, and the run does not begin there.
        """
        _check_reference(sys._getframe(1).f_locals, self._regraft_adapter)
        add = getattr(super(), "add_model_tags", None)
        if add is not None:
            add(tags)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load as the child of another module, such as DistributedDataParallel."""
        del local_metadata, strict
        state = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        try:
            missing, unknown = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        self._regraft_missing = [prefix + key for key in missing]
        unexpected_keys += [prefix + key for key in unknown]
        missing_keys += self._regraft_missing
        self._regraft_prefix = prefix

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
            write_for_trainer(adapter, tensors, folder)


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
    replaced = any(
        adapter.tensors[key.removeprefix(_NORM)] is not value
        for key, value in holder._parameters.items()
    )
    gone = len(holder._parameters) < sum(
        isinstance(each, nn.Parameter) and each.requires_grad for each in adapter.tensors.values()
    )
    parted = any(hasattr(each, "ds_id") and not each.numel() for each in adapter.tensors.values())
    if replaced or gone or parted or _has_sharded_layers(twin):
        raise _sharded(adapter.name)


def _sharded(name: str) -> UnsupportedError:
    return UnsupportedError(
        "an adapter cannot be trained sharded over processes", where=repr(name),
        found="fully_shard, FullyShardedDataParallel or DeepSpeed's stage 3",
        hint="Train with DistributedDataParallel (torchrun or accelerate launch without FSDP; "
        "DeepSpeed's stage 1 or 2): only the adapter has gradients and an optimizer's state. "
        "If the base does not fit on one device, load it in 4 bits",
    )  # fmt: skip


class _Holder(nn.Module):  # type: ignore[misc]
    """Has an adapter's trained tensors as its parameters, by PEFT's keys."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse new parameters: FullyShardedDataParallel would put its flat ones here.

        Raises:
            UnsupportedError: always.
        """
        del name, param
        raise _sharded(self._name)


def _has_sharded_layers(twin: nn.Module) -> bool:
    """Whether a module is sharded; looked for once, before the first step."""
    if "_regraft_is_whole" not in twin.__dict__:
        names = {cls.__name__ for each in twin.modules() for cls in type(each).__mro__}
        if not names.isdisjoint(_SHARDED):
            return True
        twin.__dict__["_regraft_is_whole"] = True
    return False


def _check_reference(local: Mapping[str, Any], adapter: LiveAdapter) -> None:
    """Refuse a reference that TRL has loaded by the base's name, if the adapter is trained.

    For a ``PeftModel`` TRL copies the adapter that a run begins with; a twin is a plain model.

    Args:
        local: the variables of the trainer's method that calls.
        adapter: the adapter.

    Raises:
        UsageError: the run would be held against the bare base.
    """
    reference = getattr(local.get("self"), "ref_model", None)
    given = local.get("ref_model")
    if reference is None or given is not None or not _is_trained(adapter):
        return
    raise UsageError(
        "the reference model of this trainer is the base without the adapter that the run begins "
        "with", where=type(local["self"]).__name__, expected="the model that training begins with",
        found="the base, loaded by its name",
        hint=_WITH_REFERENCE if "ref_model" in local else _WITHOUT_REFERENCE,
    )  # fmt: skip


_WITH_REFERENCE = (
    "Pass ref_model=regraft.load_merged(base, adapter), or another model with the same adapter "
    "attached; or let TRL compute the reference first (precompute_ref_log_probs=True)"
)
_WITHOUT_REFERENCE = (  # as GRPOTrainer and RLOOTrainer, which take none
    "This trainer takes no reference model: set beta=0.0, which needs none, or merge first "
    "(regraft.merge(base, adapter, OUT)) and train a new adapter on OUT"
)


def _is_trained(adapter: LiveAdapter) -> bool:
    """Whether an adapter surely changes its base: one that has just been made has a zero factor."""
    if str(adapter.config.get("init_lora_weights")).lower().startswith(("pissa", "olora")):
        return False
    ends = (".lora_B.weight", ".lora_embedding_A")
    return any(bool(t.any()) for key, t in adapter.tensors.items() if key.endswith(ends))
