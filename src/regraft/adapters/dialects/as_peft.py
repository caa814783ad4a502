"""An adapter written in PEFT's format: its config, and its tensors under PEFT's names."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.adapters.dialects.form import LoraModule, Moved, NewFile, PlainAdapter
from regraft.adapters.dialects.shared.experts import single_experts
from regraft.adapters.dialects.shared.once import NewTensors
from regraft.adapters.dialects.shared.peft_config import KEPT, place_of
from regraft.adapters.dialects.shared.peft_config import alpha_of as alpha_of
from regraft.adapters.dialects.shared.peft_config import config_of as config_of
from regraft.adapters.dialects.writing import json_file, safetensors_file
from regraft.adapters.wrappers import PREFIX
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.layout import ADAPTER_CONFIG, ADAPTER_SAFE

_FACTORS = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "convolution": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}


def write(adapter: PlainAdapter, base: Checkpoint | None = None) -> tuple[NewFile, ...]:
    """Return the files of an adapter in PEFT's format.

    The base matters to stacks of experts. It lets the config name modules by their last parts.

    Raises:
        UsageError: there are such stacks, and no base to say how they lie.
        UnsupportedError: the base has no names for its experts one by one.
    """
    adapter = single_experts(adapter, base)
    kept = {key: value for key, value in adapter.metadata.items() if key != KEPT}
    weights = safetensors_file(ADAPTER_SAFE, tensors_of(adapter), {**kept, "format": "pt"})
    return json_file(ADAPTER_CONFIG, config_of(adapter, base)), weights


def tensors_of(adapter: PlainAdapter) -> dict[str, Moved]:
    """Return the tensors of an adapter by the names that PEFT saves them under.

    Experts are modules of their own here (``experts.3.gate_proj``), which needs no agreement on how
    a stack lies.
    """
    found = NewTensors()
    for module in adapter.modules:
        found.add({PREFIX + name: tensor for name, tensor in _of_module(module)})
    adapted = {module.name for module in adapter.modules}
    for name, tensor in adapter.whole.items():
        found[PREFIX + place_of(name, adapter, adapted)] = tensor
    for name, (_, rows) in adapter.token_rows.items():
        found[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = rows
    return found


def _of_module(module: LoraModule) -> Iterator[tuple[str, Moved]]:
    a, b = _FACTORS[module.kind]
    yield module.name + a, module.a
    yield module.name + b, module.b
    if module.bias is not None:
        yield f"{module.name}{b.removesuffix('.weight')}.bias", module.bias
    if module.magnitude is not None:
        yield f"{module.name}.lora_magnitude_vector", module.magnitude
