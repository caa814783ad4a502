"""torchtune's dialect: ``adapter_model.pt``, and an ``adapter_config.json`` where it wrote one.

``layers.N.attn.q_proj.lora_a.weight`` is A (r, in) and ``lora_b.weight`` B (out, r); ``magnitude``
is DoRA's. The scale is alpha / r. Rows of q and k are in Llama's own order for the models that
torchtune converts so. Facts: torchtune 0.6, ``models/convert_weights.py``, ``models/*``,
``modules/peft`` and ``training/checkpointing``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.as_peft import alpha_of
from regraft.adapters.dialects.form import LoraModule, NewFile, PlainAdapter, as_stored
from regraft.adapters.dialects.shared.base_facts import (
    Heads,
    heads_of,
    model_type,
    needed,
    tied_sides,
)
from regraft.adapters.dialects.shared.gathering import Gathering, Parts
from regraft.adapters.dialects.shared.limits import refuse, unlike, unnamed, unsayable
from regraft.adapters.dialects.shared.once import NewTensors
from regraft.adapters.dialects.shared.rope_rows import as_neighbours, as_transformers, fits
from regraft.adapters.dialects.shared.torch_files import read_tensors, torch_file
from regraft.adapters.dialects.writing import json_file
from regraft.errors import AdapterError, InputError, Problem, UnsupportedError
from regraft.formats import foreign
from regraft.formats.checkpoint import CONFIG_BYTES, Checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.yaml_file import read_yaml_object
from regraft.formats.layout import ADAPTER_CONFIG
from regraft.formats.problems import quoted

WEIGHTS = "adapter_model.pt"
_RECIPE = "torchtune_config.yaml"
_PROGRAM = "torchtune"

_PART = re.compile(
    r"(?P<module>layers\.\d+\.(attn|mlp)\.\w+|output)\.(?P<what>lora_a\.weight|lora_b\.weight|magnitude)"
)
_IN_LAYER = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_HEAD = ("output", "lm_head")

_TURNED = ("llama", "mistral", "gemma", "gemma2")
"""Model types of which torchtune has rows of q and k in Llama's own order."""

_AS_THEY_ARE = ("qwen2",)
"""Those of which it has them in transformers' order."""


@dataclass(frozen=True)
class _Rows:
    """How rows of q and k lie; None for as they are in transformers."""

    heads: Heads | None

    def of(self, name: str) -> int | None:
        """Return the heads of a module whose rows are turned; None for one whose are not."""
        if self.heads is None:
            return None
        return {"q_proj": self.heads.query, "k_proj": self.heads.key}.get(name.rpartition(".")[2])


def _rows(base: Checkpoint | None) -> _Rows:
    known = model_type(needed(base, "it says in which order torchtune has the rows of q and k"))
    if known in _AS_THEY_ARE:
        return _Rows(None)
    if known in _TURNED:
        return _Rows(heads_of(base, "its heads are turned"))
    raise UnsupportedError(
        "it is not known how torchtune lays out this model", where="config.json",
        expected=f"model_type {', '.join((*_TURNED, *_AS_THEY_ARE))}", found=quoted(known),
        hint="Let torchtune export it: its checkpointer for Hugging Face models writes PEFT's "
        "format",
    )  # fmt: skip


_SCALED_BIAS = "torchtune's DoRA scales the layer's bias too, and PEFT's does not"

# -- reading ---------------------------------------------------------------------------------------


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read torchtune's adapter; see :class:`regraft.adapters.dialects.registry.Reader`."""
    weights = _weights(path)
    rank, alpha, named = _settings(weights.parent)
    gathering = Gathering(weights)
    found = gathering.parts(read_tensors(weights), _PART, "layers.N.attn.q_proj.lora_a.weight, ...")
    rows = _rows(base)
    for name, parts in found.items():
        _add(gathering, name, parts, (rank, alpha), rows, base)
    return PlainAdapter(gathering.done(), base=named, task_type="CAUSAL_LM")


def _add(
    gathering: Gathering,
    name: str,
    parts: Parts,
    form: tuple[int, float],
    rows: _Rows,
    base: Checkpoint | None,
) -> None:
    """Add a module, or what is wrong with it; ``form`` is rank and alpha."""
    pair, peft = gathering.pair(name, parts, ("lora_a.weight", "lora_b.weight")), _peft_name(name)
    if pair is None:
        return
    (a, b), (rank, alpha) = pair, form
    m = as_stored(parts["magnitude"]) if "magnitude" in parts else None
    heads = None if peft is None else rows.of(peft)
    if peft is None:
        gathering.refuse("module has a name that is not known", name, ", ".join(_IN_LAYER))
    elif a.shape[0] != rank:
        gathering.refuse("module has another rank than the config", name, str(rank),
                         str(a.shape[0]))  # fmt: skip
    elif m is not None and base is not None and f"{peft}.bias" in base.tensors:
        gathering.refuse(_SCALED_BIAS, name)
    elif heads is None or rows.heads is None:
        gathering.add(peft, a, b, alpha / rank, magnitude=m, stored=name)
    elif not fits(b, heads, rows.heads.size):
        gathering.refuse("B has other rows than the base has heads", name,
                         f"{heads} x {rows.heads.size}", str(b.shape))  # fmt: skip
    else:
        turn = m is not None and m.shape == (b.shape[0],)
        m = as_transformers(m, heads) if m is not None and turn else m
        gathering.add(peft, a, as_transformers(b, heads), alpha / rank, magnitude=m, stored=name)


