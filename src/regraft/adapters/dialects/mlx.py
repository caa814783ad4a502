"""MLX's dialect (mlx-lm): ``adapters.safetensors`` and an ``adapter_config.json`` of its own.

``X.lora_a`` is (in, r) and ``X.lora_b`` (r, out), stacks of experts (E, r, in) and (E, out, r); all
modules have one rank and one scale, which is multiplied as it stands. Facts: mlx-lm 0.32,
``mlx_lm/tuner`` (lora.py, dora.py, utils.py).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.form import (
    Kind,
    LoraModule,
    Moved,
    NewFile,
    PlainAdapter,
    as_stored,
    stacked,
)
from regraft.adapters.dialects.writing import json_file, safetensors_file
from regraft.errors import AdapterError, InputError, Problem, UnsupportedError
from regraft.formats.checkpoint import CONFIG_BYTES, Checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.layout import ADAPTER_CONFIG, MLX_WEIGHTS
from regraft.formats.problems import capped, quoted
from regraft.formats.safetensors import read_header
from regraft.tensors import WORKING_DTYPES, TensorSpec

_PART = re.compile(r"(?P<module>.+)\.(?P<what>lora_a|lora_b|m)")
_SWITCH = re.compile(r"(?P<owner>.+)\.switch_mlp\.(?P<leaf>gate_proj|up_proj|down_proj)")
_EXPERT = re.compile(r"(?P<owner>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>\w+)")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read an MLX adapter; see :class:`regraft.adapters.dialects.registry.Reader`."""
    del base
    root = path if path.is_dir() else path.parent
    weights = root / MLX_WEIGHTS if path.is_dir() else path
    config = _config(root)
    if config.get("fine_tune_type") == "full":
        raise UnsupportedError(
            "the folder holds whole weights, and no adapter", where=str(root),
            found='fine_tune_type "full"', hint="Fuse it with mlx_lm.fuse to get a model",
        )  # fmt: skip
    scale = _scale(root, config)
    parts, problems = _gathered(weights)
    modules: list[LoraModule] = []
    for name, found in parts.items():
        trouble = _trouble(name, found, weights)
        problems += trouble
        if not trouble:
            modules += _modules(name, found, scale)
    if problems:
        raise AdapterError(capped(problems, weights))
    named = config.get("model")
    return PlainAdapter(
        tuple(modules), base=named if isinstance(named, str) else None, task_type="CAUSAL_LM"
    )


def _config(root: Path) -> dict[str, Any]:
    path = root / ADAPTER_CONFIG
    if not path.is_file():
        raise InputError(
            f"{ADAPTER_CONFIG} is missing", where=str(root),
            expected=f"mlx-lm's {ADAPTER_CONFIG} beside {MLX_WEIGHTS}: the scale stands in it",
        )  # fmt: skip
    return read_json_object(path, max_bytes=CONFIG_BYTES)


