"""Names of tensors in GGUF files and in transformers, for the families that both know.

The families are dense decoders whose tensors llama.cpp keeps one to one: it renames them, may
rearrange rows of queries and keys, and may add 1 to norms. Facts are those of transformers'
``modeling_gguf_pytorch_utils.py`` and ``integrations/ggml.py``, and of llama.cpp's
``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import math
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


# -- the other way: what a GGUF file says of a model of transformers -------------------------------

_REALS = ("epsilon", "freq_base", "freq_base_swa", "factor", "softcapping", "fast", "slow")
"""Ends of the keys whose values are real numbers; others are whole ones."""

_SCALINGS = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
"""GGUF's names of what transformers calls the type of a rotary embedding."""

_YARN = {
    "extrapolation_factor": "yarn_ext_factor", "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow",
}  # fmt: skip

SIZES: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("vocab", "width"), "lm_head": ("vocab", "width"),
    "q_proj": ("queries", "width"), "k_proj": ("keys", "width"), "v_proj": ("keys", "width"),
    "o_proj": ("width", "queries"), "qkv_proj": ("queries + 2 keys", "width"),
    "q_norm": ("head",), "k_norm": ("head",),
    "gate_proj": ("hidden", "width"), "up_proj": ("hidden", "width"), "c_fc": ("hidden", "width"),
    "gate_up_proj": ("2 hidden", "width"),
    "down_proj": ("width", "hidden"), "c_proj": ("width", "hidden"),
}  # fmt: skip
"""Shapes of weights, by the last part of a module's name; those of all other norms are (width,)."""


@dataclass(frozen=True)
class Unsaid:
    """Something in a config that a GGUF file cannot say, or that llama.cpp computes otherwise.

    Attributes:
        what: a sentence about it.
        expected: what llama.cpp computes.
        found: what the config says.
    """

    what: str
    expected: str
    found: str


def family_of(config: Mapping[str, Any]) -> tuple[str, GgufFamily] | None:
    """Return ``general.architecture`` and the family of a model's config; None if there is none."""
    kind = config.get("model_type")
    for architecture, family in FAMILIES.items():
        if kind == family.model_type or kind in family.also:
            return architecture, family
    return None


def said(family: GgufFamily, config: Mapping[str, Any], key: str) -> Any:
    """Return what a config says of something; what transformers takes where it says nothing."""
    value = config.get(key)
    if value is None and key == "num_key_value_heads":
        value = config.get("num_attention_heads")
    return family.defaults.get(key) if value is None else value


def is_tied(family: GgufFamily, config: Mapping[str, Any]) -> bool:
    """Return whether the output head is the embedding."""
    tied = config.get("tie_word_embeddings")
    return bool(family.defaults.get("tie_word_embeddings", False) if tied is None else tied)


