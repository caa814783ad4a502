"""Bases in every quantized format that is read, stored by hand: random codes, sensible scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from digests.making import (
    BF16,
    FP8,
    Array,
    Tensors,
    draw,
    lora,
    raw,
    write_adapter,
    write_base,
)
from digests.plain import EVEN, LAYERS, Sizes, llama_config, llama_tensors

GROUP = 32
"""Inputs that share a scale, where a format has groups."""

Store = Callable[[str, int, int, int], Tensors]
"""Returns what stores a weight: the module's name, outputs, inputs, seed."""


@dataclass(frozen=True)
class Format:
    """How a base is stored: ``quantization_config``, and what stores one weight."""

    config: dict[str, Any]
    store: Store


def _scales(*shape: int, seed: int, dtype: Any, size: float = 2.0**-8) -> Array:
    """Return positive numbers, from one to five times ``size``."""
    return ((draw(*shape, seed=seed) + 3) * np.float32(size)).astype(dtype)


def _finite_fp8(*shape: int, seed: int) -> Array:
    bits = raw(*shape, seed=seed)
    return np.where((bits & 0x7F) == 0x7F, bits ^ 1, bits).astype(np.uint8).view(FP8)


def _gptq(bits: int, *, ordered: bool) -> Store:
    def store(module: str, out: int, inputs: int, seed: int) -> Tensors:
        groups = np.arange(inputs) // GROUP
        if not ordered:
            groups = np.random.default_rng(seed).permutation(groups)
        count = inputs // GROUP
        return {
            f"{module}.qweight": raw(inputs * bits // 32, out, seed=seed, dtype=np.int32),
            f"{module}.qzeros": raw(count, out * bits // 32, seed=seed, dtype=np.int32),
            f"{module}.scales": _scales(count, out, seed=seed, dtype=np.float16),
            f"{module}.g_idx": groups.astype(np.int32),
        }

    return store


def _gptq_format(bits: int, *, ordered: bool, layout: str) -> Format:
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": not ordered,
              "checkpoint_format": layout}  # fmt: skip
    return Format(config, _gptq(bits, ordered=ordered))


def _awq(module: str, out: int, inputs: int, seed: int) -> Tensors:
    count = inputs // GROUP
    return {
        f"{module}.qweight": raw(inputs, out // 8, seed=seed, dtype=np.int32),
        f"{module}.qzeros": raw(count, out // 8, seed=seed, dtype=np.int32),
        f"{module}.scales": _scales(count, out, seed=seed, dtype=np.float16),
    }


def _fp8(module: str, out: int, inputs: int, seed: int) -> Tensors:
    blocks = (-(-out // 128), -(-inputs // 128))
    return {
        f"{module}.weight": _finite_fp8(out, inputs, seed=seed),
        f"{module}.weight_scale_inv": _scales(*blocks, seed=seed, dtype=np.float32),
    }


def _packed(bits: int) -> Store:
    def store(module: str, out: int, inputs: int, seed: int) -> Tensors:
        count = inputs // GROUP
        name = f"{module}.weight"
        return {
            f"{name}_packed": raw(out, inputs * bits // 32, seed=seed, dtype=np.int32),
            f"{name}_zero_point": raw(out * bits // 32, count, seed=seed, dtype=np.int32),
            f"{name}_scale": _scales(out, count, seed=seed, dtype=BF16),
            f"{name}_shape": np.array([out, inputs], np.int64),
        }

    return store


def _int8(module: str, out: int, inputs: int, seed: int) -> Tensors:
    return {
        f"{module}.weight": raw(out, inputs, seed=seed, dtype=np.int8),
        f"{module}.weight_scale": _scales(out, 1, seed=seed, dtype=BF16),
    }


def _float8(module: str, out: int, inputs: int, seed: int) -> Tensors:
    return {
        f"{module}.weight": _finite_fp8(out, inputs, seed=seed),
        f"{module}.weight_scale": _scales(out, 1, seed=seed, dtype=BF16),
    }


def _nvfp4(module: str, out: int, inputs: int, seed: int) -> Tensors:
    return {
        f"{module}.weight_packed": raw(out, inputs // 2, seed=seed),
        f"{module}.weight_scale": _scales(out, inputs // 16, seed=seed, dtype=FP8, size=32),
        f"{module}.weight_global_scale": np.array([1234.5], np.float32),
    }


def _powers(*shape: int, seed: int) -> Array:
    return (118 + raw(*shape, seed=seed) % 9).astype(np.uint8)


def _mxfp4(module: str, out: int, inputs: int, seed: int) -> Tensors:
    return {
        f"{module}.weight_packed": raw(out, inputs // 2, seed=seed),
        f"{module}.weight_scale": _powers(out, inputs // 32, seed=seed),
    }


def _mxfp8(module: str, out: int, inputs: int, seed: int) -> Tensors:
    return {
        f"{module}.weight": _finite_fp8(out, inputs, seed=seed),
        f"{module}.weight_scale": _powers(out, inputs // 32, seed=seed),
    }


def _compressed(name: str, store: Store, bits: int, kind: str, **more: Any) -> Format:
    weights = {"num_bits": bits, "type": kind, "symmetric": True} | more
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head"],
              "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip
    return Format(config, store)


def _grouped(size: int, strategy: str = "group") -> dict[str, Any]:
    return {"strategy": strategy, "group_size": size}


FORMATS: dict[str, Format] = {
    "gptq-2": _gptq_format(2, ordered=True, layout="gptq"),
    "gptq-3": _gptq_format(3, ordered=True, layout="gptq"),
    "gptq-4": _gptq_format(4, ordered=True, layout="gptq_v2"),
    "gptq-4-any-order": _gptq_format(4, ordered=False, layout="gptq"),
    "gptq-8": _gptq_format(8, ordered=True, layout="gptq_v2"),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, _awq),
    "fp8": Format(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        _fp8,
    ),
    "pack-quantized-4": _compressed(
        "pack-quantized", _packed(4), 4, "int", **_grouped(GROUP), symmetric=False
    ),
    "pack-quantized-8": _compressed(
        "pack-quantized", _packed(8), 8, "int", **_grouped(GROUP), symmetric=False
    ),
    "int-quantized": _compressed("int-quantized", _int8, 8, "int", strategy="channel"),
    "float-quantized": _compressed("float-quantized", _float8, 8, "float", strategy="channel"),
    "nvfp4": _compressed(
        "nvfp4-pack-quantized", _nvfp4, 4, "float", **_grouped(16, "tensor_group")
    ),
    "mxfp4-packed": _compressed("mxfp4-pack-quantized", _mxfp4, 4, "float", **_grouped(32)),
    "mxfp8": _compressed("mxfp8-quantized", _mxfp8, 8, "float", **_grouped(32)),
}
"""Formats of linear layers, by the names of the cases."""


def write_stored(folder: Path, format: str, sizes: Sizes = EVEN) -> Path:
    """Write a llama whose linear layers are stored in a format, in two files."""
    chosen = FORMATS[format]
    tensors: Tensors = {}
    for seed, (name, weight) in enumerate(llama_tensors(sizes).items()):
        if name.endswith("_proj.weight"):
            out, inputs = weight.shape
            tensors |= chosen.store(name.removesuffix(".weight"), out, inputs, seed)
        else:
            tensors[name] = weight
    names = sorted(tensors)
    config = llama_config(sizes, quantization_config=chosen.config)
    return write_base(folder, tensors, config, (names[::2], names[1::2]))


# -- stacks of experts -----------------------------------------------------------------------------

GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 3,
    "tie_word_embeddings": False, "dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
}  # fmt: skip
_STACK = "model.layers.0.mlp.experts"
_OUT, _IN = 70, 64


def write_gpt_oss(folder: Path) -> Path:
    """Write gpt-oss's experts in MXFP4."""
    name = f"{_STACK}.gate_up_proj"
    tensors = {
        f"{name}_blocks": raw(3, _OUT, _IN // 32, 16, seed=1),
        f"{name}_scales": _powers(3, _OUT, _IN // 32, seed=2),
        f"{name}_bias": draw(3, _OUT, seed=3, dtype=BF16),
        "model.layers.0.self_attn.q_proj.weight": draw(40, 30, seed=4, dtype=BF16),
    }
    return write_base(folder, tensors, GPT_OSS)


def gpt_oss_adapter(folder: Path) -> Path:
    """Write an adapter for these experts, one by one, and for a linear layer."""
    tensors = {**lora("model.layers.0.self_attn.q_proj", 40, 30)}
    for expert in (0, 2):
        tensors |= lora(f"{_STACK}.gate_up_projs.{expert}", _OUT, _IN, seed=expert + 5)
    targets = ["q_proj", *(f"experts.gate_up_projs.{i}" for i in (0, 2))]
    return write_adapter(folder, tensors, target_modules=targets)


# -- GGUF ------------------------------------------------------------------------------------------

GGUF_TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
              "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XS", "MXFP4")  # fmt: skip
"""Types of blocks. The others differ in their tables alone."""
GGUF_SIZES = Sizes(256, 512)
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(folder: Path, kind: str) -> Path:
    """Write a llama as a GGUF file; the ``gguf`` package has to be there."""
    import gguf

    from regraft.testing.gguf_files import write

    folder.mkdir(parents=True)
    tensors: dict[str, tuple[Array, str]] = {}
    for seed, (name, weight) in enumerate(llama_tensors(GGUF_SIZES, np.float32).items()):
        tensors[_gguf_name(name)] = (weight, "F32")
        if name.endswith("_proj.weight"):
            of_kind: Any = gguf.GGMLQuantizationType[kind]
            shape = gguf.quant_shape_to_byte_shape(weight.shape, of_kind)
            tensors[_gguf_name(name)] = (_gguf_blocks(shape, seed), kind)
    metadata = {
        "llama.context_length": 32, "llama.block_count": LAYERS,
        "llama.embedding_length": GGUF_SIZES.hidden,
        "llama.feed_forward_length": GGUF_SIZES.inner, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4, "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": 64, "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(45)],
    }  # fmt: skip
    return write(folder / "m.gguf", "llama", metadata, tensors)


def _gguf_name(name: str) -> str:
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
             "model.norm.weight": "output_norm.weight"}  # fmt: skip
    if name in names:
        return names[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def _gguf_blocks(shape: tuple[int, ...], seed: int) -> Array:
    """Return random bytes of which no two are a float16 or bfloat16 that is large or no number."""
    bits = raw(*shape, seed=seed)
    return np.where((bits & 0x7C) >= 0x40, bits & 0x3F, bits).astype(np.uint8)
