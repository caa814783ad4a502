"""Checkpoints and adapters as sets of files: which tensors there are, and where.

What is opened here is known from headers alone, and checked as a whole: an index against its
shards, an adapter's weights against its config's presence. What the tensors mean is for others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from regraft.errors import FormatError, InputError, Problem, UnsupportedError
from regraft.formats import foreign
from regraft.formats.hub import Located
from regraft.formats.json_file import read_json_object
from regraft.formats.layout import (
    ADAPTER_CONFIG,
    ADAPTER_SAFE,
    ADAPTER_TORCH,
    DESCRIPTIONS,
    MLX_WEIGHTS,
    NEW_EMBEDDINGS,
    TORCH_SUFFIXES,
    is_gguf,
    is_mostly_lora,
    looks_like,
)
from regraft.formats.problems import DOWNLOAD_AGAIN, capped, quoted
from regraft.formats.reading import typed_os_errors
from regraft.formats.safetensors import read_header
from regraft.formats.torch_zip import read_torch_file
from regraft.formats.watching import Stamp
from regraft.tensors import TensorSpec

__all__ = [
    "AdapterFiles",
    "Checkpoint",
    "Container",
    "Shard",
    "looks_like",
    "open_adapter",
    "open_checkpoint",
    "read_base_config",
]

Container = Literal["safetensors", "torch", "gguf"]

_CONFIG_BYTES = 8 * 2**20
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
_OF_ITS_OWN = (ADAPTER_CONFIG, ADAPTER_SAFE, ADAPTER_TORCH, "config.json", MLX_WEIGHTS)
"""Files that show a folder to be what was meant, whatever lies below."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
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


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk, as files; its dialect has not been looked at.

    Attributes:
        root: its folder.
        source: what the user called it.
        revision: the Hub's commit hash, if it came from there.
        config: ``adapter_config.json``.
        tensors: every tensor by the name it has in the file, in order of offset.
        weights_file: the file name of the weights.
        metadata: the strings the safetensors header carries; empty for PyTorch's files.
        notes: what the user should know of how it was found.
        seen: what the weights file was when it was opened, where it is to be read much later.
    """

    root: Path
    source: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    weights_file: str
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()
    seen: Stamp | None = None

    @property
    def weights_shown(self) -> str:
        """How messages name its weights."""
        return f"{self._folder_shown}/{self.weights_file}"

    @property
    def config_shown(self) -> str:
        """How messages name its config."""
        return f"{self._folder_shown}/{ADAPTER_CONFIG}"

    @property
    def _folder_shown(self) -> str:
        """The source, less the weights file if that was named."""
        return self.source.removesuffix(f"/{self.weights_file}").rstrip("/") or "/"


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
    config = read_json_object(path, max_bytes=_CONFIG_BYTES)
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
    hint = hints.get(looks, f"Check the path.{_subfolder_hint(root, 'config.json')}")
    return InputError(
        "is not a checkpoint",
        where=str(root),
        expected=_LOOKED_FOR,
        found=DESCRIPTIONS[looks],
        hint=hint,
    )


def _subfolder_hint(root: Path, wanted: str) -> str:
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
    return not name.startswith(".") and name.endswith(suffixes)


def _open_shards(root: Path, names: Sequence[str]) -> list[tuple[Shard, dict[str, TensorSpec]]]:
    """Open every shard; the problems of all bad ones are raised together."""
    opened: list[tuple[Shard, dict[str, TensorSpec]]] = []
    problems: list[Problem] = []
    for name in names:
        try:
            specs, metadata = _open_weights(root / name)
        except FormatError as error:
            problems += error.problems
        else:
            opened.append((Shard(root / name, name, tuple(specs), metadata), specs))
    if problems:
        raise FormatError(capped(problems, root))
    return opened


def _open_weights(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
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
    where, here = f"{path}, tensor {quoted(tensor)}", quoted(shard)
    hint = "Index and shards are of different versions: download all of them again"
    if tensor in found:
        both = f"{quoted(found[tensor])} and {here}"
        return [Problem("a tensor is in two shards", where, "it in one", both, hint)]
    if mapped is None:
        return [Problem("a tensor is not in the index", where, "every tensor", here, hint)]
    if mapped != shard:
        what = "a tensor is not in the shard the index names"
        return [Problem(what, where, quoted(mapped), here, hint)]
    return []


def open_adapter(located: Located) -> AdapterFiles:
    """Open an adapter: a folder in PEFT's layout, or the weights file in it.

    Raises:
        FormatError: a file is malformed.
        InputError: config or weights are missing, two weights files contradict each other, or
            this is not an adapter; the message says what it looks like.
        UnsupportedError: an MLX adapter.
        AccessError: the system refused to read a file.
    """
    with typed_os_errors(located.path):
        return _open_adapter(located)


def _open_adapter(located: Located) -> AdapterFiles:
    located, notes = adapter_folder(located)
    named_file = not located.path.is_dir()
    root = located.path.parent if named_file else located.path
    on_hub = located.repo_id is not None
    whole = (root / ADAPTER_CONFIG).is_file() and _has_adapter_weights(located.path)
    if not whole or (root / NEW_EMBEDDINGS).is_file():
        refuse_foreign(located.path)
    if on_hub and located.path.is_dir():
        _refuse_top_of_repository(located)
    _refuse_other_kinds(located.path, root, on_hub=on_hub)
    weights = located.path if named_file else _adapter_weights(root, same_age=on_hub)
    config = _adapter_config(root)
    tensors, metadata = _open_weights(weights)
    return AdapterFiles(
        root=root,
        source=located.source,
        revision=located.revision,
        config=config,
        tensors=tensors,
        weights_file=weights.name,
        metadata=metadata,
        notes=notes,
    )


def adapter_folder(located: Located) -> tuple[Located, tuple[str, ...]]:
    """Return where an adapter lies, and what to say where that is a folder below the one named.

    A run's folder has its adapters in folders of their own, and PEFT saves one called ``sql`` in
    ``sql/``. Of several checkpoints the one with the highest step is taken.

    Raises:
        InputError: several folders below hold an adapter, and nothing tells which one is meant.
        AccessError: the system refused to look into one.
    """
    with typed_os_errors(located.path):
        below = _adapters_below(located.path)
    if not below:
        return located, ()
    numbered = {name: int(match[1]) for name in below if (match := _CHECKPOINT.fullmatch(name))}
    if len(below) > 1 and len(numbered) < len(below):
        shown = ", ".join(map(quoted, below[:8])) + (", ..." if len(below) > 8 else "")
        raise InputError(
            "holds several adapters, each in a folder of its own",
            where=str(located.path),
            expected="one adapter",
            found=shown,
            hint=f"Name the one you mean, such as {located.source.rstrip('/')}/{below[0]}",
        )
    chosen = max(numbered, key=lambda name: numbered[name]) if len(below) > 1 else below[0]
    source = f"{located.source.rstrip('/')}/{chosen}"
    newest = f", the newest of {len(below)} checkpoints" if len(below) > 1 else ""
    note = f"{located.source}: the adapter in {chosen} is taken{newest}"
    return replace(located, path=located.path / chosen, source=source), (note,)


def _adapters_below(path: Path) -> list[str]:
    """Return the names of the folders in a folder that hold an adapter, unless it does itself."""
    if not path.is_dir() or any((path / name).exists() for name in _OF_ITS_OWN):
        return []
    found = path.glob(f"*/{ADAPTER_CONFIG}")
    return sorted(each.parent.name for each in found if _has_adapter_weights(each.parent))


def _has_adapter_weights(path: Path) -> bool:
    if not path.is_dir():
        return path.name in (ADAPTER_SAFE, ADAPTER_TORCH)
    return any((path / name).is_file() for name in (ADAPTER_SAFE, ADAPTER_TORCH))


_NO_WEIGHTS = (".json", ".md", ".txt", ".jinja", ".model")
"""Endings of files that lie beside an adapter's weights."""