def _scale(root: Path, config: Mapping[str, Any]) -> float:
    said = config.get("lora_parameters")
    scale = said.get("scale") if isinstance(said, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise AdapterError(
            "the scale is missing", where=str(root / ADAPTER_CONFIG),
            expected="lora_parameters.scale: a number", found=quoted(scale),
        )  # fmt: skip
    return float(scale)


def _gathered(weights: Path) -> tuple[dict[str, dict[str, TensorSpec]], list[Problem]]:
    parts: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    problems = []
    for name, spec in read_header(weights).tensors.items():
        match = _PART.fullmatch(name)
        if match is None or spec.dtype not in WORKING_DTYPES:
            problems.append(
                Problem("not a tensor of an MLX adapter", f"{weights}, {name}",
                        f"lora_a, lora_b or m, {' or '.join(WORKING_DTYPES)}", spec.dtype)
            )  # fmt: skip
        else:
            parts[match["module"]][match["what"]] = spec
    return parts, problems


def _trouble(name: str, found: Mapping[str, TensorSpec], weights: Path) -> list[Problem]:
    where = f"{weights}, {name}"
    if "lora_a" not in found or "lora_b" not in found:
        return [Problem("a module lacks a factor", where, "lora_a and lora_b", ", ".join(found))]
    a, b = found["lora_a"].shape, found["lora_b"].shape
    shown = f"lora_a {a}, lora_b {b}"
    if len(a) != len(b) or len(a) not in (2, 3) or 0 in (*a, *b):
        return [Problem("factors of odd shapes", where, "two matrices, or two stacks", shown)]
    fit = a[1] == b[0] if len(a) == 2 else (a[0] == b[0] and a[1] == b[2])
    if not fit:
        return [Problem("factors do not fit each other", where, "one rank", shown)]
    return []


def _modules(name: str, found: Mapping[str, TensorSpec], scale: float) -> Iterator[LoraModule]:
    a, b = as_stored(found["lora_a"]), as_stored(found["lora_b"])
    magnitude = as_stored(found["m"]) if "m" in found else None
    if len(a.shape) == 2:
        kind: Kind = "embedding" if name.rpartition(".")[2] in _EMBEDDINGS else "linear"
        rank = a.shape[1]
        yield LoraModule(name, rank, scale, a.transposed, b.transposed, kind, None, magnitude)
        return
    match = _SWITCH.fullmatch(name)
    owner, leaf = (match["owner"], match["leaf"]) if match else name.rsplit(".", 1)
    for expert in range(a.shape[0]):
        yield LoraModule(
            f"{owner}.experts.{expert}.{leaf}", a.shape[1], scale, a.at(expert), b.at(expert)
        )


# -- writing ---------------------------------------------------------------------------------------


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter's files as mlx-lm reads them; all modules have one rank and scale."""
    del base
    problems = [_unsayable(module) for module in adapter.modules]
    refused = [problem for problem in problems if problem is not None]
    refused += [
        Problem("mlx-lm has no place for a tensor that is replaced", name, hint=_MERGE)
        for name in (*adapter.whole, *adapter.token_rows)
    ]
    forms = {(module.rank, module.scale) for module in adapter.modules}
    if len(forms) != 1:
        raise ValueError("the form is not uniform")  # whoever calls makes it so first
    if refused:
        raise UnsupportedError(capped(refused, Path(MLX_WEIGHTS)))
    (rank, scale), tensors = forms.pop(), dict[str, Moved]()
    plain, experts = _by_stack(adapter)
    for module in plain:
        tensors[f"{module.name}.lora_a"] = module.a.transposed
        tensors[f"{module.name}.lora_b"] = module.b.transposed
        if module.magnitude is not None:
            tensors[f"{module.name}.m"] = module.magnitude
    for name, members in experts.items():
        ordered = [members[number] for number in sorted(members)]
        tensors[f"{name}.lora_a"] = stacked([member.a for member in ordered])
        tensors[f"{name}.lora_b"] = stacked([member.b for member in ordered])
    dora = any(module.magnitude is not None for module in adapter.modules)
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": adapter.base,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    weights = safetensors_file(MLX_WEIGHTS, tensors, {**adapter.metadata, "format": "mlx"})
    return json_file(ADAPTER_CONFIG, config), weights


_MERGE = "Merge it (`regraft merge`), and give mlx-lm the merged model"


def _unsayable(module: LoraModule) -> Problem | None:
    if module.kind in ("convolution", "experts"):
        return Problem(f"mlx-lm has no LoRA for this kind of layer ({module.kind})", module.name,
                       hint=_MERGE)  # fmt: skip
    if module.bias is not None:
        return Problem("mlx-lm's factors have no bias", module.name, hint=_MERGE)
    return None


def _by_stack(
    adapter: PlainAdapter,
) -> tuple[list[LoraModule], dict[str, dict[int, LoraModule]]]:
    """Return modules that stand alone, and those of experts by the name of their stack."""
    plain, experts = [], defaultdict[str, dict[int, LoraModule]](dict)
    for module in adapter.modules:
        match = _EXPERT.fullmatch(module.name)
        if match is None:
            plain.append(module)
        else:
            stack = f"{match['owner']}.switch_mlp.{match['leaf']}"
            experts[stack][int(match["number"])] = module
    return plain, dict(experts)
