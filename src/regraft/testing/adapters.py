"""Random adapters made and answered by PEFT: the other side of every faithfulness test.

An adapter is *live* when PEFT runs it beside the base's weights. That answer, in float32, is what a
merged checkpoint has to give.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from regraft.testing.zoo import load_base, logits

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

Prepare = Callable[[Any], None]
"""Changes a base model in place before an adapter is put on it, such as growing its vocabulary."""


def make_adapter(
    base: Path, folder: Path, config: Any, seed: int = 1, prepare: Prepare | None = None
) -> Path:
    """Put a random adapter of ``config`` on the model in ``base`` and save it into ``folder``.

    Args:
        base: folder of the base checkpoint; loaded in float32.
        folder: where PEFT's ``save_pretrained`` writes.
        config: a ``LoraConfig``; it is copied, because PEFT changes the one it is given.
        seed: of PEFT's initial values and of the noise on them.
        prepare: what training did to the base first.

    Returns:
        ``folder``, whose every trained tensor differs from its initial value.
    """
    import torch
    from peft import PeftModel, get_peft_model

    torch.manual_seed(seed)
    model = load_base(base)
    if prepare is not None:
        prepare(model)
    with _quiet(), mock.patch.object(PeftModel, "create_or_update_model_card"):  # no card is read
        adapted = get_peft_model(model, replace(config))
        perturb(adapted, seed)
        adapted.save_pretrained(folder)
    return folder


def perturb(model: Any, seed: int) -> None:
    """Add noise of a sensible size to every trainable parameter of a PEFT model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += _noise_scale(name, parameter) * noise


def _noise_scale(name: str, parameter: Any) -> float:
    """Return the deviation of the noise: a delta of A and B comes to a fraction of the weight."""
    if "lora_magnitude_vector" in name:
        return 0.2 * float(parameter.data.abs().mean())
    if "lora_embedding_B" in name:
        return 0.1
    if "lora_embedding_A" in name:
        return 0.2
    if "lora_A" in name:
        return 0.5 / math.sqrt(math.prod(parameter.shape[1:]))
    if "lora_B" in name:
        return 0.2
    return 0.3 * float(parameter.data.std()) if parameter.numel() > 1 else 0.3


def live_model(
    base: Path,
    adapters: Path | Sequence[Path],
    weights: Sequence[float] | None = None,
    prepare: Prepare | None = None,
) -> Any:
    """Return the base in float32 with PEFT's adapters attached, all active, in evaluation mode.

    Args:
        base: folder of the base checkpoint.
        adapters: one adapter's folder, or several whose deltas add up in this order.
        weights: a factor on each adapter's scale; 1 by default.
        prepare: what training did to the base before the adapter was put on it.
    """
    from peft import PeftModel

    folders = [adapters] if isinstance(adapters, Path) else list(adapters)
    names = [f"adapter{number}" for number in range(len(folders))]
    model = load_base(base)
    if prepare is not None:
        prepare(model)
    if any(_changes_base(folder) for folder in folders):
        # PiSSA and OLoRA round what is left of the base to its dtype, as they did in training.
        model = model.to(_stored_dtype(base))
    with _quiet():
        live = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            live.load_adapter(folder, adapter_name=name)
        if len(names) > 1:
            live.base_model.set_adapter(names)
    _weigh(live, dict(zip(names, weights or [1.0] * len(names), strict=True)))
    return live.float().eval()


def _changes_base(adapter: Path) -> bool:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora"))


def _stored_dtype(base: Path) -> Any:
    import torch

    config = json.loads((base / "config.json").read_text())
    return getattr(torch, config.get("dtype") or config["torch_dtype"])


def _weigh(live: Any, weights: dict[str, float]) -> None:
    from peft.tuners.lora import LoraLayer

    for module in live.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                module.set_scale(name, weight)


def live_logits(
    base: Path,
    adapters: Path | Sequence[Path],
    inputs: dict[str, Any],
    weights: Sequence[float] | None = None,
    prepare: Prepare | None = None,
) -> Any:
    """Return the logits of :func:`live_model` on ``inputs``, float64: what a merge has to match."""
    return logits(live_model(base, adapters, weights, prepare), inputs)


def cast_adapter(source: Path, folder: Path, dtype: str) -> Path:
    """Copy an adapter with every tensor stored as torch's ``dtype``; return ``folder``."""
    import torch

    return rewrite_adapter(
        source, folder, lambda name, tensor: (name, tensor.to(getattr(torch, dtype)))
    )


def rewrite_adapter(
    source: Path,
    folder: Path,
    change: Callable[[str, Any], tuple[str, Any] | None],
    **config: Any,
) -> Path:
    """Copy an adapter, passing every (name, tensor) through ``change``; return ``folder``.

    Args:
        source: the adapter's folder.
        folder: where the copy goes; made if it is not there.
        change: takes a key and its tensor; returns the new ones, or None to leave it out.
        **config: fields to set in the copy's ``adapter_config.json``.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    changed = (change(*item) for item in load_file(source / WEIGHTS_FILE).items())
    save_file(
        {name: tensor.contiguous() for name, tensor in filter(None, changed)},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    fields = json.loads((source / CONFIG_FILE).read_text()) | config
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2))
    return folder


class _quiet(warnings.catch_warnings):  # noqa: N801  (used like the function it wraps)
    """Silence PEFT's advice about choices that the tests make on purpose."""

    def __enter__(self) -> Any:
        log = super().__enter__()
        warnings.simplefilter("ignore")
        return log
