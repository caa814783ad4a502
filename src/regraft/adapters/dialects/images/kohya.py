"""kohya's dialect (sd-scripts): ``lora_unet_...``, whose dots became underscores.

Each module has ``.lora_down.weight`` (A), ``.lora_up.weight`` (B) and a number ``.alpha``; without
it alpha is the rank. Which module a name means is looked up among those of the base, where
Stability's names of a UNet count too; nothing is guessed. DoRA's ``.dora_scale`` is (out, 1).
Facts: kohya's ``networks/lora.py``, diffusers' ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from regraft.adapters.dialects.as_peft import alpha_of
from regraft.adapters.dialects.form import LoraModule, NewFile, PlainAdapter
from regraft.adapters.dialects.images.diffusers import module_of, trouble_of
from regraft.adapters.dialects.images.parts import (
    MERGE,
    PART,
    chosen,
    constant,
    number_in,
    part_to_write,
    refuse_unsayable,
    shapes_of,
)
from regraft.adapters.dialects.images.sgm_names import sgm_name
from regraft.adapters.dialects.shared.once import NewTensors, modules_twice
from regraft.adapters.dialects.shared.peft_config import with_config
from regraft.adapters.dialects.writing import safetensors_file
from regraft.errors import AdapterError, InputError, MismatchError, Problem, UnsupportedError
from regraft.formats.checkpoint import Checkpoint, open_weights
from regraft.formats.files.reading import FilePool
from regraft.formats.problems import capped, quoted
from regraft.tensors import WORKING_DTYPES, TensorSpec

WEIGHTS = "lora.safetensors"

_PREFIXES = {
    "lora_unet_": "unet", "lora_transformer_": "transformer", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3", "lora_te_": "text_encoder",
}  # fmt: skip
"""What names begin with, and the part of a pipeline that it means."""

_KEY = re.compile(
    rf"(?P<prefix>{'|'.join(_PREFIXES)})(?P<module>[^.]+)"
    r"\.(?P<what>lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
_SLOTS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha",
          "dora_scale": "magnitude"}  # fmt: skip
_ROOTS = ("", "model.diffusion_model.")
"""What a UNet's modules are below in checkpoints: of a part alone, of a whole pipeline's file."""

_TEXT = "text_model."
"""What CLIP's text models have their layers below, up to transformers 4, and kohya's names have."""

_NEEDS_BASE = (
    "dots in the names of its modules became underscores, and the base's modules say where"
)

Found = dict[str, dict[str, TensorSpec]]
"""Tensors by the name of their module as it is written, and what they are of it."""


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read kohya's file; see :class:`regraft.adapters.dialects.registry.Reader`."""
    file = _file(path)
    tensors, metadata = open_weights(file)
    parts = _gathered(tensors, file)
    part, notes = chosen(list(parts), base, file)
    if part is None or base is None:
        found = {name: each for modules in parts.values() for name, each in modules.items()}
        names, shapes = {name: name for name in found}, dict[str, tuple[int, ...]]()
    else:
        found, shapes = parts[part], dict(shapes_of(base))
        names = _resolved(found, shapes, base, file)
    kept = {key: value for key, value in metadata.items() if key != "format"}
    return PlainAdapter(
        tuple(_modules(found, names, shapes, file)),
        metadata={**kept, **({PART: part} if part else {})},
        notes=notes,
        needs_base=_NEEDS_BASE if base is None else "",
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(each for each in path.iterdir() if each.suffix == ".safetensors")
    if len(found) == 1:
        return found[0]
    raise InputError(
        "which file is meant?", where=str(path), expected="one .safetensors file",
        found=", ".join(quoted(each.name) for each in found[:5]) or "none",
        hint="Give the file by its path",
    )  # fmt: skip


def _gathered(tensors: Mapping[str, TensorSpec], file: Path) -> dict[str, Found]:
    """Sort tensors by part and module.

    Raises:
        UnsupportedError: some are not LoRA's, such as those of LoHa, LoKr or Tucker's form.
    """
    parts: dict[str, Found] = defaultdict(lambda: defaultdict(dict))
    problems = []
    for name, spec in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or (match["what"] != "alpha" and spec.dtype not in WORKING_DTYPES):
            problems.append(
                Problem("not a tensor of kohya's LoRA", f"{file}, {quoted(name)}",
                        f"{', '.join(_PREFIXES)}; lora_down, lora_up, alpha or dora_scale",
                        f"{spec.dtype} {spec.shape}",
                        "LoHa, LoKr and Tucker's form (hada, lokr, lora_mid) are no LoRA: extract "
                        "one with LyCORIS' own tools, or convert with diffusers")
            )  # fmt: skip
            continue
        module = match["prefix"] + match["module"]
        parts[_PREFIXES[match["prefix"]]][module][_SLOTS[match["what"]]] = spec
    if problems:
        raise UnsupportedError(capped(problems, file))
    return {part: dict(modules) for part, modules in parts.items()}


def _resolved(
    found: Found, shapes: Mapping[str, tuple[int, ...]], base: Checkpoint, file: Path
) -> dict[str, str]:
    """Return the base's module that each name means.

    Raises:
        MismatchError: a name means none, or several; lists them all.
    """
    known = _underscored(shapes, base)
    names, problems = {}, []
    for written in found:
        prefix = next(prefix for prefix in _PREFIXES if written.startswith(prefix))
        meant = known.get(written.removeprefix(prefix), [])
        if len(meant) == 1:
            names[written] = meant[0]
            continue
        several = ", ".join(map(quoted, meant))
        problems.append(
            Problem("a name means several modules of the base", f"{file}, {quoted(written)}",
                    "one module", several, "Rename the adapter's module in another dialect, such "
                    "as diffusers', where names have their dots")
            if meant else
            Problem("the base has no module of this name", f"{file}, {quoted(written)}",
                    f"a module of {base.source}", "none", "Give the part's own folder of the "
                    "pipeline it was trained on, or the file that it was trained from")
        )  # fmt: skip
    if problems:
        raise MismatchError(capped(problems, file))
    return names


def _underscored(shapes: Mapping[str, tuple[int, ...]], base: Checkpoint) -> dict[str, list[str]]:
    """Return the base's modules by every name that kohya's files may have for them."""
    known: dict[str, list[str]] = defaultdict(list)
    layers = (base.config or {}).get("layers_per_block")
    for module in shapes:
        own = [module.removeprefix(root) for root in _ROOTS if module.startswith(root)]
        own.append(_with_text_model(module))
        stability = sgm_name(module, shapes, layers) if isinstance(layers, int) else None
        for name in {each.replace(".", "_") for each in (*own, stability) if each}:
            known[name].append(module)
    return known


def _with_text_model(module: str) -> str:
    """Return a module's name as it was before transformers 5, where it is one of CLIP's layers."""
    return _TEXT + module if module.startswith("encoder.layers.") else module


def _modules(
    found: Found, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], file: Path
) -> Iterator[LoraModule]:
    modules, problems = [], []
    with FilePool() as files:
        for written, name in names.items():
            each = found[written]
            trouble = trouble_of(written, each, file) or _odd_magnitude(written, each, file)
            if trouble is not None:
                problems.append(trouble)
                continue
            rank = each["b"].shape[1]
            alpha = number_in(files, each["alpha"]) if "alpha" in each else float(rank)
            if alpha is None:
                problems.append(Problem("alpha is no number", f"{file}, {quoted(written)}"))
                continue
            module = module_of(name, alpha / rank, each)
            modules.append(_with_magnitude(_as_the_base_is(module, shapes.get(name))))
    if problems := problems + modules_twice(modules, file):
        raise AdapterError(capped(problems, file))
    yield from modules


