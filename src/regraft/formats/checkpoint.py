"""Checkpoints as sets of files: which tensors there are, and where.

What is opened here is known from headers alone, and checked as a whole: an index against its
shards. What the tensors mean is for others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regraft.errors import FormatError, InputError, Problem, UnsupportedError
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.hub import Located
from regraft.formats.layout import (
    ADAPTER_SAFE,
    DESCRIPTIONS,
    MLX_WEIGHTS,
    TORCH_SUFFIXES,
    is_gguf,
    is_mostly_lora,
    looks_like,
)
from regraft.formats.problems import DOWNLOAD_AGAIN, capped, quoted
from regraft.formats.safetensors import read_header
from regraft.formats.torch_zip import read_torch_file
from regraft.system.names import trouble_of_name
from regraft.tensors import TensorSpec

__all__ = [
    "Checkpoint",
    "Container",
    "Shard",
    "looks_like",
    "open_checkpoint",
    "read_base_config",
]

Container = Literal["safetensors", "torch", "gguf"]

CONFIG_BYTES = 8 * 2**20
_INDEX_BYTES = 32 * 2**20
_WEIGHT_FILES = (  # the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

INDEX_STEMS = ("model", "diffusion_pytorch_model")
"""What the name of an index of safetensors files may begin with, to be found by loaders."""

_SUFFIXES = (".safetensors", ".bin")
_LOOKED_FOR = "model.safetensors or pytorch_model.bin, or either with an index"
_ONE_OF_SEVERAL = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\.")


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint's weights.

    Attributes:
        path: the file.
        name: its file name.
        tensors: the names of its tensors, in order of offset.
        metadata: the strings its safetensors header carries; empty for PyTorch's files.
    """

    path: Path
    name: str
    tensors: tuple[str, ...]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A full model on disk.

    Attributes:
        root: its folder; for a lone weights file, the folder that holds it.
        source: what the user called it.
        revision: the Hub's commit hash, if it came from there.
        shards: its files in order of name.
        tensors: every tensor by name, in shard order and then order of offset.
        config: ``config.json``, or None where there is none.
        index_metadata: ``metadata`` of the index; None without an index or where it has none.
        container: which kind of files these are.
        single_file: whether a lone weights file was named rather than a folder.
    """

    root: Path
    source: str
    revision: str | None
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorSpec]
    config: dict[str, Any] | None
    index_metadata: dict[str, Any] | None
    container: Container
    single_file: bool


def open_checkpoint(located: Located) -> Checkpoint:
    """Open a full model: a folder, or a lone ``.safetensors`` or ``.bin`` file.

    Where a folder holds several kinds of weights the one that transformers would load is taken:
    ``model.safetensors``, its index, then ``pytorch_model.bin`` and its index. A folder with one
    ``.safetensors`` file of another name is taken too.

    Raises:
        FormatError: a file is malformed, or the index and its shards do not fit; lists all misfits.
        InputError: this is not a full model; the message says what it looks like.
        UnsupportedError: GGUF, or a kind of ``.bin`` that is refused.
        AccessError: the system refused to read a file.
    """
    with typed_os_errors(located.path):
        return _open_checkpoint(located)


def _open_checkpoint(located: Located) -> Checkpoint:
    single_file = not located.path.is_dir()
    root = located.path.parent if single_file else located.path
    config = read_base_config(root / "config.json")
    weights = _lone_file(located.path) if single_file else _find_weights(root, config)
    index_metadata = None
    names: Sequence[str] = [weights]
    weight_map = None
    if weights.endswith(".index.json"):
        weight_map, index_metadata = _read_index(root / weights)
        names = sorted(set(weight_map.values()))
    opened = _open_shards(root, names)
    if weight_map is not None:
        _check_index(root / weights, weight_map, [shard for shard, _ in opened])
    tensors = {name: spec for _, specs in opened for name, spec in specs.items()}
    _refuse_adapter_weights(located.path, tensors)
    return Checkpoint(
        root=root,
        source=located.source,
        revision=located.revision,
        shards=tuple(shard for shard, _ in opened),
        tensors=tensors,
        config=config,
        index_metadata=index_metadata,
        container=_container(names[0]),
        single_file=single_file,
    )


def read_base_config(path: Path) -> dict[str, Any] | None:
    """Return a base's ``config.json``, None where there is none.

    Raises:
        FormatError: it is malformed.
        AccessError: the system refused to read it.
    """
    if not path.exists():
        return None
    config = read_json_object(path, max_bytes=CONFIG_BYTES)
    labels = config.get("id2label")
    if labels is None or isinstance(labels, dict):
        return config
    raise FormatError(
        "id2label is malformed",
        where=str(path),
        expected="an object from numbers to labels",
        found=quoted(labels),
        hint=DOWNLOAD_AGAIN,
    )


def _container(name: str) -> Container:
    return "torch" if name.endswith(TORCH_SUFFIXES) else "safetensors"


def _lone_file(path: Path) -> str:
    """Return the name of a weights file that was named directly, or say why it will not do."""
    if is_gguf(path):
        raise _gguf_refused(path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise InputError(
            "is not a checkpoint",
            where=str(path),
            expected="a folder, or a .safetensors or .bin file",
            found=f"a {path.suffix or 'nameless'} file",
            hint="Give the folder that holds the weights",
        )
    if _ONE_OF_SEVERAL.search(path.name):
        raise InputError(
            "is one shard of several",
            where=str(path),
            expected="the whole checkpoint",
            hint=f"Give the folder: {path.parent}",
        )
    return path.name


def _gguf_refused(path: Path) -> UnsupportedError:
    return UnsupportedError(
        "a GGUF model can only be the base of a merge, or be dequantized",
        where=str(path),
        expected="safetensors or PyTorch weights",
        found="GGUF",
        hint="Dequantize it first: regraft dequantize MODEL.gguf -o OUT",
    )


def _find_weights(root: Path, config: dict[str, Any] | None) -> str:
    """Return the file name of the folder's weights or index."""
    explicit = (config or {}).get("transformers_weights")
    if explicit is not None:
        return _explicit_weights(root, explicit)
    names = {path.name for path in root.iterdir() if path.is_file()}
    for name in _WEIGHT_FILES:
        if name in names:
            return name
    names -= {ADAPTER_SAFE, MLX_WEIGHTS}
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if len(others) == 1 and not _ONE_OF_SEVERAL.search(others[0]):
        return others[0]
    raise _several_unindexed(root, others) if others else _not_a_checkpoint(root)


