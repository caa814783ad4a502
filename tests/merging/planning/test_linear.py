"""Which modules are linear layers, against the classes that transformers' models are made of."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.planning.quantized.linear_layers import is_linear, model_types, plain_modules
from regraft.names import NameMap

CLASSES = (
    "Blip2ForConditionalGeneration", "CanineForSequenceClassification", "DeepseekV32ForCausalLM",
    "FalconForCausalLM", "Gemma3ForConditionalGeneration", "GPT2LMHeadModel", "MambaForCausalLM",
    "MarkupLMForTokenClassification", "ModernBertDecoderForCausalLM", "MusicgenForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen2_5OmniForConditionalGeneration", "SiglipModel",
    "T5ForConditionalGeneration", "WhisperForCausalLM",
)  # fmt: skip


def empty_model(name: str) -> tuple[Any, BaseIndex]:
    """Return a model without memory for its weights, and its names."""
    model_class = getattr(transformers, name)
    settings = model_class.config_class()
    with torch.device("meta"):
        model = model_class(settings)
    config = settings.to_dict() | {"architectures": [name]}
    base = SimpleNamespace(config=config, tensors=dict.fromkeys(model.state_dict()))
    index = SimpleNamespace(names=NameMap.for_config(config), base=base)
    return model, cast(BaseIndex, index)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose weight has two axes."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            yield name, module


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_taken_that_transformers_would_leave(name: str) -> None:
    model, index = empty_model(name)
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    taken = 0
    for module_name, module in matrices(model):
        if is_linear(index, f"{module_name}.weight"):
            assert type(module) is nn.Linear, module_name
            assert should_convert_module(module_name, kept) or module_name in _last(model)
            taken += 1
    assert (taken > 0) == (name not in ("FalconForCausalLM", "GPT2LMHeadModel"))


def _last(model: nn.Module) -> set[str]:
    """Return the module that transformers leaves because it comes last, whatever it is."""
    return {list(dict(model.named_parameters()))[-1].rpartition(".")[0]}


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_left_is_named_so_that_transformers_leaves_it(name: str) -> None:
    model, index = empty_model(name)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    taken = {n for n in shapes if n.endswith(".weight") and len(shapes[n]) == 2}
    taken = {n for n in taken if is_linear(index, n)}
    plain = {m for n, s in shapes.items() if n not in taken for m in plain_modules(index, n, s)}
    plain.add(index.names.output_embedding or "lm_head")
    kept = HfQuantizer.get_modules_to_not_convert(model, sorted(plain), model._keep_in_fp32_modules)
    for module_name, module in matrices(model):
        if type(module) is nn.Linear and f"{module_name}.weight" in shapes:
            converted = should_convert_module(module_name, kept)
            assert converted == (f"{module_name}.weight" in taken), module_name


def test_the_types_of_a_model_s_parts_are_seen() -> None:
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}, "x": [1]}
    assert model_types(config) == {"vision-encoder-decoder", "gpt2"}
    base = SimpleNamespace(config=config, tensors={})
    index = SimpleNamespace(names=NameMap.for_config(config), base=base)
    assert not is_linear(cast(BaseIndex, index), "decoder.transformer.h.0.attn.c_attn.weight")
