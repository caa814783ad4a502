"""What there is to save of a live model: regraft's adapters, PEFT's, or transformers'."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.adapters.wrappers import peft_key, plain_config
from regraft.errors import UnsupportedError, UsageError
from regraft.formats.files.text import plain_text
from regraft.merging.files.card import hub_id
from regraft.runtime.forward.layers.served import split
from regraft.runtime.model.attached import Handle, attached_to
from regraft.runtime.model.fingerprint import KEY, Parameter, fingerprint_of, parameters_of
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter, match_live
from regraft.runtime.model.quantized_parameters import is_4bit, is_8bit
from regraft.runtime.model.wrappers import unwrapped
from regraft.runtime.saving.card import adapter_card
from regraft.runtime.saving.files import stored_specs, write_adapter

_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EMBEDDING_WRAPPER = ".base_layer."
_UNTRAINED = ".original_module."
_LIBRARIES = ("transformers", "diffusers")
"""Whose classes PEFT's ``AutoPeftModel`` imports without being asked to."""


@dataclass(frozen=True)
class Saved:
    """What there is to save.

    Attributes:
        config: for ``adapter_config.json``.
        tensors: by PEFT's keys.
        metadata: strings for the header of the weights.
        base_format: of a quantized base, such as ``"nf4"``.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_format: str = ""

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Saved:
        """Return the same with other tensors."""
        return replace(self, tensors=tensors)


def write_saved(
    saved: Saved, place: Path, *, dtype: str | torch.dtype | None = None, tokenizer: Any = None
) -> Path:
    """Write an adapter with its card, its names without wrappers of training.

    Arguments and errors are those of :func:`write_adapter`.
    """
    saved = replace(
        saved,
        config=plain_config(saved.config),
        tensors={peft_key(key): tensor for key, tensor in saved.tensors.items()},
    )
    specs = stored_specs(saved.tensors, dtype)
    card = adapter_card(str(place), saved.config, specs, saved.base_format)
    return write_adapter(
        place, saved.config, saved.tensors, metadata=saved.metadata, card=card, dtype=dtype,
        tokenizer=tokenizer,
    )  # fmt: skip


def saved_of(what: Any, name: str | None, revision: str | None) -> Saved:
    """Return what is to be saved of whatever was given.

    Raises:
        UsageError, UnsupportedError: as :func:`regraft.save`.
    """
    what = _unwrapped(what)
    if isinstance(what, LiveAdapter):
        return Saved(with_base(what.config, None, revision), what.tensors, what.metadata)
    if is_peft_model(what) or getattr(what, "_hf_peft_config_loaded", False):
        return _of_peft(what, name, revision)
    handle = _handle_of(what)
    if handle is None:
        raise UsageError(
            "there is no adapter to save", found=type(what).__name__,
            expected="a model with adapters attached, what attach() returned, or a PeftModel",
            hint="Attach an adapter with regraft.attach(model, ...) first",
        )  # fmt: skip
    chosen = _chosen(list(handle.names), list(handle.active_adapters), name)
    merged = bool(handle.merged_adapters)
    return of_live(handle.adapter(chosen), handle.base, revision, merged=merged)


def _unwrapped(what: Any) -> Any:
    """Return a model without what compiling, distributing or Trainer puts around it."""
    what = unwrapped(what)
    return vars(what).get("_regraft_model", what) if isinstance(what, nn.Module) else what


def _handle_of(what: Any) -> Any:
    """Return what ``attach`` returned for a model, or the same if it was given; None for others."""
    if isinstance(what, nn.Module):
        return attached_to(what)
    return what if isinstance(what, Handle) else None


def _chosen(names: Sequence[str], active: Sequence[str], name: str | None) -> str:
    """Return the name of the adapter that is meant.

    Raises:
        UsageError: there is none, or several could be meant.
    """
    shown = ", ".join(map(repr, names)) or "none"
    if name is not None:
        if name not in names:
            raise UsageError("there is no adapter of this name", found=repr(name), expected=shown)
        return name
    for candidates in (names, active):
        if len(candidates) == 1:
            return candidates[0]
    raise UsageError(
        "several adapters could be meant" if names else "there is no adapter to save",
        found=shown, hint="Pass name=... to say which" if names else "Load or add one first",
    )  # fmt: skip


def with_base(
    config: Mapping[str, Any], model: nn.Module | None, revision: str | None
) -> dict[str, Any]:
    """Return a config that names its base, and the base's revision where it is known.

    Args:
        config: the adapter's.
        model: the base, if it is at hand.
        revision: what the user says; it wins.
    """
    fields = dict(config)
    settings = getattr(model, "config", None)
    own = getattr(settings, "_name_or_path", None) or getattr(model, "name_or_path", None)
    named = fields.get("base_model_name_or_path") or own or None
    is_text = not isinstance(named, str) or plain_text(named) == named  # as a file of JSON has it
    fields["base_model_name_or_path"] = named if is_text else None
    if revision is None and hub_id(fields["base_model_name_or_path"]):
        revision = fields.get("revision") or getattr(settings, "_commit_hash", None)
    fields["revision"] = revision or fields.get("revision")
    if fields.get("task_type") is None and fields.get("auto_mapping") is None:
        fields["auto_mapping"] = _auto_mapping(model)
    return fields


def _auto_mapping(model: Any) -> dict[str, str] | None:
    """Return what PEFT's ``AutoPeftModel`` infers the base's class from; None if it cannot load it.

    Above the class of a model there may be others that were made at run time, as of a twin.
    """
    classes = type(_unwrapped(model)).__mro__
    real = (c for c in classes if getattr(sys.modules.get(c.__module__), c.__name__, None) is c)
    cls = next((c for c in real if hasattr(c, "from_pretrained")), None)
    if cls is None or cls.__module__.partition(".")[0] not in _LIBRARIES:
        return None
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def of_live(
    adapter: LiveAdapter, base: LiveBase, revision: str | None, *, merged: bool = False
) -> Saved:
    """Return what is to be saved of an adapter in memory.

    A fingerprint that came with the adapter stays, unless the adapter is trained here.
    """
    metadata = {key: value for key, value in adapter.metadata.items() if key != "format"}
    matched, served = split(base, adapter.adapter)
    names = [*match_live(base, [matched]), *(f"{path}.weight" for path, _ in served)]
    parameters = parameters_of(base, names)
    if not merged and (adapter.is_trainable or KEY not in metadata):
        found = fingerprint_of(parameters)
        metadata = {**metadata, **({KEY: found} if found is not None else {})}
    config = with_base(adapter.config, base.model, revision)
    return Saved(config, adapter.tensors, metadata, format_of(parameters.values()))


def format_of(parameters: Any) -> str:
    """Return the name of a quantized base's format, of its parameters; "" for a plain one."""
    for parameter in parameters:
        if is_4bit(parameter.weight):
            return str(parameter.weight.quant_state.quant_type)
        if is_8bit(parameter.weight):
            return "int8"
    return ""


