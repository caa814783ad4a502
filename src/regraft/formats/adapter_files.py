"""Adapters as sets of files: PEFT's layout, and where an adapter lies below the folder named.

What is opened here is known from headers alone. What the tensors mean is for others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft.errors import InputError, UnsupportedError
from regraft.formats import foreign
from regraft.formats.checkpoint import CONFIG_BYTES, open_weights, subfolder_hint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.files.watching import Stamp
from regraft.formats.foreign import Layout
from regraft.formats.hub import Located
from regraft.formats.layout import (
    ADAPTER_CONFIG,
    ADAPTER_SAFE,
    ADAPTER_TORCH,
    DESCRIPTIONS,
    MLX_WEIGHTS,
    NEW_EMBEDDINGS,
    looks_like,
)
from regraft.formats.problems import quoted
from regraft.tensors import TensorSpec

_OF_ITS_OWN = (ADAPTER_CONFIG, ADAPTER_SAFE, ADAPTER_TORCH, "config.json", MLX_WEIGHTS)
"""Files that show a folder to be what was meant, whatever lies below."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
        dialect: what it was written in, such as ``"mlx"``; these files are in PEFT's format.
        origin: the folder or file in that dialect; None where it was PEFT's.
        needs_base: why the base is needed to read it, where it was described without.
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
    dialect: str = "peft"
    origin: Path | None = None
    needs_base: str = ""

    @property
    def weights_shown(self) -> str:
        """How messages name its weights."""
        if self.origin is not None:
            return self.source
        return f"{self._folder_shown}/{self.weights_file}"

    @property
    def config_shown(self) -> str:
        """How messages name its config."""
        if self.origin is not None:
            return self.source
        return f"{self._folder_shown}/{ADAPTER_CONFIG}"

    @property
    def _folder_shown(self) -> str:
        """The source, less the weights file if that was named."""
        return self.source.removesuffix(f"/{self.weights_file}").rstrip("/") or "/"


def open_adapter(located: Located) -> AdapterFiles:
    """Open an adapter: a folder in PEFT's layout, or the weights file in it.

    Raises:
        FormatError: a file is malformed.
        InputError: config or weights are missing, two weights files contradict each other, or
            this is not an adapter; the message says what it looks like.
        UnsupportedError: an adapter in another layout; says which.
        AccessError: the system refused to read a file.
    """
    with typed_os_errors(located.path):
        return _open_adapter(located)


def _open_adapter(located: Located) -> AdapterFiles:
    located, notes = adapter_folder(located)
    named_file = not located.path.is_dir()
    root = located.path.parent if named_file else located.path
    on_hub = located.repo_id is not None
    refuse_new_embeddings(root)
    if found := layout_of(located):
        raise foreign.refusal(*found, located.path)
    if on_hub and located.path.is_dir():
        _refuse_top_of_repository(located)
    _refuse_other_kinds(located.path, root, on_hub=on_hub)
    weights = located.path if named_file else _adapter_weights(root, same_age=on_hub)
    config = _adapter_config(root)
    tensors, metadata = open_weights(weights)
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


def layout_of(located: Located) -> tuple[Layout, str] | None:
    """Return the layout of an adapter that is not PEFT's, and the name that shows it.

    None for PEFT's, for what is no adapter, and for what nobody knows. Where files have PEFT's
    names, :func:`regraft.formats.foreign.of_tensors` tells by what is in them.

    Raises:
        AccessError: the system refused to look.
    """
    path = located.path
    with typed_os_errors(path):
        root = path if path.is_dir() else path.parent
        if (root / ADAPTER_CONFIG).is_file() and _has_adapter_weights(path):
            return None
        if found := foreign.of_path(path):
            return found
        return (foreign.MLX, MLX_WEIGHTS) if looks_like(path) == "mlx-adapter" else None


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


def refuse_new_embeddings(root: Path) -> None:
    """Raise where rows of added tokens lie beside an adapter.

    Raises:
        UnsupportedError: they do.
    """
    if (root / NEW_EMBEDDINGS).is_file():
        raise UnsupportedError(
            "the adapter has rows of added tokens in a file of their own, which regraft does not "
            "read", where=str(root / NEW_EMBEDDINGS), expected="an adapter that has its embeddings "
            "in adapter_model.safetensors", hint="Save it with PEFT and the embeddings in "
            "modules_to_save, or move the file away if the added tokens do not matter",
        )  # fmt: skip


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
            hint=f"Give the adapter's folder.{subfolder_hint(path, ADAPTER_CONFIG)}".removesuffix(
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
    subfolders = "" if has_config else subfolder_hint(root, ADAPTER_CONFIG)
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
        return read_json_object(path, max_bytes=CONFIG_BYTES)
    raise InputError(
        f"{ADAPTER_CONFIG} is missing",
        where=str(root),
        expected=f"{ADAPTER_CONFIG} beside the weights, in PEFT's format",
        hint="PEFT saves it where the adapter was trained; rank and scale stand in it",
    )