def _odd_magnitude(name: str, found: Mapping[str, TensorSpec], file: Path) -> Problem | None:
    """Return the problem of magnitudes of inputs, which some versions of LyCORIS trained."""
    if "magnitude" not in found:
        return None
    out, shape = found["b"].shape[0], found["magnitude"].shape
    if shape[:1] == (out,) and all(size == 1 for size in shape[1:]):
        return None
    return Problem(
        "DoRA's magnitudes are not those of outputs", f"{file}, {quoted(name)}",
        f"({out}, 1)", str(shape), "Older LyCORIS took norms over outputs, which PEFT's DoRA does "
        "not; merge it with LyCORIS",
    )  # fmt: skip


def _as_the_base_is(module: LoraModule, shape: tuple[int, ...] | None) -> LoraModule:
    """Return a module with factors of as many dimensions as the base's weight: a linear layer's may
    lie as those of a 1x1 convolution, and the other way round.
    """
    a, b = module.a, module.b
    if shape is None or len(shape) == len(a.shape):
        return module
    if len(shape) == 2 and all(size == 1 for size in a.shape[2:]):
        a, b = a.reshaped(a.shape[:2]), b.reshaped(b.shape[:2])
        return replace(module, a=a, b=b, kind="linear")
    if len(a.shape) == 2 and all(size == 1 for size in shape[2:]):
        ones = (1,) * (len(shape) - 2)
        a, b = a.reshaped((*a.shape, *ones)), b.reshaped((*b.shape, *ones))
        return replace(module, a=a, b=b, kind="convolution")
    return module  # which does not fit, and is refused where it is matched with the base


