"""A GGUF model as a base: quantized weights under transformers' names, and a config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import FormatError, MismatchError, Problem, UnsupportedError
from regraft.formats.checkpoint import read_base_config
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.gguf import GgufFile, GgufTensor, find_gguf, gguf_package, open_gguf
from regraft.formats.layout import has_tokenizer
from regraft.formats.problems import DOWNLOAD_AGAIN, capped, quoted
from regraft.names.gguf import (
    FAMILIES,
    REFUSED,
    UNUSED,
    GgufFamily,
    config_of,
    huggingface_names,
    is_optional,
)
from regraft.quant.formats.gguf import TYPES, UNQUANTIZED, GgufDecoder
from regraft.quant.weight import QuantizedWeight
from regraft.tensors import DTYPES

__all__ = ["DECODED", "GgufBase", "open_gguf_base"]

DECODED = "BF16"
"""What quantized weights become unless another dtype is asked for."""

_COUNTS = ("block_count", "embedding_length", "attention.head_count")
_ANOTHER_BASE = "Name the 16-bit base that this was converted from"
_CONFIG_BESIDE = "put the config.json of the model it was converted from beside the file"


@dataclass(frozen=True)
class GgufBase:
    """A model in GGUF, seen as a checkpoint of plain weights.

    Attributes:
        root: the folder that holds it.
        files: its files, in order.
        architecture: GGUF's name of its architecture, such as ``llama``.
        types: the ggml types of its tensors, sorted.
        config: ``config.json``: the one beside the file, else one made from the metadata. The dtype
            that it names is the one that most values have.
        config_is_made: whether it was made from the metadata.
        weights: every parameter of the model by transformers' name, in order of file and offset.
        unused: stored tensors that are no parameters.
        warnings: what the result will lack, and where to get it.
    """

    root: Path
    files: tuple[Path, ...]
    architecture: str
    types: tuple[str, ...]
    config: dict[str, Any]
    config_is_made: bool
    weights: dict[str, QuantizedWeight]
    unused: tuple[str, ...]
    warnings: tuple[str, ...]


def open_gguf_base(path: Path, dtype: str = DECODED) -> GgufBase:
    """Open a model in GGUF: a file, any part of a split one, or a folder that holds one model.

    Args:
        path: the file or folder.
        dtype: safetensors dtype that its quantized weights are decoded to, of ``WORKING_DTYPES``.
            What is stored as F32, F16 or BF16 keeps that.

    Raises:
        FormatError: a file is malformed, or tensors are missing or do not fit the metadata.
        UnsupportedError: an architecture, a type of blocks or a tensor that is not read.
        MismatchError: the config.json beside it is of another kind of model.
        InputError: there is no such file.
        MissingExtraError: the ``gguf`` package is not installed.
        AccessError: the system refused to read it.
    """
    with typed_os_errors(path):
        return _open(open_gguf(find_gguf(path)), dtype)


def _open(file: GgufFile, dtype: str) -> GgufBase:
    family = _family(file)
    modules = _modules(file, family)
    weights = _weights(file, family, modules, dtype)
    root = file.paths[0].parent
    beside = read_base_config(root / "config.json")
    if beside is not None:
        _check_beside(root / "config.json", beside, family)
    config = _made(file, family) if beside is None else beside
    config = _with_dtype(config, _main_dtype(weights), named=beside is None)
    return GgufBase(
        root=root,
        files=file.paths,
        architecture=file.architecture,
        types=tuple(sorted({tensor.type for tensor in file.tensors.values()})),
        config=config,
        config_is_made=beside is None,
        weights={weight.name: weight for weight in weights},
        unused=tuple(name for name in file.tensors if _is_unused(name)),
        warnings=tuple(_warnings(file, root, made=beside is None)),
    )


def _family(file: GgufFile) -> GgufFamily:
    family = FAMILIES.get(file.architecture)
    if family is None or file.of_architecture("expert_count"):
        why = "it is a mixture of experts, whose weights are stored stacked"
        if family is None:
            why = REFUSED.get(
                file.architecture, "it is not known how transformers names its tensors"
            )
        raise UnsupportedError(
            f"GGUF models of this architecture cannot be merged into: {why}",
            where=str(file.paths[0]),
            expected=", ".join(sorted(FAMILIES)),
            found=quoted(file.architecture),
            hint=_ANOTHER_BASE,
        )
    _check_counts(file, family)
    return family


def _check_counts(file: GgufFile, family: GgufFamily) -> None:
    """Refuse metadata that lacks a number, or has a list or text in its place."""
    problems = []
    for key in sorted({*family.config, *_COUNTS, "rope.dimension_count"}):
        value = file.of_architecture(key)
        needed = key in _COUNTS
        kinds = int if needed else int | float
        positive = isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf
        if not positive and (needed or value is not None):
            problems.append(Problem(
                "the metadata does not describe one kind of layer", str(file.paths[0]),
                f"{file.architecture}.{key}: a positive number", quoted(value), _ANOTHER_BASE,
            ))  # fmt: skip
    if not problems and _count(file, "block_count") > len(file.tensors):
        count = str(_count(file, "block_count"))
        problems = [_misfit(file, "block_count", "no more layers than tensors", count)]
    if problems:
        raise FormatError(capped(problems, file.paths[0]))


def _count(file: GgufFile, key: str) -> int:
    value = file.of_architecture(key)
    assert isinstance(value, int)
    return value


def _modules(file: GgufFile, family: GgufFamily) -> dict[str, str]:
    """Return transformers' names of modules by GGUF's; each one's weight is stored."""
    gguf = gguf_package()
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = _count(file, "block_count")
    table = gguf.get_tensor_name_map(by_name[file.architecture], layers)
    modules = huggingface_names(family, layers, table.get_name)
    missing = [
        _misfit(file, f"{name}.weight", "it in the file", "it in none")
        for name, module in modules.items()
        if f"{name}.weight" not in file.tensors and not is_optional(family, module)
    ]
    if missing:
        raise FormatError(capped(missing, file.paths[0]))
    return modules


