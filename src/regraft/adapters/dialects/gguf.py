"""llama.cpp's dialect: a GGUF file of type ``adapter``, with tensors under GGUF's names.

``X.weight.lora_a`` is (r, in) and ``X.weight.lora_b`` (out, r), but the embedding's ``lora_a`` is
(vocabulary, r). There is one alpha, a float32, and a delta is scaled by alpha over the rank of its
B; without an alpha, or with 0, by 1. Where llama.cpp rearranges rows of queries and keys, those of
their B are. Facts: llama.cpp's ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.dialects.as_peft import alpha_of
from regraft.adapters.dialects.form import (
    Bits,
    LoraModule,
    Moved,
    NewFile,
    PlainAdapter,
    as_stored,
)
from regraft.adapters.dialects.shared.once import NewTensors
from regraft.adapters.dialects.shared.peft_config import with_config
from regraft.errors import (
    AdapterError,
    InputError,
    MismatchError,
    Problem,
    UnsupportedError,
    UsageError,
)
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.gguf import GgufFile, GgufTensor, general_type, gguf_package, open_gguf
from regraft.formats.problems import capped, quoted
from regraft.names.gguf import (
    FAMILIES,
    GgufFamily,
    architecture_of,
    heads_of,
    huggingface_names,
    layer_of,
)
from regraft.quant.formats.gguf import TYPES, UNQUANTIZED, stored_rows

WEIGHTS = "adapter.gguf"
EMBEDDING = "token_embd"
_FACTORS = ("lora_a", "lora_b")
_PAIR = ".weight.lora_"
_KEPT = "regraft.metadata."
_BASE = "general.base_model.0.name"
_MERGE = "Merge it (`regraft merge`), and convert the merged model for llama.cpp"
_NEEDS_BASE = "llama.cpp rearranges rows of queries and keys, by how many heads the model has"


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read a GGUF LoRA; see :class:`regraft.adapters.dialects.registry.Reader`.

    Families whose rows llama.cpp rearranges take the base: a file of an adapter does not say how
    many heads there are.
    """
    file = open_gguf(_file(path))
    where = file.paths[0]
    family = _family_of(file)
    _check_base(file, base)
    _check_kind(file)
    names = _module_names(file.architecture, family, _layers(file))
    parts, whole, problems = _gathered(file, family, names)
    modules = []
    alpha = _alpha(file)
    for name, found in parts.items():
        trouble = _trouble(name, found, where)
        problems += trouble
        if not trouble:
            modules.append(_module(names[name], name, found, alpha))
    if problems:
        raise AdapterError(capped(problems, where))
    turned = [m for m in modules if family.rearranged and _is_rearranged(m.name)]
    if turned and base is not None:
        modules = [_in_order(m, base.config, where) if m in turned else m for m in modules]
    named = file.metadata.get(_BASE)
    return PlainAdapter(
        tuple(modules),
        whole=whole,
        base=named if isinstance(named, str) else None,
        task_type="CAUSAL_LM",
        metadata={
            key.removeprefix(_KEPT): value
            for key, value in file.metadata.items()
            if key.startswith(_KEPT) and isinstance(value, str)
        },
        needs_base=_NEEDS_BASE if turned and base is None else "",
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(
        p for p in path.iterdir() if p.suffix == ".gguf" and general_type(p) == "adapter"
    )
    if len(found) == 1:
        return found[0]
    raise InputError(
        "which GGUF adapter is meant?", where=str(path), expected="one .gguf file of an adapter",
        found=", ".join(quoted(p.name) for p in found[:5]) or "none",
        hint="Give the file by its path",
    )  # fmt: skip


def _family_of(file: GgufFile) -> GgufFamily:
    family = FAMILIES.get(file.architecture)
    if family is None:
        raise UnsupportedError(
            "GGUF adapters of this architecture are not read", where=str(file.paths[0]),
            expected=", ".join(sorted(FAMILIES)), found=quoted(file.architecture),
            hint="Give the adapter that it was converted from",
        )  # fmt: skip
    return family


def _check_base(file: GgufFile, base: Checkpoint | None) -> None:
    found = None if base is None else architecture_of(base.config or {})
    if base is not None and found != file.architecture:
        raise MismatchError(
            "the adapter is for another kind of model", where=str(file.paths[0]),
            expected=f"general.architecture {quoted(found)}, as the base ({base.source}) is"
            if found else f"a base of architecture {quoted(file.architecture)}",
            found=quoted(file.architecture) if found else f"another one: {base.source}",
            hint="Name the base that it was trained on",
        )  # fmt: skip


def _check_kind(file: GgufFile) -> None:
    """Refuse what is no LoRA, or acts on a part of the tokens only."""
    kind = file.metadata.get("adapter.type")
    if kind != "lora":
        raise UnsupportedError(
            "this is no GGUF LoRA, or of a kind that is not read", where=str(file.paths[0]),
            expected="adapter.type: lora", found=quoted(kind),
        )  # fmt: skip
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise UnsupportedError(
            "the adapter is an activated LoRA (aLoRA), which acts from some tokens on",
            where=str(file.paths[0]), hint="It cannot be merged; serve it with llama.cpp",
        )  # fmt: skip


def _alpha(file: GgufFile) -> float:
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(
            "the alpha is no number", where=str(file.paths[0]),
            expected="adapter.lora.alpha: a number", found=quoted(alpha),
        )  # fmt: skip
    return float(alpha)


def _layers(file: GgufFile) -> int:
    return 1 + max((layer_of(name) for name in file.tensors), default=0)


def _module_names(architecture: str, family: GgufFamily, layers: int) -> dict[str, str]:
    """Return transformers' names of modules by GGUF's."""
    gguf = gguf_package()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return huggingface_names(family, layers, gguf.get_tensor_name_map(number, layers).get_name)


def _gathered(
    file: GgufFile, family: GgufFamily, names: Mapping[str, str]
) -> tuple[dict[str, dict[str, Moved]], dict[str, Moved], list[Problem]]:
    """Sort tensors into factors by module, norms that are replaced, and problems."""
    parts: dict[str, dict[str, Moved]] = defaultdict(dict)
    whole: dict[str, Moved] = {}
    problems = []
    for tensor in file.tensors.values():
        module, _, factor = tensor.name.rpartition(".weight.")
        norm = tensor.name.removesuffix(".weight")
        is_norm = norm in names and norm.endswith("_norm") and not family.centered
        if tensor.type not in TYPES:
            problems.append(_unknown(file, tensor, " or ".join(TYPES)))
        elif module in names and factor in _FACTORS:
            parts[module][factor] = _values(tensor)
        elif is_norm and len(tensor.shape) == 1:
            whole[f"{names[norm]}.weight"] = _values(tensor)
        else:
            problems.append(_unknown(file, tensor, "a factor of a module of the architecture"))
    return dict(parts), whole, problems


def _unknown(file: GgufFile, tensor: GgufTensor, expected: str) -> Problem:
    where = f"{file.paths[0]}, tensor {quoted(tensor.name)}"
    return Problem("not a tensor of a GGUF adapter that is read", where, expected,
                   f"{tensor.type} {tensor.shape}")  # fmt: skip


def _values(tensor: GgufTensor) -> Moved:
    """Return a tensor; one in blocks as the float32 values that these stand for."""
    if tensor.type in UNQUANTIZED:
        return as_stored(replace(tensor.stored, dtype=tensor.type, shape=tensor.shape))

    def decoded(raw: Bits) -> Bits:
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType[tensor.type]
        rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)
        values = gguf.quants.dequantize(rows, kind).astype(np.float32).reshape(tensor.shape)
        return np.ascontiguousarray(values).view("<u4")

    return Moved("F32", tensor.shape, (tensor.stored,), decoded)


