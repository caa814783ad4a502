"""Names of tensors in GGUF files and in transformers, for the families that both know.

The families are dense decoders whose tensors llama.cpp keeps one to one: it renames them, may
rearrange rows of queries and keys, and may add 1 to norms. Facts are those of transformers'
``modeling_gguf_pytorch_utils.py`` and ``integrations/ggml.py``, and of llama.cpp's
``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")

_COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEAD = {"attention.key_length": "head_dim"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
_GEMMA = {"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True}
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of GGUF.

    Attributes:
        model_type, model_class: transformers' names for it.
        modules: modules of a layer that have parameters.
        config: which key of its config a key of the metadata (below the architecture's) becomes.
        optional: modules that some of its models lack.
        also: further values of ``model_type`` whose models have the same tensors.
        rearranged: whether rows of queries and keys were rearranged, in heads.
        centered: whether 1 was added to norms.
        partly_rotated: whether only a part of each head is rotated.
        biases: flags of its config, by the end of the name of a tensor that only models with the
            flag have.
        activations: values of ``hidden_act`` that llama.cpp computes for it.
        defaults: what transformers takes where a config does not say it.
        sized_heads: whether the size of a head may be another than the width by the heads.
        activation_key: how its config calls ``hidden_act``.
        window_every: of so many layers the last one looks back without a limit; 0 where llama.cpp
            knows no limit for it.
        with_head: whether llama.cpp wants an output head also of a model whose head is tied.
        always_biased: whether llama.cpp wants a bias of every module.
    """

    model_type: str
    model_class: str
    modules: tuple[str, ...]
    config: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    rearranged: bool = False
    centered: bool = False
    partly_rotated: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu", "swish")
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sized_heads: bool = False
    activation_key: str = "hidden_act"
    window_every: int = 0
    with_head: bool = False
    always_biased: bool = False