def _explicit_weights(root: Path, name: Any) -> str:
    """Return the weights file that a config names itself, as transformers 5 allows."""
    if _is_file_name(name, (*_SUFFIXES, *(f"{suffix}.index.json" for suffix in _SUFFIXES))):
        return str(name)
    raise FormatError(
        "transformers_weights does not name a weights file beside it",
        where=str(root / "config.json"),
        expected="a plain file name",
        found=quoted(name),
        hint=DOWNLOAD_AGAIN,
    )


def _several_unindexed(root: Path, names: list[str]) -> FormatError:
    shown = ", ".join(map(quoted, names[:3])) + (", ..." if len(names) > 3 else "")
    return FormatError(
        "weights files without an index",
        where=str(root),
        expected="one weights file, or model.safetensors.index.json",
        found=f"{len(names)}: {shown}",
        hint="Download the index too, or give one file by its path if it is the whole model",
    )


def _not_a_checkpoint(root: Path) -> InputError:
    looks = looks_like(root)
    if looks == "gguf":
        return _gguf_refused(root)
    hints: dict[str, str] = {
        "adapter": "Give it as ADAPTER; the base it wants is base_model_name_or_path in its config",
        "mlx-adapter": "Give the model the adapter was trained on as the base",
        "tokenizer": "Give the folder that holds the weights too",
    }
    hint = hints.get(looks, f"Check the path.{subfolder_hint(root, 'config.json')}")
    return InputError(
        "is not a checkpoint",
        where=str(root),
        expected=_LOOKED_FOR,
        found=DESCRIPTIONS[looks],
        hint=hint,
    )


def subfolder_hint(root: Path, wanted: str) -> str:
    """Return a sentence that names subfolders holding ``wanted``, or nothing."""
    names = sorted(quoted(path.parent.name) for path in root.glob(f"*/{wanted}"))
    return f" A subfolder holds {wanted}: {', '.join(names[:3])}" if names else ""