def refuse_foreign(path: Path) -> None:
    """Raise where a folder or file is an adapter in another layout than PEFT's.

    Raises:
        UnsupportedError: it is; says which layout.
    """
    if (path / NEW_EMBEDDINGS).is_file():
        raise UnsupportedError(
            "the adapter has rows of added tokens in a file of their own, which regraft does not "
            "read", where=str(path / NEW_EMBEDDINGS), expected="an adapter that has its embeddings "
            "in adapter_model.safetensors", hint="Save it with PEFT and the embeddings in "
            "modules_to_save, or move the file away if the added tokens do not matter",
        )  # fmt: skip
    if found := foreign.of_path(path):
        raise foreign.refusal(*found, path)


def _refuse_top_of_repository(located: Located) -> None:
    """Raise where a repository, or a folder of it, has adapters in folders below alone.

    Of these the configs were fetched, and no weights.
    """
    if (located.path / ADAPTER_CONFIG).exists():
        return
    below = sorted(each.parent.name for each in located.path.glob(f"*/{ADAPTER_CONFIG}"))
    if below:
        top, at, revision = located.source.partition("@")
        raise InputError(
            "is not an adapter: its adapters lie in folders below", where=located.source,
            expected=ADAPTER_CONFIG, found=", ".join(map(quoted, below[:8])),
            hint=f"Name the one you mean, such as {top.rstrip('/')}/{below[0]}{at}{revision}",
        )  # fmt: skip