def _weights(path: Path) -> Path:
    """Return the file of an adapter; of several epochs none is taken for the one that is meant."""
    if not path.is_dir():
        return path
    found = sorted(p for p in path.iterdir() if re.fullmatch(r"adapter_(model|\d+)\.pt", p.name))
    found = found or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    raise InputError(
        "holds several adapters of torchtune", where=str(path), expected="one",
        found=", ".join(each.name for each in found[:8]), hint="Name the file that you mean",
    )  # fmt: skip


def _settings(root: Path) -> tuple[int, float, str | None]:
    """Return rank, alpha, and what the base is called.

    torchtune's checkpointer for Hugging Face models writes them beside the adapter; others do not,
    and then they stand in the config of the recipe, which it logs into the run's folder.
    """
    path = root / ADAPTER_CONFIG
    if path.is_file():
        config = read_json_object(path, max_bytes=CONFIG_BYTES)
        named = config.get("base_model_name_or_path")
        said = (config.get("r"), config.get("lora_alpha"))
        return *_checked(path, said), named if isinstance(named, str) else None
    for path in (root / _RECIPE, root.parent / _RECIPE):
        if path.is_file():
            recipe = read_yaml_object(path)
            model = recipe.get("model")
            model = model if isinstance(model, dict) else {}
            said = (model.get("lora_rank", 8), model.get("lora_alpha"))
            return *_checked(path, said), None
    raise InputError(
        f"is {foreign.TORCHTUNE.name}, and its config is missing", where=str(root),
        expected=f"{ADAPTER_CONFIG} with r and lora_alpha, or {_RECIPE} of the run, beside the "
        "adapter: the scale stands in it",
    )  # fmt: skip


def _checked(path: Path, said: tuple[Any, Any]) -> tuple[int, float]:
    rank, alpha = said
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError("the rank is missing", where=str(path), expected="a whole number",
                           found=quoted(rank))  # fmt: skip
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError("alpha is missing", where=str(path), expected="a number",
                           found=quoted(alpha))  # fmt: skip
    return rank, float(alpha)


def _peft_name(name: str) -> str | None:
    if name == _HEAD[0]:
        return _HEAD[1]
    _, number, rest = name.split(".", 2)
    found = _IN_LAYER.get(rest)
    return None if found is None else f"model.layers.{number}.{found}"


# -- writing ---------------------------------------------------------------------------------------

_FROM_PEFT = {peft: tune for tune, peft in _IN_LAYER.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter's files as torchtune reads them; all modules have one rank and scale."""
    problems = unsayable(adapter, _PROGRAM) + unlike(adapter.modules, _PROGRAM)
    refuse(problems, WEIGHTS)
    rows, tied = _rows(base), tied_sides(base)
    names = {module.name: _tune_name(module.name) for module in adapter.modules}
    if tied is not None:
        names[tied[1]] = None  # torchtune has no such module then
    refuse(unnamed((m.name for m in adapter.modules if names[m.name] is None), _PROGRAM), WEIGHTS)
    biased = [] if base is None else [
        Problem(_SCALED_BIAS, m.name, hint="Merge it (`regraft merge`)")
        for m in adapter.modules if m.magnitude is not None and f"{m.name}.bias" in base.tensors
    ]  # fmt: skip
    refuse(biased, WEIGHTS)
    tensors = NewTensors()
    for module in adapter.modules:
        turned = _turned(module, rows)
        tensors[f"{names[module.name]}.lora_a.weight"] = turned.a
        tensors[f"{names[module.name]}.lora_b.weight"] = turned.b
        if turned.magnitude is not None:
            tensors[f"{names[module.name]}.magnitude"] = turned.magnitude
    config = _new_config(adapter, [str(name) for name in names.values() if name])
    return json_file(ADAPTER_CONFIG, config), torch_file(WEIGHTS, tensors)


def _tune_name(name: str) -> str | None:
    if name == _HEAD[1]:
        return _HEAD[0]
    match = _LAYER.fullmatch(name)
    found = _FROM_PEFT.get(match[2]) if match else None
    return f"layers.{match[1]}.{found}" if match and found else None


def _turned(module: LoraModule, rows: _Rows) -> LoraModule:
    heads = rows.of(module.name)
    if heads is None or rows.heads is None:
        return module
    if not fits(module.b, heads, rows.heads.size):
        raise UnsupportedError(
            [Problem("B has other rows than the base has heads", module.name,
                     f"{heads} x {rows.heads.size}", str(module.b.shape))]
        )  # fmt: skip
    m = module.magnitude
    return replace(module, b=as_neighbours(module.b, heads),
                   magnitude=None if m is None else as_neighbours(m, heads))  # fmt: skip


def _new_config(adapter: PlainAdapter, names: list[str]) -> Mapping[str, Any]:
    first = adapter.modules[0]
    return {
        "base_model_name_or_path": adapter.base,
        "lora_alpha": alpha_of(first.scale, first.rank),
        "peft_type": "LORA",
        "r": first.rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
    }
