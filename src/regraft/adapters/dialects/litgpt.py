"""LitGPT's dialect: ``lit_model.pth.lora``, with ``hyperparameters.yaml`` beside it.

Names are LitGPT's own. q, k and v are one module, ``attn.qkv``: its A has the A of each that is
trained (r rows each), one below the other, and its B (rows, r) theirs, q first, then k, then v. The
scale is alpha / r. Which of them are trained stands in hyperparameters.yaml. Facts: litgpt 0.5.13,
``lora.py``, ``finetune/lora.py``, ``scripts/merge_lora.py`` and ``convert_hf_checkpoint.py``; up to
0.4 the module was ``attn.attn``, whose rows were interleaved by groups of heads (0.4.13).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from regraft.adapters.dialects.as_peft import alpha_of
from regraft.adapters.dialects.form import LoraModule, Moved, NewFile, PlainAdapter, joined
from regraft.adapters.dialects.shared.base_facts import (
    Heads,
    heads_of,
    model_type,
    text_config,
    tied_sides,
)
from regraft.adapters.dialects.shared.experts import single_experts
from regraft.adapters.dialects.shared.gathering import Gathering
from regraft.adapters.dialects.shared.limits import magnitudes, refuse, unnamed, unsayable
from regraft.adapters.dialects.shared.once import NewTensors
from regraft.adapters.dialects.shared.torch_files import read_tensors, torch_file
from regraft.adapters.dialects.shared.widening import as_one_dtype
from regraft.adapters.dialects.writing import bytes_file
from regraft.errors import AdapterError, InputError, Problem, UnsupportedError
from regraft.formats import foreign
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.yaml_file import read_yaml_object
from regraft.formats.problems import quoted

WEIGHTS, SETTINGS, MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
_PROGRAM = "LitGPT"

_PART = re.compile(
    r"(?P<module>transformer\.h\.\d+\.(attn|mlp)\.[\w.]+|lm_head)\.(?P<what>lora_[AB])"
)
_QKV = re.compile(r"transformer\.h\.(?P<layer>\d+)\.attn\.(?P<name>qkv|attn)")
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_QKV_KEYS = ("lora_query", "lora_key", "lora_value")
_IN_LAYER = {
    "attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj", "mlp.gate": "block_sparse_moe.gate",
}  # fmt: skip
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(fc_1|fc_2|proj)")
_OF_EXPERT = {"fc_1": "w1", "fc_2": "w3", "proj": "w2"}
_HEAD = "lm_head"

_MLPS = ("LLaMAMLP", "GemmaMLP", "LLaMAMoE")
"""Kinds of MLP whose models have Llama's names in transformers."""

_FUSED = re.compile(r"phi-?[34]", re.IGNORECASE)
"""Models of which transformers keeps q, k and v in one matrix, and LitGPT does not."""


@dataclass(frozen=True)
class _Settings:
    """What LitGPT says of an adapter.

    Attributes:
        rank: r.
        scale: alpha / r.
        enabled: whether q, k and v are trained.
        heads: how the attention is divided.
        base: what it calls its base.
    """

    rank: int
    scale: float
    enabled: tuple[bool, bool, bool]
    heads: Heads
    base: str | None


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read LitGPT's adapter; see :class:`regraft.adapters.dialects.registry.Reader`."""
    weights = _weights(path) if path.is_dir() else path
    settings = _settings(weights.parent, base)
    gathering = Gathering(weights)
    found = gathering.parts(
        read_tensors(weights, under="model"), _PART, "transformer.h.N.attn.qkv.lora_A, ..."
    )
    for name, parts in found.items():
        pair = gathering.pair(name, parts, ("lora_A", "lora_B"))
        if pair is None:
            continue
        qkv = _QKV.fullmatch(name)
        if qkv is not None:
            _add_qkv(gathering, qkv, *pair, settings)
        elif (peft := _peft_name(name)) is None:
            gathering.refuse("module has a name that is not known", name, ", ".join(_IN_LAYER))
        elif pair[0].shape[0] != settings.rank:
            gathering.refuse("module has another rank than the config", name, str(settings.rank),
                             str(pair[0].shape[0]))  # fmt: skip
        else:
            gathering.add(peft, *pair, settings.scale, stored=name)
    return PlainAdapter(gathering.done(), base=settings.base, task_type="CAUSAL_LM")


def _weights(path: Path) -> Path:
    named = path / WEIGHTS
    found = [named] if named.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError("holds no single adapter", where=str(path), expected=WEIGHTS,
                         found=", ".join(p.name for p in found[:8]) or "none")  # fmt: skip
    return found[0]