def _refuse_other_kinds(path: Path, root: Path, *, on_hub: bool) -> None:
    """Raise where ``path`` is plainly something other than a PEFT adapter."""
    looks = looks_like(path)
    if looks == "mlx-adapter":
        raise foreign.refusal(foreign.MLX, MLX_WEIGHTS, path)
    if path.is_file() and path.suffix in _NO_WEIGHTS:
        raise InputError(
            "is not the weights file of an adapter", where=str(path), found=f"a {path.suffix} file",
            expected=f"{ADAPTER_SAFE}, or its folder", hint=f"Give the folder: {root}",
        )  # fmt: skip
    if (root / ADAPTER_CONFIG).is_file():
        return
    if on_hub and (root / "config.json").is_file():  # a model's weights were not fetched
        looks = "checkpoint"
    if looks in ("checkpoint", "merged", "gguf", "empty", "tokenizer"):
        raise InputError(
            "is not an adapter",
            where=str(path),
            expected=f"{ADAPTER_CONFIG} and {ADAPTER_SAFE}",
            found=DESCRIPTIONS[looks],
            hint=f"Give the adapter's folder.{_subfolder_hint(path, ADAPTER_CONFIG)}".removesuffix(
                "."
            ),
        )


def _adapter_weights(root: Path, *, same_age: bool) -> Path:
    """Return the weights file of an adapter's folder.

    A ``.bin`` that is newer than the safetensors beside it makes it unclear which one is meant.
    With ``same_age`` times say nothing: the Hub's cache has them from the download.
    """
    safe, torch = root / ADAPTER_SAFE, root / ADAPTER_TORCH
    if not safe.is_file():
        if not torch.is_file():
            raise _no_adapter_weights(root)
        return torch
    if same_age or not torch.is_file() or torch.stat().st_mtime <= safe.stat().st_mtime:
        return safe
    raise InputError(
        "two weights files contradict each other",
        where=str(root),
        expected=f"{ADAPTER_SAFE}, or {ADAPTER_TORCH}",
        found=f"both, and {ADAPTER_TORCH} is the newer one",
        hint="Delete the one that is out of date",
    )


def _no_adapter_weights(root: Path) -> InputError:
    has_config = (root / ADAPTER_CONFIG).is_file()
    seen = DESCRIPTIONS[looks_like(root)]
    other_layout = "LoRA weights in a layout that is not PEFT's"
    found = other_layout if seen == "an adapter" else seen
    found = f"{ADAPTER_CONFIG} alone" if has_config else found
    subfolders = "" if has_config else _subfolder_hint(root, ADAPTER_CONFIG)
    return InputError(
        "the adapter's weights are missing" if has_config else "is not an adapter",
        where=str(root),
        expected=f"{ADAPTER_SAFE} or {ADAPTER_TORCH}",
        found=found,
        hint=(
            f"Check the path, and that the training run saved the adapter.{subfolders}"
        ).removesuffix("."),
    )


def _adapter_config(root: Path) -> dict[str, Any]:
    path = root / ADAPTER_CONFIG
    if path.is_file():
        return read_json_object(path, max_bytes=_CONFIG_BYTES)
    raise InputError(
        f"{ADAPTER_CONFIG} is missing",
        where=str(root),
        expected=f"{ADAPTER_CONFIG} beside the weights, in PEFT's format",
        hint="PEFT saves it where the adapter was trained; rank and scale stand in it",
    )
