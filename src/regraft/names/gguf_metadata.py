"""What a GGUF file says of a model of transformers: the way back of :mod:`regraft.names.gguf`.

Facts are those of llama.cpp's ``convert_hf_to_gguf.py`` and of what llama.cpp reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.names.gguf import FAMILIES, GgufFamily

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