def _trouble(name: str, found: Mapping[str, Moved], file: Path) -> list[Problem]:
    where = f"{file}, {quoted(name)}"
    if set(found) != set(_FACTORS):
        return [Problem("a module lacks a factor", where, "lora_a and lora_b", ", ".join(found))]
    a, b = found["lora_a"].shape, found["lora_b"].shape
    shown = f"lora_a {a}, lora_b {b}"
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
        return [Problem("factors of odd shapes", where, "two matrices", shown)]
    if a[1 if name == EMBEDDING else 0] != b[1]:
        return [Problem("factors do not fit each other", where, "one rank", shown)]
    return []


def _module(name: str, stored: str, found: Mapping[str, Moved], alpha: float) -> LoraModule:
    a, b = found["lora_a"], found["lora_b"]
    rank = b.shape[1]
    scale = alpha / rank if alpha else 1.0
    if stored == EMBEDDING:
        return LoraModule(name, rank, scale, a.transposed, b, "embedding")
    return LoraModule(name, rank, scale, a, b)


def _is_rearranged(module: str) -> bool:
    return module.endswith((".q_proj", ".k_proj"))


def _in_order(
    module: LoraModule, config: Mapping[str, Any] | None, where: Path, *, to_llama: bool = False
) -> LoraModule:
    """Return a module with B's rows in transformers' order, or in llama.cpp's.

    Raises:
        MismatchError: they are not rows of as many heads as the base has.
    """
    heads, count = heads_of(config or {}, module.name), module.b.shape[0]
    if not heads or count % (2 * heads):
        raise MismatchError(
            "an adapter's rows are not those of the base's heads", where=f"{where}, {module.name}",
            expected=f"rows of {heads} heads, each of an even size", found=f"{count} rows",
            hint="Name the base that it was trained on",
        )  # fmt: skip
    order = stored_rows((0, count), count, heads)
    if to_llama:
        order = np.argsort(order)
    return replace(module, b=module.b.then(module.b.shape, lambda bits: bits[order]))


