"""MLX's dialect (mlx-lm): ``adapters.safetensors`` and an ``adapter_config.json`` of its own.

``X.lora_a`` is (in, r) and ``X.lora_b`` (r, out), stacks of experts (E, r, in) and (E, out, r); all
modules have one rank and one scale, which is multiplied as it stands. A tied embedding is the
output layer too, and so is what is added to it. Facts: mlx-lm 0.32, ``mlx_lm/tuner`` (lora.py,
dora.py, utils.py) and ``sanitize`` of ``mlx_lm/models``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.form import (
    LoraModule,
    Moved,
    NewFile,
    PlainAdapter,
    as_stored,
    stacked,
)
from regraft.adapters.dialects.shared.base_facts import model_type, needed
from regraft.adapters.dialects.shared.experts import Stack, by_stack, leaf_of, single_experts
from regraft.adapters.dialects.shared.gathering import Gathering, Parts
from regraft.adapters.dialects.shared.once import NewTensors
from regraft.adapters.dialects.shared.peft_config import travelling, with_config
from regraft.adapters.dialects.shared.tied import EMBEDDINGS, as_one, as_two
from regraft.adapters.dialects.shared.widening import as_one_dtype
from regraft.adapters.dialects.writing import json_file, safetensors_file
from regraft.errors import AdapterError, InputError, Problem, UnsupportedError
from regraft.formats import foreign
from regraft.formats.checkpoint import CONFIG_BYTES, Checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.layout import ADAPTER_CONFIG, MLX_WEIGHTS
from regraft.formats.problems import capped, quoted
from regraft.formats.safetensors import read_header

_PART = re.compile(r"(?P<module>.+)\.(?P<what>lora_a|lora_b|m)")
_STACK = re.compile(r"(?P<owner>.+)\.(?P<stack>switch_mlp|experts)\.(?P<leaf>\w+)")
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_KINDS = ("lora", "dora")

_STACK_IS_EXPERTS = ("Klear", "afmoe", "dots1")
"""Model types whose stacks mlx-lm keeps under ``experts``; for others it is ``switch_mlp``."""

_FUSED = ("gpt_oss", "llama4", "llama4_text")
"""Those which it keeps there too, and whose published gate and up are one matrix."""


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read an MLX adapter; see :class:`regraft.adapters.dialects.registry.Reader`."""
    root = path if path.is_dir() else path.parent
    weights = root / MLX_WEIGHTS if path.is_dir() else path
    config = _config(root)
    _check_kind(root, config)
    scale = _scale(root, config)
    gathering = Gathering(weights)
    header = read_header(weights)
    found = gathering.parts(header.tensors, _PART, "lora_a, lora_b or m")
    for name, parts in found.items():
        _add(gathering, name, parts, scale, base)
    named = config.get("model")
    adapter = PlainAdapter(
        gathering.done(), base=named if isinstance(named, str) else None, task_type="CAUSAL_LM",
        metadata=travelling(header.metadata),
    )  # fmt: skip
    if any(module.name.rpartition(".")[2] == "lm_head" for module in adapter.modules):
        return adapter  # mlx-lm has this module where the embeddings are not tied, and only there
    return as_two(adapter, base)


def _config(root: Path) -> dict[str, Any]:
    path = root / ADAPTER_CONFIG
    if not path.is_file():
        raise InputError(
            f"is {foreign.MLX.name}, and {ADAPTER_CONFIG} is missing", where=str(root),
            expected=f"mlx-lm's {ADAPTER_CONFIG} beside {MLX_WEIGHTS}: the scale stands in it",
        )  # fmt: skip
    return read_json_object(path, max_bytes=CONFIG_BYTES)