def _with_magnitude(module: LoraModule) -> LoraModule:
    """Return a module with DoRA's magnitudes in PEFT's shape: (out,), or (1, out, 1, 1)."""
    if module.magnitude is None:
        return module
    out, further = module.b.shape[0], len(module.a.shape) - 2
    shape = (1, out, *(1,) * further) if module.kind == "convolution" else (out,)
    return replace(module, magnitude=module.magnitude.reshaped(shape))


# -- writing ---------------------------------------------------------------------------------------


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter as kohya's scripts write one, in diffusers' names of modules."""
    part = part_to_write(adapter, base)
    refuse_unsayable(adapter, ("linear", "convolution"), WEIGHTS, biases=False)
    prefix = _prefix(part, base)
    _refuse_clashes(adapter, base)
    tensors = NewTensors()
    for module in adapter.modules:
        plain = _with_text_model(module.name) if part.startswith("text_encoder") else module.name
        name = prefix + plain.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = module.a
        tensors[f"{name}.lora_up.weight"] = module.b
        tensors[f"{name}.alpha"] = constant(float(alpha_of(module.scale, module.rank)))
        if module.magnitude is not None:
            out = module.b.shape[0]
            shape = (out, *(1,) * (len(module.a.shape) - 1))
            tensors[f"{name}.dora_scale"] = module.magnitude.reshaped(shape)
    kept = {key: value for key, value in with_config(adapter).items() if key != PART}
    return (safetensors_file(WEIGHTS, tensors, {**kept, "format": "pt"}),)


def _prefix(part: str, base: Checkpoint | None) -> str:
    """Return what names of a part begin with; a lone text encoder has no number."""
    alone = base is None or not (base.root.parent / "text_encoder_2").is_dir()
    if part == "text_encoder" and alone:
        return "lora_te_"
    found = next((prefix for prefix, meant in _PREFIXES.items() if meant == part), None)
    if found is None:
        raise UnsupportedError(
            "kohya's layout has no name for this part of a pipeline", where=part, hint=MERGE
        )
    return found


def _refuse_clashes(adapter: PlainAdapter, base: Checkpoint | None) -> None:
    """Refuse modules whose names could not be told apart without their dots.

    Raises:
        UnsupportedError: there are some.
    """
    known = {} if base is None else shapes_of(base)
    by_name: dict[str, set[str]] = defaultdict(set)
    for name in (*(module.name for module in adapter.modules), *known):
        by_name[name.replace(".", "_")].add(name)
    problems = [
        Problem("without its dots a module's name is that of another one, too", module.name,
                found=", ".join(sorted(by_name[module.name.replace(".", "_")])),
                hint="Write it in diffusers' dialect, or merge it")
        for module in adapter.modules
        if len(by_name[module.name.replace(".", "_")]) > 1
    ]  # fmt: skip
    if problems:
        raise UnsupportedError(capped(problems, Path(WEIGHTS)))