def _add_qkv(
    gathering: Gathering, match: re.Match[str], a: Moved, b: Moved, settings: _Settings
) -> None:
    heads, rank = settings.heads, settings.rank
    sizes = {"q": heads.query, "k": heads.key, "v": heads.key}
    trained = [n for n, on in zip(sizes, settings.enabled, strict=True) if on]
    heights = [sizes[name] * heads.size for name in trained]
    if (a.shape[0], b.shape[0], b.shape[1]) != (rank * len(trained), sum(heights), rank):
        gathering.refuse("factors do not fit the config", match[0],
                         f"A ({rank * len(trained)}, in), B ({sum(heights)}, {rank})",
                         f"A {a.shape}, B {b.shape}")  # fmt: skip
        return
    if match["name"] == "attn" and len(trained) == len(sizes):
        gathering.refuse("an adapter of q, k and v together from before LitGPT 0.5 mixes their "
                         "rows: merge it with litgpt merge_lora", match[0])  # fmt: skip
        return
    first = 0
    for number, (name, height) in enumerate(zip(trained, heights, strict=True)):
        gathering.add(
            f"model.layers.{match['layer']}.self_attn.{name}_proj",
            a.rows(number * rank, (number + 1) * rank), b.rows(first, first + height),
            settings.scale, stored=match[0],
        )  # fmt: skip
        first += height


def _peft_name(name: str) -> str | None:
    if name == _HEAD:
        return name
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    expert = _EXPERT.fullmatch(match[2])
    found = (
        f"block_sparse_moe.experts.{expert[1]}.{_OF_EXPERT[expert[2]]}"
        if expert
        else _IN_LAYER.get(match[2])
    )
    return None if found is None else f"model.layers.{match[1]}.{found}"


def _settings(root: Path, base: Checkpoint | None) -> _Settings:
    path = root / SETTINGS
    if not path.is_file():
        raise InputError(
            f"is {foreign.LITGPT.name}, and {SETTINGS} is missing", where=str(root),
            expected=f"{SETTINGS} beside the adapter, as litgpt finetune_lora saves it: rank, "
            "alpha, and which modules are trained stand in it",
        )  # fmt: skip
    said = read_yaml_object(path)
    rank, alpha = said.get("lora_r"), said.get("lora_alpha")
    enabled = tuple(said.get(key) for key in _QKV_KEYS)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise _missing(path, "lora_r: a whole number", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _missing(path, "lora_alpha: a number", alpha)
    if not all(isinstance(each, bool) for each in enabled):
        raise _missing(path, f"{', '.join(_QKV_KEYS)}: true or false", enabled)
    q, k, v = map(bool, enabled)
    named = said.get("checkpoint_dir")
    heads = _heads(root, base)
    return _Settings(
        rank, alpha / rank, (q, k, v), heads, named if isinstance(named, str) else None
    )


def _missing(path: Path, expected: str, found: object) -> AdapterError:
    return AdapterError("the config lacks what is needed", where=str(path), expected=expected,
                        found=quoted(found))  # fmt: skip


def _heads(root: Path, base: Checkpoint | None) -> Heads:
    """Return how the attention is divided, by the base or by LitGPT's own config of the model."""
    path = root / MODEL
    if not path.is_file():
        _check_type(model_type(base))
        return heads_of(base, f"{MODEL} is not there to say how many heads it has")
    config = read_yaml_object(path)
    name, mlp = str(config.get("name")), config.get("mlp_class_name")
    if mlp not in _MLPS or _FUSED.match(name):
        raise _unknown(str(path), f"{name}, {mlp}")
    query, size, width = (config.get(key) for key in ("n_head", "head_size", "n_embd"))
    key = config.get("n_query_groups") or query
    if size is None and isinstance(width, int) and isinstance(query, int) and query > 0:
        size = width // query
    for number in (query, key, size):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise _missing(path, "n_head, n_query_groups and head_size: whole numbers", number)
    return Heads(int(str(query)), int(str(key)), int(str(size)))


_KNOWN = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text",
    "olmo2",
)  # fmt: skip


def _check_type(known: str) -> None:
    if known and known not in _KNOWN:
        raise _unknown("config.json", known)


def _unknown(where: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        "it is not known how LitGPT names and lays out the parts of this model", where=where,
        expected=f"a model with Llama's names (such as {', '.join(_KNOWN[:5])})",
        found=quoted(found), hint="Merge it with litgpt merge_lora",
    )  # fmt: skip


# -- writing ---------------------------------------------------------------------------------------

_FROM_PEFT = {peft: lit for lit, peft in _IN_LAYER.items()} | {"mlp.gate": "mlp.gate"}
_PEFT_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PEFT_QKV = re.compile(r"self_attn\.([qkv])_proj")
_PEFT_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(w[123])")
_TO_EXPERT = {w: lit for lit, w in _OF_EXPERT.items()}


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter's files as LitGPT reads them; all modules have one rank and scale."""
    adapter = single_experts(adapter, base)
    modules = adapter.modules
    refuse(unsayable(adapter, _PROGRAM) + magnitudes(modules, _PROGRAM), WEIGHTS)
    heads = heads_of(base, "it says how many rows q, k and v have")
    _check_type(model_type(base))
    tied = tied_sides(base)
    names = {m.name: None if tied and m.name == tied[1] else _lit_name(m.name) for m in modules}
    refuse(unnamed((name for name, lit in names.items() if lit is None), _PROGRAM), WEIGHTS)
    grouped: dict[str, dict[str, LoraModule]] = defaultdict(dict)
    for module in modules:
        lit, part = names[module.name] or ("", "")
        grouped[lit][part] = module
    refuse(_incomplete(grouped, base), WEIGHTS)
    trained = {part for parts in grouped.values() for part in parts if part}
    tensors = NewTensors()
    for lit, parts in grouped.items():
        a, b = _fused(parts, trained, heads) if "" not in parts else (parts[""].a, parts[""].b)
        tensors[f"{lit}.lora_A"], tensors[f"{lit}.lora_B"] = a, b
    text = yaml.safe_dump(_new_settings(adapter, trained, grouped), sort_keys=True)
    return (
        bytes_file(SETTINGS, text.encode()),
        torch_file(WEIGHTS, tensors, under="model"),
    )


