"""``regraft.attach`` and ``regraft.handle_of``. Importing this loads no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import UsageError
from regraft.libraries import require
from regraft.runtime.store.cache import AdapterCache

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.runtime.handle import Adapters


def attach(
    model: nn.Module,
    adapter: Any = None,
    name: str = "default",
    *,
    is_trainable: bool = False,
    dtype: torch.dtype | str | None = None,
    cache: AdapterCache | None = None,
    peft_version: str | None = None,
    token: str | None = None,
) -> Adapters:
    """Put adapters on a running model, without a wrapper.

    Args:
        model: a torch model: transformers' (16-bit, or bitsandbytes 8-bit or 4-bit), or any other;
            compiled ones too, and models in DataParallel or with checkpointed layers.
        adapter: an adapter's folder or Hub id ``org/name[@revision]``, which then answers; a
            :class:`LoraConfig` (regraft's or PEFT's), for one to be trained; None for none yet.
        name: what it is called from now on.
        is_trainable: whether an adapter that is loaded goes on in training.
        dtype: of the adapter's tensors; by default as they are stored.
        cache: keeps adapters that are loaded within a cap; without one all stay in memory.
        peft_version: as for :func:`regraft.merge`, of an adapter that is loaded.
        token: Hub token; by default the one the machine is logged in with.

    Returns:
        The handle. The model itself is used as before, and is as before in class, module tree and
        ``state_dict()``.

    Raises:
        UsageError: the model has a handle already, is no model, has PEFT's adapters in it, or is
            wrapped in what adapters do not work in.
        MissingExtraError: torch is not installed.
        RegraftError: the adapter cannot be read, or does not fit; the model is then as before.
    """
    require("torch", why="a live model")
    from regraft.runtime.handle import Adapters
    from regraft.runtime.model.attached import attached_to
    from regraft.runtime.model.wrappers import unwrapped
    from regraft.runtime.whole import whole

    _check_model(model)
    if attached_to(unwrapped(model)) is not None:
        raise UsageError(
            "this model has adapters attached already", where=type(model).__name__,
            hint="Use that handle's load_adapter; regraft.handle_of(model) finds it",
        )  # fmt: skip
    try:
        adapters = whole(partial(Adapters, model, cache))
        if isinstance(adapter, str | Path):
            adapters.load_adapter(
                adapter, name, is_trainable=is_trainable, dtype=dtype, peft_version=peft_version,
                token=token,
            )  # fmt: skip
        elif adapter is not None:
            adapters.add_adapter(name, adapter)
        if adapter is not None:
            adapters.set_adapter(name)
    except BaseException:
        if (made := attached_to(unwrapped(model))) is not None:
            made.detach()
        raise
    return adapters


def _check_model(model: Any) -> None:
    """Refuse what is no torch model, is PEFT's, or is wrapped in what adapters do not work in.

    Raises:
        UsageError: it is.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(
            "attach needs a model that is in memory", found=f"{model!r}"[:90],
            hint="Load it first: AutoModelForCausalLM.from_pretrained(...)",
        )  # fmt: skip
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise UsageError(
            "this model has PEFT's adapters on it", where=type(model).__name__,
            hint="Attach to the plain base: model.unload() gives it",
        )  # fmt: skip
    for path, module in model.named_modules():
        _check_module(path, module)


def _check_module(path: str, module: nn.Module) -> None:
    if any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
        raise UsageError(
            "this model has PEFT's adapters in it", where=path or type(module).__name__,
            found=f"{type(module).__module__}.{type(module).__name__}",
            hint="Attach to the plain base: load it again with from_pretrained(), and pass the "
            "adapter's folder to attach() instead of model.load_adapter(); unload() of a PeftModel "
            "gives its base",
        )  # fmt: skip
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
    if "FullyShardedDataParallel" in names:
        raise UsageError(
            "the weights of this model are sharded, so adapters do not fit them",
            where=path or "the model", found="wrapped in FullyShardedDataParallel",
            hint="Attach to the plain model, before it is wrapped",
        )  # fmt: skip


def handle_of(model: nn.Module) -> Adapters | None:
    """Return the handle of a model, or of the one inside of wrappers; None if it has none."""
    require("torch", why="a live model")
    from regraft.runtime.model.attached import attached_to
    from regraft.runtime.model.wrappers import unwrapped

    return attached_to(unwrapped(model))
