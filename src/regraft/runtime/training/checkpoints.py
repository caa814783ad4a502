"""Checkpoints of transformers' Trainer: the file that it looks for, and runs that PEFT began."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from regraft.adapters.dialects.peft import read_adapter
from regraft.errors import MismatchError, Problem
from regraft.runtime.model.matching import LiveAdapter
from regraft.runtime.store import loading
from regraft.runtime.training.as_peft import names_in_peft

_WEIGHTS = "model.safetensors"
"""The weights that Trainer looks for in a checkpoint."""

_SAME = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "bias")
"""Settings that decide what an adapter's tensors mean, or which of them there are."""


def write_for_trainer(
    adapter: LiveAdapter, tensors: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write an adapter's tensors by the names that PEFT's model has for them.

    Trainer looks for this file, and gives what is in it to the model's ``load_state_dict``: to the
    twin's, or to that of a ``PeftModel`` if the run goes on with PEFT.
    """
    names, path = names_in_peft(adapter), folder / _WEIGHTS
    plain = {names[key]: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    new = path.with_name(f".{path.name}.new")
    save_file(plain, new, metadata={"format": "pt"})
    new.replace(path)


def complete(folder: Path, adapter: LiveAdapter) -> None:
    """Add to a checkpoint of PEFT the file that Trainer looks for, unless it is there.

    Args:
        folder: the checkpoint.
        adapter: the one that is to go on.

    Raises:
        MismatchError: its adapter is another one; nothing is written then.
        AdapterError, MissingFileError: it holds none.
    """
    if (folder / _WEIGHTS).is_file():
        return
    files = loading.open_files(folder, None)
    saved = loading.load(adapter.name, files, read_adapter(files))
    problems = list(_differences(saved, adapter, str(folder)))
    if problems:
        raise MismatchError(problems)
    write_for_trainer(adapter, {key: saved.tensors[key] for key in adapter.tensors}, folder)


def _differences(saved: LiveAdapter, adapter: LiveAdapter, where: str) -> list[Problem]:
    """Return what tells the adapter of a checkpoint from the one that is to go on."""
    hint = "Attach an adapter with the config of the run, or begin a new run"
    found = [
        Problem(f"the run was begun with another {name!r}", where, repr(ours), repr(theirs), hint)
        for name in _SAME
        if (ours := _setting(adapter.config, name)) != (theirs := _setting(saved.config, name))
    ]
    shapes, others = ({key: tuple(t.shape) for key, t in each.tensors.items()}
                      for each in (adapter, saved))  # fmt: skip
    return found + [
        Problem("the run trains another tensor", f"{where}: {key}", str(shapes.get(key, "none")),
                str(others.get(key, "none")), hint)
        for key in dict.fromkeys((*shapes, *others))
        if shapes.get(key) != others.get(key) and not _is_of_base(key, shapes)
    ]  # fmt: skip


def _is_of_base(key: str, own: Mapping[str, Any]) -> bool:
    """Whether a tensor is an embedding of the base, which PEFT saves along and does not train."""
    return key.endswith(".base_layer.weight") and key not in own


def _setting(config: Mapping[str, Any], name: str) -> Any:
    return config.get(name) or None
