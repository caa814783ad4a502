"""mistral-finetune's dialect: ``lora.safetensors``, and ``params.json`` beside it.

``layers.N.attention.wq.lora_A.weight`` is A (r, in) and ``lora_B.weight`` B (out, r). The scale is
``lora.scaling`` of params.json, as it stands; heads stand there too. Rows of q and k are in Llama's
own order. Facts: mistral-finetune, ``model/lora.py``, ``model/transformer.py`` and
``finetune/checkpointing.py``; mistral-inference 1.6, ``lora.py``, which wants one dtype, and takes
the scale that it is called with (2 by default).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.form import NewFile, PlainAdapter
from regraft.adapters.dialects.shared.base_facts import Heads, heads_of, needed, text_config
from regraft.adapters.dialects.shared.experts import single_experts
from regraft.adapters.dialects.shared.gathering import Gathering
from regraft.adapters.dialects.shared.limits import magnitudes, refuse, unnamed, unsayable
from regraft.adapters.dialects.shared.once import NewTensors
from regraft.adapters.dialects.shared.peft_config import travelling, with_config
from regraft.adapters.dialects.shared.rope_rows import as_neighbours, as_transformers, fits
from regraft.adapters.dialects.shared.widening import as_one_dtype
from regraft.adapters.dialects.writing import json_file, safetensors_file
from regraft.errors import AdapterError, InputError, Problem, UnsupportedError
from regraft.formats import foreign
from regraft.formats.checkpoint import CONFIG_BYTES, Checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.problems import quoted
from regraft.formats.safetensors import read_header

WEIGHTS, PARAMS = "lora.safetensors", "params.json"
_PROGRAM = "mistral-finetune"

_PART = re.compile(
    r"(?P<module>layers\.\d+\.(attention|feed_forward)\.[\w.]+)"
    r"\.(?P<what>lora_[AB]\.weight)"
)
_IN_LAYER = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "feed_forward.gate": "block_sparse_moe.gate",
}  # fmt: skip
_EXPERT = re.compile(r"feed_forward\.experts\.(\d+)\.(w[123])")


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read an adapter; see :class:`regraft.adapters.dialects.registry.Reader`."""
    weights = _weights(path) if path.is_dir() else path
    params = _params(weights.parent)
    scale = _scaling(weights.parent, params)
    heads = _heads(weights.parent, params, base)
    gathering = Gathering(weights)
    header = read_header(weights)
    found = gathering.parts(header.tensors, _PART, "layers.N.attention.wq.lora_A.weight, ...")
    for name, parts in found.items():
        pair = gathering.pair(name, parts, ("lora_A.weight", "lora_B.weight"))
        if pair is None:
            continue
        peft, (a, b) = _peft_name(name), pair
        count = _turned(name, heads)
        if peft is None:
            gathering.refuse("module has a name that is not known", name, ", ".join(_IN_LAYER))
        elif count is not None and not fits(b, count, heads.size):
            gathering.refuse("B has other rows than the model has heads", name,
                             f"{count} x {heads.size}", str(b.shape))  # fmt: skip
        else:
            b = b if count is None else as_transformers(b, count)
            gathering.add(peft, a, b, scale, stored=name)
    return PlainAdapter(
        gathering.done(), task_type="CAUSAL_LM", metadata=travelling(header.metadata)
    )


def _weights(path: Path) -> Path:
    named = path / WEIGHTS
    found = [named] if named.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError("holds no single adapter", where=str(path), expected=WEIGHTS,
                         found=", ".join(p.name for p in found[:8]) or "none")  # fmt: skip
    return found[0]


def _params(root: Path) -> Mapping[str, Any]:
    path = root / PARAMS
    if not path.is_file():
        raise InputError(
            f"is {foreign.MISTRAL.name}, and {PARAMS} is missing", where=str(root),
            expected=f"{PARAMS} beside it, as mistral-finetune saves it: the scale stands in it",
            hint=f'Write {{"lora": {{"scaling": 2.0}}}} into {PARAMS}, with the scaling of the run '
            "(2.0 unless its config says otherwise)",
        )  # fmt: skip
    return read_json_object(path, max_bytes=CONFIG_BYTES)