def _attention(*more: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{name}" for name in (*_ATTENTION, *more))


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(
        "llama", "LlamaForCausalLM", (*_TWO_NORMS, *_attention(), *_GATED),
        _COMMON | _RMS | {"rope.dimension_count": "head_dim"},
        also=frozenset({"mistral"}), rearranged=True,
        biases={"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}, sized_heads=True,
    ),
    "qwen2": GgufFamily(
        "qwen2", "Qwen2ForCausalLM", (*_TWO_NORMS, *_attention(), *_GATED), _COMMON | _RMS,
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    ),
    "qwen3": GgufFamily(
        "qwen3", "Qwen3ForCausalLM", (*_TWO_NORMS, *_attention("q_norm", "k_norm"), *_GATED),
        _COMMON | _RMS | _HEAD, biases={"attn_q.bias": "attention_bias"},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
        sized_heads=True,
    ),
    "gemma2": GgufFamily(
        "gemma2", "Gemma2ForCausalLM", (*_FOUR_NORMS, *_attention(), *_GATED),
        _COMMON | _RMS | _HEAD | _WINDOW, centered=True,
        activations=_TANH_GELU, activation_key="hidden_activation", sized_heads=True,
        window_every=2,
        defaults=_GEMMA | {"max_position_embeddings": 8192, "sliding_window": 4096,
                           "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": GgufFamily(
        "gemma3_text", "Gemma3ForCausalLM",
        (*_FOUR_NORMS, *_attention("q_norm", "k_norm"), *_GATED),
        _COMMON | _RMS | _HEAD | _WINDOW, centered=True,
        activations=_TANH_GELU, activation_key="hidden_activation", sized_heads=True,
        window_every=6,
        defaults=_GEMMA | {"max_position_embeddings": 131072, "sliding_window": 4096,
                           "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "phi3": GgufFamily(
        "phi3", "Phi3ForCausalLM",
        (*_TWO_NORMS, "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj",
         "mlp.down_proj"),
        _COMMON | _RMS, partly_rotated=True,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "starcoder2": GgufFamily(
        "starcoder2", "Starcoder2ForCausalLM",
        (*_TWO_NORMS, *_attention(), "mlp.c_fc", "mlp.c_proj"),
        _COMMON | {"attention.layer_norm_epsilon": "norm_epsilon"},
        activations=_TANH_GELU, always_biased=True,
        defaults={"norm_epsilon": 1e-5, "max_position_embeddings": 4096,
                  "tie_word_embeddings": True},
    ),
    "stablelm": GgufFamily(
        "stablelm", "StableLmForCausalLM", (*_TWO_NORMS, *_attention(), *_GATED),
        _COMMON | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        optional=frozenset({"post_attention_layernorm"}), partly_rotated=True,
        biases={"attn_q.bias": "use_qkv_bias"}, with_head=True,
        defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 4096,
                  "partial_rotary_factor": 0.25},
    ),
    "nemotron": GgufFamily(
        "nemotron", "NemotronForCausalLM",
        (*_TWO_NORMS, *_attention(), "mlp.up_proj", "mlp.down_proj"),
        _COMMON | {"attention.layer_norm_epsilon": "norm_eps",
                   "attention.layer_norm_rms_epsilon": "norm_eps"},
        centered=True, partly_rotated=True, activations=("relu2",), with_head=True,
        defaults={"norm_eps": 1e-5, "max_position_embeddings": 4096,
                  "partial_rotary_factor": 0.5},
    ),
}  # fmt: skip
"""Families by ``general.architecture``."""

REFUSED = {
    "falcon": "its queries, keys and values are stored in another order",
    "bloom": "its queries, keys and values are stored in another order",
    "gpt2": "its weights are stored transposed",
    "t5": "it is an encoder and a decoder",
    "t5encoder": "it is an encoder",
    "deci": "its layers differ",
    "gemma4": "its layers differ",
    "lfm2": "its layers differ",
    "mamba": "it is a state space model",
    "qwen35": "its layers differ",
    "clip": "it is the encoder of images that goes with a model",
}
"""Why other architectures that transformers reads are refused."""

UNUSED = ("rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd")
"""Tensors that follow from the config and are no parameters of the model."""


def huggingface_names(
    family: GgufFamily, layers: int, gguf_name: Callable[[str], str | None]
) -> dict[str, str]:
    """Return transformers' name of each module by GGUF's; neither has ``.weight`` or ``.bias``.

    Args:
        family: the family.
        layers: number of layers.
        gguf_name: GGUF's name of a module of transformers, None for none.
    """
    modules = list(_OUTSIDE)
    for layer in range(layers):
        modules += [f"model.layers.{layer}.{module}" for module in family.modules]
    named = ((gguf_name(module), module) for module in modules)
    return {name: module for name, module in named if name is not None}


def is_optional(family: GgufFamily, module: str) -> bool:
    """Return whether a model of the family may lack a module."""
    return module == "lm_head" or any(module.endswith(f".{name}") for name in family.optional)


def config_of(
    family: GgufFamily, metadata: Callable[[str], Any], tokens: Callable[[str], Any],
    stored: Iterable[str], vocabulary: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the config that transformers derives from a GGUF file, as ``config.json`` has it.

    What transformers leaves at a default although the file says it (the head size of Qwen3, the
    base of StarCoder2's rotation, the rotated part of a head, biases) is as the file says.

    Args:
        family: the family.
        metadata: value of a key below the architecture's, None for none.
        tokens: value of a key below ``tokenizer.ggml``.
        stored: names of the stored tensors.
        vocabulary: rows of the embedding.
    """
    names = set(stored)
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "tie_word_embeddings": "output.weight" not in names,
    }
    config |= _renamed(family.config, metadata) | _renamed(_TOKENS, tokens)
    config["vocab_size"] = vocabulary
    if family.model_type == "stablelm":
        config["use_qkv_bias"] = False
        config["use_parallel_residual"] = not any("ffn_norm" in name for name in names)
    for ending, flag in family.biases.items():
        if any(name.endswith(ending) for name in names):
            config[flag] = True
    rotated = metadata("rope.dimension_count")
    if family.partly_rotated and rotated is not None:
        head = config["hidden_size"] // config["num_attention_heads"]
        config["partial_rotary_factor"] = rotated / head
    return config


def _renamed(keys: Mapping[str, str], value: Callable[[str], Any]) -> dict[str, Any]:
    found = {name: value(key) for key, name in keys.items()}
    return {name: each for name, each in found.items() if each is not None}


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Return GGUF's name of the architecture of a model, by its config; None for one not known.

    Of a model of images and text, that of its text model.
    """
    for level in (config, config.get("text_config")):
        kind = level.get("model_type") if isinstance(level, Mapping) else None
        for name, family in FAMILIES.items():
            if kind is not None and kind in (family.model_type, *family.also):
                return name
    return None


def heads_of(config: Mapping[str, Any], module: str) -> int:
    """Return in how many heads the rows of a module of queries or keys lie, 0 where nothing tells.

    Args:
        config: as ``config.json`` has it.
        module: name of the module, which ends with ``q_proj`` or ``k_proj``.
    """
    within = config.get("text_config") if "num_attention_heads" not in config else config
    level = within if isinstance(within, Mapping) else {}
    heads = level.get("num_attention_heads")
    if module.endswith("k_proj"):
        heads = level.get("num_key_value_heads") or heads
    return heads if isinstance(heads, int) else 0


def layer_of(name: str) -> int:
    """Return the number of the layer that a tensor or module is of, -1 for none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
