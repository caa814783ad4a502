"""``undo.json``: the list of what a merged model keeps of its base, read and checked.

``OUT/regraft/undo/`` holds ``undo.json``, the patch, the base's config, index and other side files
under ``base/``, and the adapters. Reading this needs none of the compiled kernels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from regraft.errors import FormatError, InputError, MismatchError
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import open_regular, typed_os_errors
from regraft.formats.layout import RECEIPT, receipt_path, records_of
from regraft.formats.problems import quoted
from regraft.merging.files.receipt import Receipt, file_key
from regraft.merging.files.side_files import TEMPLATES, travels
from regraft.system.names import trouble_of_name

UNDO = "regraft/undo"
"""Where an output keeps what an undo needs."""

MANIFEST, PATCH, SIDE_FILES = "undo.json", "patch.safetensors", "base"
UNDO_FORMAT = 3
"""The newest layout; each one's readers know those before it. From 2 on codes that lie transposed
are told from values, too, and 3 is that of outputs that are one GGUF file; what needs no such thing
is written in layout 1."""

IN_GGUF = 3
"""The layout of the undo of an output that is one GGUF file."""

_READ_BYTES = 2**20
_MOST_GAP_BYTES = 512 * 2**20
_PATCH_FILES = 64 * 2**20


@dataclass(frozen=True)
class WeightFile:
    """A weights file of the base.

    Attributes:
        name: its name.
        size: its bytes.
        gaps: offset and length of what is no tensor, in order.
        blake3: of those bytes, one after the other.
        kept: of a GGUF file how many bytes are kept of them, see
            :mod:`regraft.merging.undo.gguf_head`; None where all are.
    """

    name: str
    size: int
    gaps: tuple[tuple[int, int], ...]
    blake3: str
    kept: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what ``undo.json`` says of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class SideFile:
    """Another file of the base.

    Attributes:
        name: its path in the folder, parts divided by ``/``.
        blake3: of its bytes.
        kept: whether it is kept; else the output has the same file.
    """

    name: str
    blake3: str
    kept: bool


@dataclass(frozen=True)
class Manifest:
    """``undo.json``.

    Attributes:
        plan: digest of what the merge did.
        single_file: name of the base's only file, if it was named rather than a folder.
        files: the base's weight files.
        side_files: its other files.
        left_out: files of its folder that are not kept.
        adapters: names of the folders that hold the adapters, None for one that is not kept.
        format: version of the layout.
    """

    plan: str
    single_file: str | None
    files: tuple[WeightFile, ...]
    side_files: tuple[SideFile, ...]
    left_out: tuple[str, ...]
    adapters: tuple[str | None, ...]
    format: int = UNDO_FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return ``undo.json``."""
        return asdict(self) | {"files": [file.to_json() for file in self.files]}


def belongs(name: str) -> bool:
    """Whether a file is one of a model's: nobody wants to publish notes and logs with a merge."""
    own = name == "config.json" or name.endswith((".index.json", ".md")) or name == ".gitattributes"
    return own or travels(name, code=True)


def undo_of(merged: Path) -> Path:
    """Return where a merged model keeps what an undo needs; of a GGUF file beside it."""
    return records_of(merged) / Path(UNDO).name