# -- writing ---------------------------------------------------------------------------------------


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter as one GGUF file, as llama.cpp reads it.

    All modules have one alpha, or this is no call of :func:`regraft.convert`, which makes it so.
    """
    architecture, config = _of_base(base)
    family = FAMILIES[architecture]
    layers = 1 + max((layer_of(module.name) for module in adapter.modules), default=0)
    names = {module: name for name, module in _module_names(architecture, family, layers).items()}
    _refuse(adapter, names, base)
    alphas = {alpha_of(module.scale, module.rank) for module in adapter.modules}
    if len(alphas) != 1:
        raise ValueError("modules have several alphas")  # whoever calls makes them one first
    tensors = NewTensors()
    for module in adapter.modules:
        placed = module
        if family.rearranged and _is_rearranged(module.name):
            placed = _in_order(module, config, Path(WEIGHTS), to_llama=True)
        a = placed.a.transposed if module.kind == "embedding" else placed.a
        name = names[_plain_name(module.name, names)]
        tensors.add({f"{name}{_PAIR}a": a, f"{name}{_PAIR}b": placed.b})
    return (_gguf_file(architecture, float(alphas.pop()), adapter, tensors),)


def _of_base(base: Checkpoint | None) -> tuple[str, Mapping[str, Any]]:
    """Return GGUF's name of the base's architecture, and its config.

    Raises:
        UsageError: there is no base.
        UnsupportedError: it is of an architecture whose names are not known.
    """
    if base is None:
        raise UsageError(
            "a GGUF adapter cannot be written without the model that it is for", where="base",
            expected="the base: GGUF's names, and the order of rows, are its architecture's",
            hint="Name it with --base: its folder, its GGUF file, or its Hub id",
        )  # fmt: skip
    config = base.config or {}
    found = architecture_of(config)
    if found is None:
        raise UnsupportedError(
            "it is not known what llama.cpp does to models of this kind", where=base.source,
            expected=f"a base of {', '.join(sorted(FAMILIES))}",
            found=f"model_type {quoted(config.get('model_type'))}", hint=_MERGE,
        )  # fmt: skip
    return found, config


def _refuse(adapter: PlainAdapter, names: Mapping[str, str], base: Checkpoint | None) -> None:
    """Refuse what a GGUF adapter has no place for, all at once.

    Raises:
        UnsupportedError: there is some.
    """
    tied = bool(((base.config if base else None) or {}).get("tie_word_embeddings"))
    problems = [p for module in adapter.modules for p in _unsayable(module, names, tied=tied)]
    problems += [
        Problem("llama.cpp adds deltas, and replaces no tensor", name, hint=_MERGE)
        for name in (*adapter.whole, *adapter.token_rows)
    ]
    if not adapter.modules and not problems:
        problems.append(Problem("there is no LoRA in the adapter", WEIGHTS))
    if problems:
        raise UnsupportedError(capped(problems, Path(WEIGHTS)))


def _unsayable(module: LoraModule, names: Mapping[str, str], *, tied: bool) -> Iterator[Problem]:
    if _plain_name(module.name, names) not in names:
        yield Problem(
            "llama.cpp has no tensor of its own for this module", module.name, hint=_MERGE
        )
    elif tied and module.name.endswith(("lm_head", "embed_tokens")):
        yield Problem("llama.cpp has one tensor for the embedding and the head of this model, and "
                      "stops at an adapter for either", module.name, hint=_MERGE)  # fmt: skip
    if module.kind in ("convolution", "experts"):
        yield Problem(f"llama.cpp's adapters know no such layers ({module.kind})", module.name,
                      hint=_MERGE)  # fmt: skip
    for tensor, what in ((module.magnitude, "DoRA's magnitudes"), (module.bias, "a bias of B")):
        if tensor is not None:
            yield Problem(f"llama.cpp does not know {what}", module.name, hint=_MERGE)


def _plain_name(name: str, names: Mapping[str, str]) -> str:
    """Return the name that a causal model has for a module; some adapters leave ``model.`` out."""
    return name if name in names else f"model.{name}"


def _gguf_file(
    architecture: str, alpha: float, adapter: PlainAdapter, tensors: Mapping[str, Moved]
) -> NewFile:
    header, alignment = _header(architecture, alpha, adapter, tensors)

    def padded(size: int) -> int:
        return -(-size // alignment) * alignment

    def pieces(files: FilePool) -> Iterator[bytes]:
        yield header.ljust(padded(len(header)), b"\0")
        for tensor in tensors.values():
            yield tensor.bits(files).tobytes().ljust(padded(tensor.nbytes), b"\0")

    nbytes = padded(len(header)) + sum(padded(tensor.nbytes) for tensor in tensors.values())
    return NewFile(WEIGHTS, nbytes, pieces)


def _header(
    architecture: str, alpha: float, adapter: PlainAdapter, tensors: Mapping[str, Moved]
) -> tuple[bytes, int]:
    """Return all that comes before the tensors, as the ``gguf`` package writes it, and to what
    multiple of bytes it and they are filled up.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if adapter.base:
        writer.add_uint32("general.base_model.count", 1)
        writer.add_string(_BASE, adapter.base)
    for key, value in with_config(adapter).items():
        writer.add_string(_KEPT + key, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    into = io.BytesIO()
    writer.fout, writer.state = [into], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return into.getvalue(), int(writer.data_alignment)


def is_sayable(adapter: PlainAdapter) -> bool:
    """Whether a file's one alpha, a float32, gives every module its scale, also where ranks
    differ.
    """
    alphas = {alpha_of(module.scale, module.rank) for module in adapter.modules}
    return len(alphas) <= 1 and all(
        alpha and float(np.float32(alpha)) == alpha for alpha in alphas
    ) and all(alpha_of(m.scale, m.rank) / m.rank == m.scale for m in adapter.modules)  # fmt: skip