def _lit_name(name: str) -> tuple[str, str] | None:
    """Return LitGPT's module, and which of q, k and v it is of it; ``""`` for other modules."""
    if name == _HEAD:
        return name, ""
    match = _PEFT_LAYER.fullmatch(name)
    if match is None:
        return None
    layer, rest = f"transformer.h.{match[1]}", match[2]
    if qkv := _PEFT_QKV.fullmatch(rest):
        return f"{layer}.attn.qkv", qkv[1]
    if expert := _PEFT_EXPERT.fullmatch(rest):
        return f"{layer}.mlp.experts.{expert[1]}.{_TO_EXPERT[expert[2]]}", ""
    found = _FROM_PEFT.get(rest)
    return None if found is None else (f"{layer}.{found}", "")


def _slot(lit: str) -> str:
    """Return what all layers have to have in common, of a module's name."""
    match = _LAYER.fullmatch(lit)
    return match[2] if match else lit


def _incomplete(
    grouped: Mapping[str, Mapping[str, LoraModule]], base: Checkpoint | None
) -> list[Problem]:
    """Return the modules that LitGPT would have factors for, and the adapter has none.

    LitGPT trains a kind of module in all layers or in none, and all parts of an MLP or none.
    """
    layers = text_config(base).get("num_hidden_layers") if base is not None else None
    count = layers if isinstance(layers, int) else 0
    slots = {_slot(lit) for lit in grouped}
    if any(slot.startswith("mlp.") for slot in slots):
        slots |= _mlp_slots(slots, base)
    wanted = {
        f"transformer.h.{layer}.{slot}"
        for slot in slots if slot != _HEAD for layer in range(count)
    }  # fmt: skip
    return [
        Problem("LitGPT trains this module wherever it trains one of its kind, and the adapter has "
                "no factors for it", name, hint="Merge it (`regraft merge`), and use the merged "
                "model")
        for name in sorted(wanted - grouped.keys())
    ]  # fmt: skip


def _mlp_slots(slots: set[str], base: Checkpoint | None) -> set[str]:
    if not any(_EXPERT.fullmatch(slot) for slot in slots):
        return {"mlp.fc_1", "mlp.fc_2", "mlp.proj"}
    count = text_config(base).get("num_local_experts") if base is not None else None
    found = {
        f"mlp.experts.{number}.{leaf}"
        for number in range(count if isinstance(count, int) else 0) for leaf in _OF_EXPERT
    }  # fmt: skip
    return found | {"mlp.gate"}


def _fused(parts: Mapping[str, LoraModule], trained: set[str], heads: Heads) -> tuple[Moved, Moved]:
    """Return the factors of q, k and v as one; a part that other layers have alone adds nothing."""
    like = next(iter(parts.values()))
    a, b = [], []
    for name, count in (("q", heads.query), ("k", heads.key), ("v", heads.key)):
        if name not in trained:
            continue
        height, module = count * heads.size, parts.get(name)
        if module is not None and module.b.shape[0] != height:
            raise UnsupportedError([Problem("B has other rows than the base has heads", module.name,
                                            str(height), str(module.b.shape))])  # fmt: skip
        a.append(_zeros(like.a, like.a.shape) if module is None else module.a)
        b.append(_zeros(like.b, (height, like.rank)) if module is None else module.b)
    return joined(as_one_dtype(a)), joined(as_one_dtype(b))


def _zeros(like: Moved, shape: tuple[int, ...]) -> Moved:
    return like.then(shape, lambda bits: np.zeros(shape, bits.dtype))


def _new_settings(
    adapter: PlainAdapter, trained: set[str], grouped: Mapping[str, Any]
) -> Mapping[str, Any]:
    first = adapter.modules[0]
    slots = {_slot(lit) for lit in grouped}
    return {
        "checkpoint_dir": adapter.base or "checkpoints",
        "lora_r": first.rank,
        "lora_alpha": alpha_of(first.scale, first.rank),
        "lora_dropout": 0.0,
        **{key: name in trained for key, name in zip(_QKV_KEYS, "qkv", strict=True)},
        "lora_projection": "attn.proj" in slots,
        "lora_mlp": any(slot.startswith("mlp.") for slot in slots),
        "lora_head": _HEAD in slots,
    }