def _refuse_adapter_weights(path: Path, names: Iterable[str]) -> None:
    if is_mostly_lora(names):
        raise InputError(
            "is not a checkpoint",
            where=str(path),
            expected="the weights of a full model",
            found="LoRA factors",
            hint="Give it as ADAPTER, and the model it was trained on as BASE",
        )


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Return an index's weight map and metadata; every shard it names is a file beside it."""
    index = read_json_object(path, max_bytes=_INDEX_BYTES)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            "the index has no weight_map",
            where=str(path),
            expected="weight_map: an object from tensors to file names",
            found=", ".join(map(quoted, index)) or "an empty object",
            hint=DOWNLOAD_AGAIN,
        )
    problems = _shard_name_problems(path, weight_map)
    if problems:
        raise FormatError(capped(problems, path))
    return weight_map, metadata if isinstance(metadata, dict) else None


def _shard_name_problems(path: Path, weight_map: dict[str, Any]) -> list[Problem]:
    suffixes = tuple(suffix for suffix in _SUFFIXES if f"{suffix}.index" in path.name)
    first_use: dict[str, str] = {}
    for tensor, name in weight_map.items():
        first_use.setdefault(name if isinstance(name, str) else f"a {type(name).__name__}", tensor)
    problems = []
    for name, tensor in first_use.items():
        where = f"{path}, tensor {quoted(tensor)}"
        if not _is_file_name(weight_map[tensor], suffixes):
            what = "the index does not name a weights file beside it"
            expected = f"a plain file name that ends in {' or '.join(suffixes)}"
            problems.append(Problem(what, where, expected, quoted(name), DOWNLOAD_AGAIN))
        elif not (path.parent / name).is_file():
            what, expected = "a shard is missing", f"{quoted(name)} beside the index"
            problems.append(Problem(what, where, expected, hint="Download the missing file"))
    return problems


def _is_file_name(name: Any, suffixes: tuple[str, ...]) -> bool:
    """Return whether ``name`` is a file name and no path, and has one of the suffixes."""
    if not isinstance(name, str) or "/" in name or "\\" in name or not name.isprintable():
        return False
    return not (name.startswith(".") or trouble_of_name(name)) and name.endswith(suffixes)


def _open_shards(root: Path, names: Sequence[str]) -> list[tuple[Shard, dict[str, TensorSpec]]]:
    """Open every shard; the problems of all bad ones are raised together."""
    opened: list[tuple[Shard, dict[str, TensorSpec]]] = []
    problems: list[Problem] = []
    for name in names:
        try:
            specs, metadata = open_weights(root / name)
        except FormatError as error:
            problems += error.problems
        else:
            opened.append((Shard(root / name, name, tuple(specs), metadata), specs))
    if problems:
        raise FormatError(capped(problems, root))
    return opened


def open_weights(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    if _container(path.name) == "torch":
        return read_torch_file(path), {}
    header = read_header(path)
    return header.tensors, header.metadata


def _check_index(path: Path, weight_map: dict[str, str], shards: Sequence[Shard]) -> None:
    """Raise every tensor on which the index and the shards disagree."""
    problems = []
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            problems += _tensor_misfit(path, tensor, shard.name, weight_map.get(tensor), found)
            found[tensor] = shard.name
    for tensor in weight_map.keys() - found.keys():
        what, expected = "a tensor is missing", f"it in {quoted(weight_map[tensor])}"
        where = f"{path}, tensor {quoted(tensor)}"
        problems.append(Problem(what, where, expected, "it in no shard", DOWNLOAD_AGAIN))
    if problems:
        raise FormatError(capped(sorted(problems, key=lambda p: p.where), path))


def _tensor_misfit(
    path: Path, tensor: str, shard: str, mapped: str | None, found: dict[str, str]
) -> list[Problem]:
    if mapped == shard and tensor not in found:
        return []
    where, here = f"{path}, tensor {quoted(tensor)}", quoted(shard)
    hint = "Index and shards are of different versions: download all of them again"
    if tensor in found:
        both = f"{quoted(found[tensor])} and {here}"
        return [Problem("a tensor is in two shards", where, "it in one", both, hint)]
    if mapped is None:
        return [Problem("a tensor is not in the index", where, "every tensor", here, hint)]
    what = "a tensor is not in the shard the index names"
    return [Problem(what, where, quoted(mapped), here, hint)]
