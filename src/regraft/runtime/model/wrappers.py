"""What compiling and training put around modules, and the names of the modules inside.

A wrapper holds its module as a child, so the names of everything inside get another segment.
Adapters know the names without it. A wrapper is told by its class: a module of a model may be
called ``module`` too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from regraft.errors import UsageError

INSIDE = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
"""The name of the wrapped module, by the wrapper's class; all are torch's."""


def segment_of(module: nn.Module) -> str | None:
    """Return the name that a wrapper has for its module; None for what is no wrapper."""
    for cls in type(module).__mro__:
        if cls.__name__ in INSIDE and cls.__module__.startswith("torch."):
            return INSIDE[cls.__name__]
    return None


def unwrapped(model: Any) -> Any:
    """Return the module within all wrappers; anything else as it is."""
    while isinstance(model, nn.Module):
        segment = segment_of(model)
        inner = model._modules.get(segment) if segment is not None else None
        if inner is None:
            break
        model = inner
    return model


def check_trainable(model: nn.Module) -> None:
    """Refuse a wrapper in which an adapter would not be trained right.

    Raises:
        UsageError: it shares no gradients of parameters that came after it.
    """
    for path, module in model.named_modules():
        if type(module).__name__ == "DistributedDataParallel":
            raise UsageError(
                "processes do not share the gradients of adapters that are attached later",
                where=path or "the model", found="wrapped in DistributedDataParallel",
                hint="Attach to the plain model, and wrap handle.for_trainer() instead of it",
            )  # fmt: skip


def plain_paths(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield each module's path, the same without wrappers, and the module; one inside comes later.

    A module that has several paths comes with each.
    """
    plain: dict[str, str] = {}
    segments: dict[str, str | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        segments[path] = segment_of(module)
        if not path:
            plain[path] = ""
        else:
            parent, _, leaf = path.rpartition(".")
            above = plain[parent]
            inside = segments[parent] == leaf
            plain[path] = above if inside else f"{above}.{leaf}".removeprefix(".")
        yield path, plain[path], module