def _check_kind(root: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise UnsupportedError(
            "the folder holds whole weights, and no adapter", where=str(root),
            found='fine_tune_type "full"', hint="Fuse it with mlx_lm.fuse to get a model",
        )  # fmt: skip
    if kind not in _KINDS:
        raise UnsupportedError(
            "the adapter is of a kind that is not known", where=str(root / ADAPTER_CONFIG),
            expected=f"fine_tune_type {' or '.join(_KINDS)}", found=quoted(kind),
            hint="Fuse it with mlx_lm.fuse to get a model",
        )  # fmt: skip


def _scale(root: Path, config: Mapping[str, Any]) -> float:
    said = config.get("lora_parameters")
    scale = said.get("scale") if isinstance(said, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise AdapterError(
            "the scale is missing", where=str(root / ADAPTER_CONFIG),
            expected="lora_parameters.scale: a number", found=quoted(scale),
        )  # fmt: skip
    return float(scale)


def _add(
    gathering: Gathering, name: str, parts: Parts, scale: float, base: Checkpoint | None
) -> None:
    pair = gathering.pair(name, parts, ("lora_a", "lora_b"), (2, 3))
    if pair is None:
        return
    a, b = pair
    if len(a.shape) == 3:
        _add_stack(gathering, name, a, b, scale, base)
        return
    is_embedding = name.rpartition(".")[2] in EMBEDDINGS
    if is_embedding and "m" in parts:
        gathering.refuse("PEFT's magnitudes of an embedding are those of its columns, and mlx-lm's "
                         "those of its rows: merge it with mlx_lm.fuse", f"{name}.m")  # fmt: skip
        return
    gathering.add(
        _peft_name(name), a.transposed, b.transposed, scale, stored=name,
        kind="embedding" if is_embedding else "linear",
        magnitude=as_stored(parts["m"]) if "m" in parts else None,
    )  # fmt: skip


def _add_stack(
    gathering: Gathering, name: str, a: Moved, b: Moved, scale: float, base: Checkpoint | None
) -> None:
    match = _STACK.fullmatch(name)
    if match is None or match["leaf"] not in _ROLES:
        gathering.refuse("stack of experts has a name that is not known", name,
                         "switch_mlp with gate_proj, up_proj and down_proj")  # fmt: skip
        return
    if match["stack"] == "experts":
        known = model_type(needed(base, f"it says how {name} lies"))
        if known in _FUSED:
            gathering.refuse(f"{known} has gate and up in one matrix, mlx-lm in two: merge it with "
                             "mlx_lm.fuse", name)  # fmt: skip
            return
    if a.shape[0] != b.shape[0]:
        gathering.refuse("factors are of different counts of experts", name, str(a.shape[0]),
                         str(b.shape[0]))  # fmt: skip
        return
    owner = _peft_name(match["owner"])
    leaf = leaf_of(owner, _ROLES[match["leaf"]], base)
    for expert in range(a.shape[0]):
        gathering.add(f"{owner}.experts.{expert}.{leaf}", a.at(expert), b.at(expert), scale,
                      stored=name)  # fmt: skip


# -- names -----------------------------------------------------------------------------------------

_TO_PEFT = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head$", "lm_head"),
        (r"^model\.h\.(?=\d+\.(attention\.(query_key_value|dense)|mlp\.dense_\w+)$)",
         "gpt_neox.layers."),
        (r"^model\.(?=embed_in$)", "gpt_neox."),
        (r"^model\.(?=embed_out$)", ""),
        (r"^model\.(?=h\.\d+\.|w[tp]e$)", "transformer."),
    )
)  # fmt: skip
"""Beginnings of names in mlx-lm that transformers calls otherwise; the first one counts."""

_FROM_PEFT = (
    ("model.language_model.", "language_model.model."),
    ("gpt_neox.layers.", "model.h."),
    ("gpt_neox.embed_in", "model.embed_in"),
    ("embed_out", "model.embed_out"),
)
_OF_GPT2 = ("gpt2", "gptj")
"""Model types whose ``transformer`` is ``model``; those of others keep the name."""


def _peft_name(name: str) -> str:
    for pattern, into in _TO_PEFT:
        if pattern.search(name):
            return pattern.sub(into, name)
    return name


def _mlx_name(name: str, base: Checkpoint | None) -> str:
    for before, after in _FROM_PEFT:
        if name.startswith(before):
            return after + name.removeprefix(before)
    if name.startswith("transformer.h.") or name in ("transformer.wte", "transformer.wpe"):
        known = model_type(needed(base, f"it says what mlx-lm calls {name}"))
        return name.replace("transformer.", "model.", 1) if known in _OF_GPT2 else name
    return name


