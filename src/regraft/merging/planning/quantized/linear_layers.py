"""Which weights belong to linear layers that transformers quantizes, by their names.

transformers replaces the modules whose class is ``nn.Linear``. A checkpoint does not tell the class
of a module, so what has a weight of two axes and is another class is told by its name. To leave a
linear layer plain is always right, as the config names it; the other way round nothing can load it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from regraft.merging.inputs.base_index import BaseIndex
from regraft.names.conv1d import is_conv1d

_NO_LINEAR = re.compile(
    r"\w*embed\w*|\w*_emb|wte|wpe|shared|\w*position\w*|token_type\w*|\w*_token|pe_k|router|gate"
    r"|relative_attention_bias|bias_values|lm_head",
    re.IGNORECASE,
)
"""Last parts of modules that stay plain: embeddings, what chooses experts, and output heads, also
those of parts: a head's name in the list of plain modules is one for all that end so."""

_KEPT = re.compile(
    r".*\.DenseReluDense\.wo|.*\.(indexer|compressor)\..*|.*\.o_a_proj|(.*\.)?qformer\..*"
)
"""Modules that transformers leaves in floating point, whatever the format: its
``_keep_in_fp32_modules`` (T5, DeepSeek, BLIP-2), and a linear layer of groups."""

_OWN_LAYERS = frozenset(("falcon", "ibert"))
"""Model types whose linear layers are of a class of their own."""

EXPERTS = ".experts."


def is_linear(index: BaseIndex, name: str) -> bool:
    """Whether transformers would quantize the weight of this name.

    Args:
        index: the model's names.
        name: of a tensor with two axes; ends with ``.weight``.
    """
    pieces = index.names.pieces(name)
    if len(pieces) != 1 or not pieces[0].whole:
        return False
    names = {name.removesuffix(".weight"), pieces[0].parameter.removesuffix(".weight")}
    return not any(_is_other(index, module) for module in names) and not _is_head(index, names)


def _is_other(index: BaseIndex, module: str) -> bool:
    """Whether a module is of another class, or one that stays plain."""
    kinds = model_types(index.base.config or {})
    last = re.sub(r"(\.\d+)+$", "", module).rpartition(".")[2]
    parent = module.rpartition(".")[0]
    return bool(
        _NO_LINEAR.fullmatch(last)
        or _KEPT.fullmatch(module)
        or kinds & _OWN_LAYERS
        or any(is_conv1d(kind, module) for kind in kinds)
        # nn.MultiheadAttention has a class of its own for its last layer
        or (last == "out_proj" and f"{parent}.in_proj_weight" in index.base.tensors)
    )


def _is_head(index: BaseIndex, modules: set[str]) -> bool:
    """Whether it is an embedding of the whole model, or its output head."""
    names = index.names
    prefix = f"{names.base_model_prefix}."
    known = [names.input_embedding, names.output_embedding]
    ends = {end.removeprefix(prefix) for end in known if end}
    found = {module.removeprefix(prefix) for module in modules}
    inside = any(module.startswith(f"{end}.") for module in found for end in ends)
    return inside or bool(found & ends)


def model_types(config: Mapping[str, Any]) -> set[str]:
    """Return the model type that a config names, and those of its parts."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return {kind for part in parts if isinstance(kind := part.get("model_type"), str)}


def plain_modules(index: BaseIndex, name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield the modules whose weight a tensor is, as files and as transformers call them.

    Of experts it is the module that holds all of them, as transformers has it: their number would
    make the list very long, and transformers looks through it for every module.
    """
    parameters = (piece.parameter for piece in index.names.pieces(name))
    for each in dict.fromkeys((name, *parameters)):
        if EXPERTS in each and len(shape) > 1:
            yield each[: each.index(EXPERTS) + len(EXPERTS) - 1]
        elif len(shape) == 2 and each.endswith(".weight"):
            yield each.removesuffix(".weight")
