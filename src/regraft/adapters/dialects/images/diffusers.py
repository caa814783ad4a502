"""diffusers' dialect: ``pytorch_lora_weights.safetensors``, PEFT's tensors below a part's name.

``unet.X.lora_A.weight`` is PEFT's ``X.lora_A.weight``. PEFT's config stands as JSON under the key
``lora_adapter_metadata`` of the header, its fields below the part's name too; without it alpha is
the rank of each module. Older files have ``lora.down`` and ``lora.up``, or names of attention
processors. Facts: diffusers 0.42, ``loaders/lora_base.py``, ``utils/state_dict_utils.py``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.as_peft import config_of, tensors_of
from regraft.adapters.dialects.form import LoraModule, Moved, NewFile, PlainAdapter, as_stored
from regraft.adapters.dialects.images.parts import (
    PART,
    PARTS,
    chosen,
    number_in,
    part_to_write,
    refuse_unsayable,
    several,
)
from regraft.adapters.dialects.shared.peft_config import KEPT
from regraft.adapters.dialects.writing import safetensors_file
from regraft.adapters.settings import read_settings
from regraft.adapters.wrappers import PREFIX
from regraft.errors import AdapterError, InputError, Problem, UnsupportedError
from regraft.formats.checkpoint import CONFIG_BYTES, Checkpoint, open_weights
from regraft.formats.files.json_file import json_object_in
from regraft.formats.files.reading import FilePool
from regraft.formats.problems import capped, quoted
from regraft.tensors import WORKING_DTYPES, TensorSpec

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

_KEY = re.compile(
    rf"(?P<part>{'|'.join(PARTS)})\.(?P<module>.+?)"
    r"(?:\.lora_(?P<new>A|B|magnitude_vector)(?:\.(?P<leaf>weight|bias))?"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight|\.(?P<alpha>alpha))"
)
_SLOTS = {"A": "a", "B": "b", "magnitude_vector": "magnitude", "down": "a", "up": "b"}
_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

Parts = dict[str, dict[str, dict[str, TensorSpec]]]
"""Tensors by part, module and what they are of it."""


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read diffusers' file; see :class:`regraft.adapters.dialects.registry.Reader`."""
    file = _file(path)
    tensors, metadata = open_weights(file)
    parts, problems = _gathered(tensors, file)
    if problems:
        raise AdapterError(capped(problems, file))
    part, notes = chosen(list(parts), base, file)
    configs = _configs(metadata, file)
    modules: list[LoraModule] = []
    for name in parts if part is None else (part,):
        within = f"{name}." if part is None else ""
        modules += _modules(parts[name], configs.get(name), file, within)
    kept = {k: v for k, v in metadata.items() if k not in (METADATA, "format")}
    said = configs.get(part or "", {}).get("base_model_name_or_path")
    return PlainAdapter(
        tuple(modules),
        base=said if isinstance(said, str) else None,
        metadata=kept | ({PART: part} if part else {}),
        notes=notes,
        needs_base="" if part else several(list(parts)),
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = (WEIGHTS, "pytorch_lora_weights.bin")
    found = next((path / name for name in names if (path / name).is_file()), None)
    lone = sorted(each for each in path.iterdir() if each.suffix == ".safetensors")
    if found is None and len(lone) != 1:
        raise InputError("the adapter's weights are missing", where=str(path), expected=WEIGHTS)
    return found or lone[0]


def _gathered(tensors: Mapping[str, TensorSpec], file: Path) -> tuple[Parts, list[Problem]]:
    parts: Parts = defaultdict(lambda: defaultdict(dict))
    problems = []
    for name, spec in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or (spec.dtype not in WORKING_DTYPES and not match["alpha"]):
            problems.append(
                Problem("not a tensor of an adapter of diffusers", f"{file}, {quoted(name)}",
                        f"PART.MODULE.lora_A.weight or the like, {' or '.join(WORKING_DTYPES)}",
                        spec.dtype, "Of other layouts regraft reads kohya's; see how to convert "
                        "them with diffusers (load_lora_weights, save_lora_weights)")
            )  # fmt: skip
            continue
        slot = "alpha" if match["alpha"] else _SLOTS[match["new"] or match["old"]]
        slot = "bias" if match["leaf"] == "bias" else slot
        found = parts[match["part"]][_module_name(match["part"], match["module"])]
        if slot in found:
            problems.append(Problem("two tensors are one of the adapter", str(file), "one tensor",
                                    f"{quoted(found[slot].name)} and {quoted(name)}"))  # fmt: skip
        found[slot] = spec
    return parts, problems


def _module_name(part: str, written: str) -> str:
    """Return a module's name; attention processors of older files are not in it any more."""
    name = written.replace(".processor.", ".")
    owner, _, leaf = name.rpartition(".")
    if leaf in _IN_TEXT and part.startswith("text_encoder"):
        return f"{owner}.{_IN_TEXT[leaf]}"
    return f"{name}.0" if leaf == "to_out" else name


def _configs(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """Return PEFT's config by part, as far as the header has it."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    said = json_object_in(text, f"{file}, {METADATA}", max_bytes=CONFIG_BYTES)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in said.items():
        part, _, field = key.partition(".")
        found[part][field] = value
    return dict(found)


def _modules(
    parts: Mapping[str, Mapping[str, TensorSpec]], config: Mapping[str, Any] | None, file: Path,
    within: str,
) -> list[LoraModule]:  # fmt: skip
    scale = _scales(config, file)
    modules, problems = [], []
    with FilePool() as files:
        for name, found in parts.items():
            trouble = trouble_of(name, found, file)
            if trouble is not None:
                problems.append(trouble)
                continue
            rank = found["b"].shape[1]
            alpha = number_in(files, found["alpha"]) if "alpha" in found else None
            by_file = 1.0 if alpha is None else alpha / rank
            own = by_file if scale is None else scale(name)
            modules.append(module_of(within + name, own, found))
    if problems:
        raise AdapterError(capped(problems, file))
    return modules


def _scales(config: Mapping[str, Any] | None, file: Path) -> Callable[[str], float] | None:
    """Return the scale of a module by the header's config; None where there is none.

    Raises:
        UnsupportedError: the config has something that cannot be merged.
    """
    if config is None or "r" not in config:
        return None
    settings = read_settings({"peft_type": "LORA", **config}, f"{file}, {METADATA}")
    if settings.begins_with_base:
        raise UnsupportedError(
            f"init_lora_weights {settings.init_lora_weights!r} changes the base", where=str(file),
            hint="Convert it with PEFT (path_initial_model_for_weight_conversion) first",
        )  # fmt: skip
    return settings.scale_of


def trouble_of(name: str, found: Mapping[str, TensorSpec], file: Path) -> Problem | None:
    """Return what is wrong with the factors of a module."""
    where = f"{file}, {quoted(name)}"
    if "a" not in found or "b" not in found:
        return Problem("a module lacks a factor", where, "both factors", ", ".join(found))
    a, b = found["a"].shape, found["b"].shape
    if (
        len(a) < 2
        or len(b) != len(a)
        or 0 in (*a, *b)
        or a[0] != b[1]
        or any(n != 1 for n in b[2:])
    ):
        return Problem("factors do not fit each other", where, "one rank", f"{a} and {b}")
    return None


def module_of(name: str, scale: float, found: Mapping[str, TensorSpec]) -> LoraModule:
    """Return a module of factors that fit each other."""
    a, b = as_stored(found["a"]), as_stored(found["b"])
    bias = as_stored(found["bias"]) if "bias" in found else None
    magnitude = as_stored(found["magnitude"]) if "magnitude" in found else None
    kind = "linear" if len(a.shape) == 2 else "convolution"
    return LoraModule(name, b.shape[1], scale, a, b, kind, bias, magnitude)  # type: ignore[arg-type]


# -- writing ---------------------------------------------------------------------------------------


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter as diffusers' ``load_lora_weights`` reads it."""
    part = part_to_write(adapter, base)
    refuse_unsayable(adapter, ("linear", "convolution"), WEIGHTS, biases=True)
    tensors: dict[str, Moved] = {
        f"{part}.{name.removeprefix(PREFIX)}": tensor
        for name, tensor in tensors_of(adapter).items()
    }
    config = config_of(replace(adapter, metadata={}, config={}))
    said = json.dumps({f"{part}.{key}": config[key] for key in sorted(config)}, indent=2)
    kept = {key: value for key, value in adapter.metadata.items() if key not in (PART, KEPT)}
    return (safetensors_file(WEIGHTS, tensors, {**kept, "format": "pt", METADATA: said}),)