# -- writing ---------------------------------------------------------------------------------------


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter's files as mlx-lm reads them; all modules have one rank and scale."""
    forms = {(module.rank, module.scale) for module in adapter.modules}
    if len(forms) > 1:
        raise ValueError("the form is not uniform")  # whoever calls makes it so first
    _refuse(_unsayable(adapter))
    single = as_one(single_experts(adapter, base), base)
    plain, stacks, problems = by_stack(single.modules)
    _refuse([*problems, *_unlike_dora(plain, stacks)])
    tensors = NewTensors()
    for module in plain:
        tensors.add(_of_module(_mlx_name(module.name, base), module))
    for stack in stacks:
        tensors.add(_of_stack(stack, base))
    within = any(name.startswith("language_model.") for name in tensors)
    new = NewTensors()
    for name, tensor in tensors.items():
        new[f"language_model.{name}" if within and name.startswith("lm_head.") else name] = tensor
    weights = safetensors_file(MLX_WEIGHTS, new, {**with_config(adapter), "format": "mlx"})
    return json_file(ADAPTER_CONFIG, _new_config(adapter, forms.pop(), new)), weights


_MERGE = "Merge it (`regraft merge`), and give mlx-lm the merged model"


def _new_config(
    adapter: PlainAdapter, form: tuple[int, float], tensors: Mapping[str, Moved]
) -> dict[str, Any]:
    rank, scale = form
    dora = any(module.magnitude is not None for module in adapter.modules)
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "model": adapter.base,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise UnsupportedError(capped(problems, Path(MLX_WEIGHTS)))


def _unsayable(adapter: PlainAdapter) -> list[Problem]:
    problems = [
        Problem("mlx-lm has no place for a tensor that is replaced", name, hint=_MERGE)
        for name in (*adapter.whole, *adapter.token_rows)
    ]
    for module in adapter.modules:
        if module.kind == "convolution":
            problems.append(Problem("mlx-lm has no LoRA for this kind of layer (convolution)",
                                    module.name, hint=_MERGE))  # fmt: skip
        if module.bias is not None:
            problems.append(Problem("mlx-lm's factors have no bias", module.name, hint=_MERGE))
        if module.kind == "embedding" and module.magnitude is not None:
            problems.append(Problem("mlx-lm's magnitudes of an embedding are those of its rows, "
                                    "and PEFT's those of its columns", module.name,
                                    hint=_MERGE))  # fmt: skip
    if not adapter.modules and not problems:
        problems.append(Problem("the adapter adapts no module", hint=_MERGE))
    return problems


def _unlike_dora(plain: Iterable[LoraModule], stacks: Iterable[Stack]) -> Iterator[Problem]:
    """Yield the modules without magnitudes of an adapter that has some: mlx-lm gives them theirs.

    Of each module with magnitudes it is a DoRA layer, and so is each without, with magnitudes that
    are the norms of the base's rows. Such a layer does not compute what LoRA does.
    """
    modules = list(plain)
    if all(module.magnitude is None for module in modules):
        return
    for module in modules:
        if module.magnitude is None:
            yield Problem("mlx-lm has DoRA for all modules or for none", module.name, hint=_MERGE)
    for stack in stacks:
        yield Problem("mlx-lm has no DoRA beside experts", f"{stack.owner}.experts", hint=_MERGE)


def _of_module(name: str, module: LoraModule) -> dict[str, Moved]:
    tensors = {f"{name}.lora_a": module.a.transposed, f"{name}.lora_b": module.b.transposed}
    return tensors if module.magnitude is None else tensors | {f"{name}.m": module.magnitude}


def _of_stack(stack: Stack, base: Checkpoint | None) -> dict[str, Moved]:
    known = model_type(base)
    where = "experts" if known in _STACK_IS_EXPERTS else "switch_mlp"
    owner = stack.owner
    if known in ("mixtral", "phimoe", "minimax"):  # whose module is mlp in transformers since 5
        owner = re.sub(r"\.mlp$", ".block_sparse_moe", owner)
    leaf = next(leaf for leaf, role in _ROLES.items() if role == stack.role)
    name = f"{_mlx_name(owner, base)}.{where}.{leaf}"
    return {
        f"{name}.lora_a": stacked(as_one_dtype([member.a for member in stack.members])),
        f"{name}.lora_b": stacked(as_one_dtype([member.b for member in stack.members])),
    }