def _scaling(root: Path, params: Mapping[str, Any]) -> float:
    said = params.get("lora")
    scale = said.get("scaling") if isinstance(said, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise AdapterError("the scale is missing", where=str(root / PARAMS),
                           expected="lora.scaling: a number", found=quoted(scale))  # fmt: skip
    return float(scale)


def _heads(root: Path, params: Mapping[str, Any], base: Checkpoint | None) -> Heads:
    """Return how the attention is divided, by params.json, else by the base."""
    said = [params.get(key) for key in ("n_heads", "n_kv_heads", "head_dim")]
    if all(value is None for value in said):
        return heads_of(base, f"{PARAMS} does not say how many heads the model has")
    good = [v for v in said if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    if len(good) < len(said):
        raise AdapterError("heads are missing", where=str(root / PARAMS),
                           expected="n_heads, n_kv_heads and head_dim: whole numbers",
                           found=quoted(said))  # fmt: skip
    return Heads(*good)


def _turned(name: str, heads: Heads) -> int | None:
    """Return the heads of a module whose rows lie otherwise in transformers; None for others."""
    return {"wq": heads.query, "wk": heads.key}.get(name.rpartition(".")[2])


def _peft_name(name: str) -> str | None:
    _, number, rest = name.split(".", 2)
    expert = _EXPERT.fullmatch(rest)
    found = f"block_sparse_moe.experts.{expert[1]}.{expert[2]}" if expert else _IN_LAYER.get(rest)
    return None if found is None else f"model.layers.{number}.{found}"


# -- writing ---------------------------------------------------------------------------------------

_FROM_PEFT = {peft: own for own, peft in _IN_LAYER.items()} | {"mlp.gate": "feed_forward.gate"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OWN_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(w[123])")


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter's files; all modules have one rank and scale."""
    adapter = single_experts(adapter, base)
    modules = adapter.modules
    refuse(unsayable(adapter, _PROGRAM) + magnitudes(modules, _PROGRAM), WEIGHTS)
    heads = heads_of(base, "rows of q and k lie otherwise here, by heads")
    names = {module.name: _own_name(module.name) for module in modules}
    refuse(unnamed((m.name for m in modules if names[m.name] is None), _PROGRAM), WEIGHTS)
    tensors, problems = NewTensors(), []
    for module in modules:
        name = str(names[module.name])
        count = _turned(name, heads)
        if count is not None and not fits(module.b, count, heads.size):
            problems.append(Problem("B has other rows than the base has heads", module.name,
                                    f"{count} x {heads.size}", str(module.b.shape)))  # fmt: skip
            continue
        tensors[f"{name}.lora_A.weight"] = module.a
        b = module.b if count is None else as_neighbours(module.b, count)
        tensors[f"{name}.lora_B.weight"] = b
    if problems:
        raise UnsupportedError(problems)
    params = _new_params(adapter, heads, needed(base, "its sizes stand in params.json"))
    # mistral-inference wants one dtype, and nothing but factors.
    even = dict(zip(tensors, as_one_dtype(list(tensors.values())), strict=True))
    return json_file(PARAMS, params), safetensors_file(WEIGHTS, even, with_config(adapter))


def _own_name(name: str) -> str | None:
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    expert = _OWN_EXPERT.fullmatch(match[2])
    found = f"feed_forward.experts.{expert[1]}.{expert[2]}" if expert else _FROM_PEFT.get(match[2])
    return None if found is None else f"layers.{match[1]}.{found}"


def _new_params(adapter: PlainAdapter, heads: Heads, base: Checkpoint) -> Mapping[str, Any]:
    config, first = text_config(base), adapter.modules[0]
    return {
        "dim": config.get("hidden_size"),
        "n_layers": config.get("num_hidden_layers"),
        "head_dim": heads.size,
        "hidden_dim": config.get("intermediate_size"),
        "n_heads": heads.query,
        "n_kv_heads": heads.key,
        "norm_eps": config.get("rms_norm_eps"),
        "vocab_size": config.get("vocab_size"),
        "lora": {"enable": True, "rank": first.rank, "dropout": 0.0, "scaling": first.scale},
    }