def check_undo(folder: Path, digests: Mapping[str, str]) -> None:
    """Hold the files of an undo against the receipt, but for the patch.

    What the patch restores is held against it tensor by tensor. What is gone is told by whoever
    needs it: adapters can be given instead.

    Args:
        folder: the merged model, a folder or a GGUF file.
        digests: blake3 (hex) of its files besides weights, as the receipt has them.

    Raises:
        MismatchError: files have been changed or added since the merge; lists them.
        AccessError: one cannot be read.
    """
    root = undo_of(folder)
    told = {name: digest for name, digest in digests.items() if name.startswith(f"{UNDO}/")}
    with typed_os_errors(root):
        there = {
            file_key(f"{UNDO}/{path.relative_to(root).as_posix()}"): path
            for path in root.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
    names = sorted(there.keys() - {f"{UNDO}/{PATCH}"})
    other = [name for name in names if not _is_as_told(there[name], told.get(name))]
    if other:
        shown = ", ".join(map(quoted, other[:4])) + (", ..." if len(other) > 4 else "")
        raise MismatchError(
            "what is kept for the undo is not what the merge wrote", where=str(folder),
            expected="the files that the receipt has digests of", found=f"other ones: {shown}",
            hint="Take the merged model from where it was unchanged; regraft verify lists all",
        )  # fmt: skip


def _is_as_told(path: Path, digest: str | None) -> bool:
    if digest is None:
        return False
    whole = blake3()
    with os.fdopen(open_regular(path), "rb") as file:
        while piece := file.read(_READ_BYTES):
            whole.update(piece)
    return whole.hexdigest() == digest


def check_kept(folder: Path) -> None:
    """Refuse a folder, or a GGUF file, that keeps nothing for an undo.

    Raises:
        InputError: it does not.
    """
    path = undo_of(folder) / MANIFEST
    in_folder = folder.is_dir()
    where = "its regraft/ subfolder" if in_folder else f"{records_of(folder).name}/ beside it"
    if not receipt_path(folder).is_file() and not path.is_file():
        raise InputError(
            "is no model that regraft merged", where=str(folder),
            expected=f"{RECEIPT} and {UNDO}/" if in_folder else where,
            hint=f"A plain base takes adapters with regraft merge; fetch a merged one with {where}",
        )  # fmt: skip
    if not path.is_file():
        raise InputError(
            "cannot be un-merged: it keeps no undo patch", where=str(folder),
            expected=f"{UNDO}/" if in_folder else f"undo/ in {where}",
            hint="Merge with --undo, which is the default unless weights are put into another "
            f"quantized format; or fetch it with {where}",
        )  # fmt: skip


def read_manifest(folder: Path, receipt: Receipt) -> Manifest:
    """Return what a merged model keeps of its base.

    Args:
        folder: the merged model.
        receipt: the merge's.

    Raises:
        InputError: it keeps nothing, or other adapters than the receipt has.
        FormatError: ``undo.json`` is not what regraft writes.
    """
    check_kept(folder)
    path = undo_of(folder) / MANIFEST
    value = read_json_object(path, max_bytes=_PATCH_FILES)
    try:
        manifest = _manifest(value)
        _check_layout(manifest, in_gguf=not folder.is_dir())
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            "the undo manifest cannot be read", where=str(path),
            expected=f"layout 1 to {UNDO_FORMAT}, as regraft writes it", found=str(error),
            hint="Take the merged model from where it was unchanged",
        ) from None  # fmt: skip
    if len(manifest.adapters) != len(receipt.adapters):
        raise InputError(
            "manifest and receipt name different numbers of adapters", where=str(folder),
            expected=str(len(receipt.adapters)), found=str(len(manifest.adapters)),
            hint="Take the merged model from where it was unchanged",
        )  # fmt: skip
    return manifest


def _manifest(value: dict[str, Any]) -> Manifest:
    layout = value["format"]
    if type(layout) is not int or not 1 <= layout <= UNDO_FORMAT:
        raise ValueError(f"layout {layout!r}")
    files = tuple(
        WeightFile(
            _plain(f["name"]), size, _gaps(f["gaps"], size), str(f["blake3"]), _kept(f.get("kept"))
        )
        for f in value["files"]
        for size in (_count(f["size"]),)
    )
    side = tuple(
        SideFile(_side_name(f["name"]), str(f["blake3"]), f["kept"] is True)
        for f in value["side_files"]
    )
    adapters = tuple(None if name is None else _plain(name) for name in value["adapters"])
    single = value["single_file"]
    left_out = tuple(str(name) for name in value["left_out"])
    return Manifest(
        str(value["plan"]), None if single is None else _plain(single), files, side, left_out,
        adapters, layout,
    )  # fmt: skip


def _check_layout(manifest: Manifest, *, in_gguf: bool) -> None:
    """Hold a manifest against the kind of output that it lies beside.

    Raises:
        ValueError: it is of the other kind.
    """
    lengths = [file.kept for file in manifest.files]
    if (manifest.format == IN_GGUF) != in_gguf or any((n is not None) != in_gguf for n in lengths):
        raise ValueError(f"layout {manifest.format}, of an output of another kind")


def _plain(name: Any) -> str:
    """Return a file name that stays in its folder.

    Raises:
        ValueError: it would not.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"the file name {quoted(name)}")
    if trouble_of_name(name):  # on Windows a name with a colon leads to elsewhere
        raise ValueError(f"the file name {quoted(name)}")
    return name


def _side_name(name: Any) -> str:
    """Return the name of a file that a merge keeps: one of a model's, or a chat template.

    Raises:
        ValueError: no merge keeps such a file.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    template = len(parts) == 2 and parts[0] == TEMPLATES and parts[1].endswith(".jinja")
    if not (template or len(parts) == 1) or not belongs(parts[-1]):
        raise ValueError(f"the file name {quoted(name)}")
    return "/".join(map(_plain, parts))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"the number {quoted(value)}")
    return value


def _kept(value: Any) -> int | None:
    if value is None:
        return None
    if _count(value) > _MOST_GAP_BYTES:
        raise ValueError("more than 512 MiB besides tensors")
    return _count(value)


def _gaps(value: Any, size: int) -> tuple[tuple[int, int], ...]:
    gaps = tuple((_count(start), _count(length)) for start, length in value)
    at = 0
    for start, length in gaps:
        if start < at or start + length > size:
            raise ValueError("gaps that overlap or lie outside of the file")
        at = start + length
    if sum(length for _, length in gaps) > _MOST_GAP_BYTES:
        raise ValueError("more than 512 MiB besides tensors")
    return gaps