def head_size(family: GgufFamily, config: Mapping[str, Any]) -> int:
    """Return the size of an attention head."""
    own = said(family, config, "head_dim") if family.sized_heads else config.get("head_dim")
    return int(own or config["hidden_size"] // config["num_attention_heads"])


def sizes_of(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, int]:
    """Return what the names in :data:`SIZES` stand for."""
    head, hidden = head_size(family, config), config["intermediate_size"]
    queries = head * config["num_attention_heads"]
    keys = head * said(family, config, "num_key_value_heads")
    return {
        "vocab": config["vocab_size"], "width": config["hidden_size"], "head": head,
        "queries": queries, "keys": keys, "queries + 2 keys": queries + 2 * keys,
        "hidden": hidden, "2 hidden": 2 * hidden,
    }  # fmt: skip


def rope_of(family: GgufFamily, config: Mapping[str, Any], layers: str) -> dict[str, Any]:
    """Return the parameters of a rotary embedding, as transformers 5 names them.

    Args:
        family, config: of the model.
        layers: ``full_attention`` or ``sliding_attention``; they differ in some models.
    """
    new = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {} if layers == "full_attention" else {}
    found = dict(new.get(layers) or {}) if _is_split(new) else dict(new or old)
    base = "rope_theta" if layers == "full_attention" else "rope_local_base_freq"
    if found.get("rope_theta") is None:
        found["rope_theta"] = said(family, config, base) or said(family, config, "rope_theta")
    found["rope_theta"] = 10000.0 if found["rope_theta"] is None else found["rope_theta"]
    found["rope_type"] = found.get("rope_type", found.get("type")) or "default"
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if found.get(key) is None:
            found[key] = said(family, config, key)
    return found


def _is_split(rope: Mapping[str, Any]) -> bool:
    return any(isinstance(rope.get(key), dict) for key in ("full_attention", "sliding_attention"))


def window_layers(family: GgufFamily, config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for each layer whether it looks back a limited number of tokens."""
    count, kinds = config["num_hidden_layers"], config.get("layer_types")
    if kinds:
        return tuple(kind == "sliding_attention" for kind in kinds)
    every = config.get("sliding_window_pattern") or family.window_every
    return _every(every, count)


def _every(every: int, count: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % every != 0 for layer in range(count))


def metadata_of(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a GGUF file says of a model below the architecture's name; see `config_of`.

    Values are whole numbers, real ones where llama.cpp wants these, booleans, strings, and a list
    of booleans.

    Args:
        family: the family of the model.
        config: its config, which :func:`unsaid` has nothing to say about.
    """
    head, rope = head_size(family, config), rope_of(family, config, "full_attention")
    found: dict[str, Any] = {}
    for key, name in family.config.items():
        found[key] = said(family, config, name)
    found["rope.freq_base"] = rope["rope_theta"]
    if family.sized_heads:
        found |= {"attention.key_length": head, "attention.value_length": head}
        if "rope.dimension_count" in family.config:
            found["rope.dimension_count"] = head
    if family.partly_rotated:
        found["rope.dimension_count"] = int((rope["partial_rotary_factor"] or 1.0) * head)
    found |= _windows(family, config) | _scaling(rope)
    found |= _OF_FAMILY.get(family.model_type, _nothing)(family, config)
    return {key: _number(key, value) for key, value in found.items() if value is not None}


def _number(key: str, value: Any) -> Any:
    return float(value) if key.endswith(_REALS) else value


def _windows(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    if not family.window_every:
        return {}
    found: dict[str, Any] = {}
    layers = window_layers(family, config)
    if layers != _every(family.window_every, len(layers)):
        found["attention.sliding_window_pattern"] = list(layers)
    if family.model_type == "gemma3_text":
        found["rope.freq_base_swa"] = rope_of(family, config, "sliding_attention")["rope_theta"]
    return found


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = _SCALINGS.get(rope["rope_type"])
    if kind is None:
        return {}
    found: dict[str, Any] = {"rope.scaling.type": kind}
    if kind != "longrope":
        found["rope.scaling.factor"] = rope["factor"]
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found |= {f"rope.scaling.{name}": rope.get(key) for key, name in _YARN.items()}
    return found


def _nothing(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    del family, config
    return {}


def _softcaps(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": said(family, config, "attn_logit_softcapping"),
        "final_logit_softcapping": said(family, config, "final_logit_softcapping"),
    }


def _of_phi3(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    rope, longest = rope_of(family, config, "full_attention"), config["max_position_embeddings"]
    original = rope["original_max_position_embeddings"] or longest
    found = {
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if _SCALINGS.get(rope["rope_type"]) == "longrope":
        grown = longest / original
        factor = math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0
        said_factor = rope.get("attention_factor")
        found["rope.scaling.attn_factor"] = factor if said_factor is None else said_factor
    return found


def _of_stablelm(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    del family
    return {"use_parallel_residual": bool(config.get("use_parallel_residual", False))}


def _of_nemotron(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    scaled = _scaling(rope_of(family, config, "full_attention"))
    return {} if scaled else {"rope.scaling.type": "none"}


_OF_FAMILY: Mapping[str, Callable[[GgufFamily, Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": _softcaps, "gemma3_text": _softcaps, "phi3": _of_phi3, "stablelm": _of_stablelm,
    "nemotron": _of_nemotron,
}  # fmt: skip
"""What only one family's metadata has."""


def factors_of(family: GgufFamily, config: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the factors of a rotary embedding's frequencies, by the name of their tensor.

    Those of ``llama3`` are computed as transformers' ``_compute_llama3_parameters`` does.
    """
    rope = rope_of(family, config, "full_attention")
    if _SCALINGS.get(rope["rope_type"]) == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    if rope["rope_type"] != "llama3":
        return {}
    size = head_size(family, config)
    return {"rope_freqs.weight": [_llama3(rope, size, at) for at in range(0, size, 2)]}


def _llama3(rope: Mapping[str, Any], size: int, at: int) -> float:
    length = 2 * math.pi * float(rope["rope_theta"]) ** (at / size)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    if length < original / high:
        return 1.0
    if length > original / low:
        return float(factor)
    smooth = (original / length - low) / (high - low)
    return float(1 / ((1 - smooth) / factor + smooth))


_ROPES: Mapping[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
    "longrope": ("long_factor", "short_factor"),
    "su": ("long_factor", "short_factor"),
}  # fmt: skip
"""Types of rotary embeddings that can be said, and the parameters that each needs."""

_OF_ONE_FAMILY = {"llama3": "llama", "longrope": "phi3", "su": "phi3"}
"""Types whose tensors llama.cpp reads in one family only."""


def unsaid(family: GgufFamily, config: Mapping[str, Any]) -> list[Unsaid]:
    """Return what a config says that a GGUF file cannot say, or that llama.cpp would not do."""
    found = [*_unsaid_ropes(family, config), *_unsaid_heads(family, config)]
    activation = config.get(family.activation_key) or family.activations[0]
    if activation not in family.activations:
        found.append(Unsaid("llama.cpp computes another activation", family.activations[0],
                            str(activation)))  # fmt: skip
    for key, expected, why in _FLAGS.get(family.model_type, ()):
        value = config.get(key)
        if value is not None and value != expected:
            found.append(Unsaid(why, f"{key}: {expected}", str(value)))
    return found


_FLAGS: Mapping[str, tuple[tuple[str, Any, str], ...]] = {
    "starcoder2": (("use_bias", True, "llama.cpp wants biases"),),
    "stablelm": (("qk_layernorm", False, "the norms of its heads are not exported"),),
    "qwen3": (("attention_bias", False, "llama.cpp reads no bias of o_proj"),),
    "gemma2": (("tie_word_embeddings", True, "llama.cpp reads no output head"),
               ("attention_bias", False, "llama.cpp reads no bias of o_proj"),
               ("use_bidirectional_attention", False, "llama.cpp looks back only")),
    "gemma3_text": (("attention_bias", False, "llama.cpp reads no bias of o_proj"),
                    ("attn_logit_softcapping", None, "llama.cpp does not cap attention"),
                    ("use_bidirectional_attention", False, "llama.cpp looks back only")),
    "nemotron": (("mlp_bias", False, "biases of its MLP are not exported"),),
}  # fmt: skip
"""What a config of a family has to say: key, value, and why."""


def _unsaid_ropes(family: GgufFamily, config: Mapping[str, Any]) -> list[Unsaid]:
    rope, what = rope_of(family, config, "full_attention"), "the rotary embedding cannot be said"
    kind = rope["rope_type"]
    if kind not in _ROPES or _OF_ONE_FAMILY.get(kind, family.model_type) != family.model_type:
        known = [name for name in _ROPES
                 if _OF_ONE_FAMILY.get(name, family.model_type) == family.model_type]  # fmt: skip
        return [Unsaid(what, " or ".join(known), str(kind))]
    lacking = [key for key in _ROPES[kind] if rope.get(key) is None]
    found = [Unsaid(what, f"{key} for {kind}", "none") for key in lacking]
    partly = rope["partial_rotary_factor"]
    if not family.partly_rotated and partly not in (None, 1, 1.0):
        found.append(Unsaid(what, "whole heads that are rotated", f"a part of {partly} of each"))
    return found


def _unsaid_heads(family: GgufFamily, config: Mapping[str, Any]) -> list[Unsaid]:
    head, heads, width = (
        head_size(family, config),
        config["num_attention_heads"],
        config["hidden_size"],
    )
    if not family.sized_heads and head * heads != width:
        return [Unsaid("llama.cpp takes heads that make up the width", str(width),
                       f"{heads} heads of {head}")]  # fmt: skip
    scalar = config.get("query_pre_attn_scalar")
    if family.window_every and scalar is not None:
        layers = {"gemma2": 46, "gemma3_text": 62}[family.model_type]
        known = width // heads if config["num_hidden_layers"] == layers else head
        if scalar != known:
            return [Unsaid("llama.cpp scales queries otherwise", f"query_pre_attn_scalar: {known}",
                           str(scalar))]  # fmt: skip
    return []


def window_note(family: GgufFamily, config: Mapping[str, Any]) -> str | None:
    """Return what a user should know of a limited window that llama.cpp does not keep to."""
    window = config.get("sliding_window")
    if family.window_every or not window or config.get("use_sliding_window") is False:
        return None
    if window >= (config.get("max_position_embeddings") or 0):
        return None
    return (
        f"the model looks back {window} tokens; llama.cpp lets it look back without a limit, so "
        "answers differ on longer texts"
    )


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
