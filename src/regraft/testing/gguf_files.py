"""GGUF files as llama.cpp writes them, made by the ``gguf`` package from arrays or from a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CANNOT_QUANTIZE = frozenset((
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
))  # fmt: skip
"""Types for which the package has no quantizer; any bytes are blocks of them."""


def blocks(values: Array, name: str, rng: np.random.Generator) -> Array:
    """Return an array as rows of blocks of a type: its own values, or of any bytes."""
    kind = gguf.GGMLQuantizationType[name]
    if name not in CANNOT_QUANTIZE:
        stored: Array = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
        return stored
    shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
    found: Array = rng.integers(0, 256, shape, dtype=np.uint8)
    return found


def write(
    path: Path, architecture: str, metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Array, str]],
) -> Path:  # fmt: skip
    """Write a GGUF file.

    Args:
        path: of the file.
        architecture: ``general.architecture``.
        metadata: whole numbers, floats, booleans, strings and lists by key.
        tensors: arrays of blocks with the name of their type, by name.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(weight: Array, heads: int) -> Array:
    """Return rows of queries or keys in llama.cpp's order, as its converter does it."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def converted(model: Any, architecture: str, kind: str) -> dict[str, tuple[Array, str]]:
    """Return the tensors of a model of transformers as llama.cpp's converter stores them.

    Args:
        model: a causal language model.
        architecture: GGUF's name of its architecture.
        kind: type of its matrices; vectors are F32.
    """
    config = model.config
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        values = tensor.float().numpy()
        if architecture == "llama" and ".attn_q." in stored:
            values = permuted(values, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in stored:
            values = permuted(values, config.num_key_value_heads)
        if architecture in ("gemma2", "gemma3", "nemotron") and stored.endswith("norm.weight"):
            values = values + 1
        type_ = "F32" if values.ndim == 1 else kind
        tensors[stored] = (blocks(values, type_, rng), type_)
    return tensors