def _misfit(file: GgufFile, name: str, expected: str, found: str) -> Problem:
    return Problem(
        "the file does not hold the model that its metadata describes",
        f"{file.paths[0]}, {quoted(name)}", expected, found, DOWNLOAD_AGAIN,
    )  # fmt: skip


def _weights(
    file: GgufFile, family: GgufFamily, modules: dict[str, str], dtype: str
) -> list[QuantizedWeight]:
    weights: list[QuantizedWeight] = []
    refused, problems = [], []
    for tensor in file.tensors.values():
        if _is_unused(tensor.name):
            continue
        module, kind = _split(tensor.name)
        if module not in modules or tensor.type not in TYPES or len(tensor.shape) not in (1, 2):
            refused.append(_refusal(tensor, known=module in modules))
            continue
        heads = _heads(file, module) if family.rearranged else 0
        if heads and tensor.shape[0] % (2 * heads):
            expected = f"rows of {heads} heads, each of an even size"
            problems.append(_misfit(file, tensor.name, expected, f"{tensor.shape[0]} rows"))
        added = 1.0 if family.centered and tensor.name.endswith("norm.weight") else 0.0
        decoder = GgufDecoder(tensor.type, heads, added)
        name, parts = f"{modules[module]}.{kind}", {"codes": tensor.stored}
        own = tensor.type if tensor.type in UNQUANTIZED else dtype
        weights.append(QuantizedWeight(name, tensor.shape, own, decoder, parts))
    if refused:
        raise UnsupportedError(capped(refused, file.paths[0]))
    if problems:
        raise FormatError(capped(problems, file.paths[0]))
    return weights


def _split(name: str) -> tuple[str, str]:
    """Return the module and the parameter of it that a tensor's name says."""
    module, _, kind = name.rpartition(".")
    return (module, kind) if kind in ("weight", "bias") else ("", kind)


def _heads(file: GgufFile, module: str) -> int:
    """Return in how many heads a module's rows were rearranged, 0 for none."""
    heads = _count(file, "attention.head_count")
    if module.endswith(".attn_q"):
        return heads
    if not module.endswith(".attn_k"):
        return 0
    groups = file.of_architecture("attention.head_count_kv")
    return groups if isinstance(groups, int) else heads


def _is_unused(name: str) -> bool:
    return _split(name)[0].rpartition(".")[2] in UNUSED


def _refusal(tensor: GgufTensor, *, known: bool) -> Problem:
    where = f"{tensor.stored.path}, tensor {quoted(tensor.name)}"
    if not known:
        what = "it is not known how transformers names this tensor"
        return Problem(what, where, "", str(tensor.shape), _ANOTHER_BASE)
    expected, found = f"a matrix or vector of {', '.join(TYPES)}", f"{tensor.type} {tensor.shape}"
    return Problem("this kind of tensor is not read", where, expected, found, _ANOTHER_BASE)


def _check_beside(path: Path, config: dict[str, Any], family: GgufFamily) -> None:
    if config.get("model_type") in (family.model_type, *family.also):
        return
    raise MismatchError(
        "the config.json beside the GGUF file is of another kind of model",
        where=str(path),
        expected=f"model_type {' or '.join([family.model_type, *sorted(family.also)])}",
        found=quoted(config.get("model_type")),
        hint="Move the file to a folder of its own to have one made from its metadata",
    )


def _main_dtype(weights: Iterable[QuantizedWeight]) -> str:
    """Return the dtype that most values have."""
    counts: dict[str, int] = {}
    for weight in weights:
        counts[weight.dtype] = counts.get(weight.dtype, 0) + math.prod(weight.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else DECODED


def _with_dtype(config: dict[str, Any], dtype: str, *, named: bool) -> dict[str, Any]:
    """Return a config whose dtype is that of the weights.

    The config of the model that a GGUF file was converted from names that model's dtype, to which
    transformers would round what the file holds.

    Args:
        config: the config.
        dtype: safetensors dtype of the weights.
        named: whether a config that names no dtype gets one.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"] * named
    return config | dict.fromkeys(keys, DTYPES[dtype].config_name)


def _made(file: GgufFile, family: GgufFamily) -> dict[str, Any]:
    """Return a config made from the metadata."""
    vocabulary = file.tensors["token_embd.weight"].shape[0]

    def token(key: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) else None

    return config_of(family, file.of_architecture, token, file.tensors, vocabulary)


def _warnings(file: GgufFile, root: Path, *, made: bool) -> Iterator[str]:
    scaling = file.of_architecture("rope.scaling.type")
    scaled = scaling not in (None, "none") or any(map(_is_unused, file.tensors))
    if made and scaled:
        yield (
            "the model scales its rotary embedding, which the config made from the GGUF file does "
            f"not say: long texts will go wrong; {_CONFIG_BESIDE}"
        )
    if not has_tokenizer(root):
        yield (
            "the tokenizer inside the GGUF file is not converted: copy that of the model it was "
            "converted from to the result, or make one with transformers: "
            f"AutoTokenizer.from_pretrained({str(root)!r}, gguf_file={file.paths[0].name!r})"
            ".save_pretrained(OUT)"
        )