# -- PEFT ------------------------------------------------------------------------------------------


def is_peft_model(what: Any) -> bool:
    """Whether an object is a ``PeftModel``, told without importing PEFT."""
    return any(
        cls.__name__ == "PeftModel" and cls.__module__.startswith("peft.")
        for cls in type(what).__mro__
    )


def _of_peft(model: Any, name: str | None, revision: str | None) -> Saved:
    """Return what PEFT would save of an adapter, without the embeddings that it adds by itself."""
    active = _as_list(getattr(model, "active_adapters", ()))
    chosen = _chosen(list(model.peft_config), active, name)
    settings = model.peft_config[chosen]
    kind = getattr(settings.peft_type, "value", settings.peft_type)
    if kind != "LORA":
        raise UnsupportedError(
            f"peft_type {kind} is not LoRA", where=f"adapter {chosen!r}",
            hint="Save it with PEFT's save_pretrained, or convert it with peft.convert_to_lora",
        )  # fmt: skip
    base = model.get_base_model() if is_peft_model(model) else model
    tensors = _peft_tensors(model, base, chosen)
    parameters = _peft_parameters(base)
    config = with_base(_peft_config(model, base, settings), base, revision)
    start = str(settings.init_lora_weights).lower()
    found = None if start.startswith(_CHANGING_STARTS) else fingerprint_of(parameters)
    metadata = {KEY: found} if found is not None else {}
    return Saved(config, tensors, metadata, format_of(parameters.values()))


def _as_list(active: Any) -> list[str]:
    if callable(active):
        try:
            active = active()
        except ValueError:  # transformers: no adapter is loaded
            return []
    return [active] if isinstance(active, str) else list(active)


def _peft_config(model: Any, base: nn.Module, settings: Any) -> dict[str, Any]:
    """Return a config as PEFT would save it."""
    fields = dict(settings.to_dict())
    if settings.task_type is None and is_peft_model(model):
        fields["auto_mapping"] = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return fields


def _peft_tensors(model: Any, base: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by PEFT's keys.

    PEFT saves embeddings along whenever they are targeted. They are kept here only where the
    vocabulary grew, or where they were trained themselves.
    """
    from peft import get_peft_model_state_dict

    grown = _has_grown(base)
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=grown)
    if not is_peft_model(model):
        found = {f"base_model.model.{key}": tensor for key, tensor in found.items()}
    if not grown:
        found = {**found, **_trained_embeddings(model, base)}
    return {key: t for key, t in found.items() if _UNTRAINED not in key and torch.is_tensor(t)}


def _trained_embeddings(model: nn.Module, base: Any) -> dict[str, torch.Tensor]:
    """Return the base's own embeddings that require gradients, by PEFT's keys."""
    layers = [
        getattr(base, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    weights = {id(getattr(_inner(layer), "weight", None)) for layer in layers if layer is not None}
    prefix = "" if is_peft_model(model) else "base_model.model."
    return {
        prefix + key: weight.detach()
        for key, weight in model.named_parameters()
        if id(weight) in weights and weight.requires_grad
    }


def _inner(layer: Any) -> Any:
    """Return a layer without PEFT's wrapper; what was copied for training is no base's weight."""
    if hasattr(layer, "modules_to_save"):
        return layer.original_module
    return getattr(layer, "base_layer", layer)


def _has_grown(base: Any) -> bool:
    """Whether the vocabulary differs from the one that the base was loaded with.

    Only what is on this machine is asked: the base's folder, or the Hub's cache.
    """
    settings: Any = getattr(base, "config", None)
    own, source = getattr(settings, "vocab_size", None), getattr(settings, "_name_or_path", None)
    if not own or not source:
        return False
    try:
        before = type(settings).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):  # not on this machine, as for a model that was made here
        return False
    return bool(before.vocab_size != own)


def _peft_parameters(base: nn.Module) -> dict[str, Parameter]:
    """Return the adapted parameters of PEFT's base by their plain names.

    None if an adapter is merged into it: its weights are not the base's then.
    """
    modules = dict(base.named_modules())
    if any(getattr(module, "merged", False) for module in modules.values()):
        return {}
    found = {}
    for name, weight in base.named_parameters():
        if _EMBEDDING_WRAPPER in name and ".lora_" not in name:
            owner = modules[name.rpartition(".")[0]]
            found[name.replace(_EMBEDDING_WRAPPER, ".")] = Parameter(owner, weight)
    return {name: p for name, p in found.items() if ".base_layer" not in name}
