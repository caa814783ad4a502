"""An adapter's folder, written so that whoever looks sees the old adapter or the new one.

Everything is written and flushed in a work folder first, ``.NAME.saving`` beside the adapter's.
Then it comes into place:

- where nothing is, by one rename of the folder;
- where the adapter there has the same config, as it has from one save of a training to the next,
  by one rename of the weights; the card and the tokenizer follow;
- where the config changes too, the folder changes places with one that holds the new files and
  links to all others, in one step (Linux's ``RENAME_EXCHANGE``).

A process that is killed so leaves the old adapter or the new one, whole, and at most a work folder
that the next save removes. Where folders cannot be swapped (one that is a mount point or the
process's own current folder, a parent that may not be written, a file system without hard links)
the old config is removed first and the new one comes last: a kill between the two leaves weights
without a config, which no program loads, and never a mix.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regraft.adapters.lora_config import as_json
from regraft.adapters.wrappers import PREFIX
from regraft.errors import (
    AdapterError,
    BusyError,
    Problem,
    RegraftError,
    UsageError,
)
from regraft.formats.files.inside import file_pieces, head_of
from regraft.formats.layout import ADAPTER_CONFIG, ADAPTER_SAFE, ADAPTER_TORCH
from regraft.formats.problems import capped
from regraft.formats.safetensors import build_header
from regraft.merging.files.direct_io import write_error
from regraft.merging.files.ownership import check_own, check_place, make_private
from regraft.merging.files.publish import out_path, write_file, write_pieces
from regraft.merging.files.side_files import CARD
from regraft.merging.options import parse_dtype
from regraft.runtime.model.live_base import dtype_name, spec_of, torch_dtype_of
from regraft.system.folder_paths import path_of_utf8
from regraft.system.locks import OpenFolder, is_lock, remove_all
from regraft.system.renaming import can_exchange, exchange_at_once
from regraft.system.syncing import sync_folder, sync_path
from regraft.tensors import DTYPES, WORKING_DTYPES, TensorSpec, nbytes_of

_CARD_BYTES = 2**20
"""Of a card, where the marks of a program's stand; what is larger, a person wrote."""

_PIECE = 2**24
_TRIES = 20
_IN_PLACE_ONLY = (errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOTSUP)
_MAGNITUDE = "lora_magnitude_vector"
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_ELSEWHERE = "save to another folder"


def write_adapter(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    card: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write an adapter in PEFT's format, whole or not at all; the module says what a kill leaves.

    The same input gives the same bytes. An adapter in the folder is replaced, a left-over
    ``adapter_model.bin`` removed; all other files stay. A model card that somebody wrote stays
    too, unless it is one that regraft or PEFT makes.

    Args:
        folder: made if it is not there.
        config: for ``adapter_config.json``; ``inference_mode`` becomes true, as PEFT has it.
        tensors: by the key that PEFT's file has; on any device.
        metadata: strings for the file's header, besides PEFT's ``format``.
        card: the text of ``README.md``; None for none.
        dtype: what factors are stored in, by torch's name; their own if None. DoRA's magnitudes
            stay, because all of the weight is multiplied by them; other tensors are rounded to it
            only if they are wider.
        tokenizer: saved along, by its ``save_pretrained``.

    Returns:
        The folder.

    Raises:
        AdapterError: a tensor is empty, of a dtype that adapters do not have, or holds NaN or
            infinity, or would in ``dtype``. Nothing is written.
        UsageError: the folder is a file, or ``dtype`` is none that can be written.
        BusyError: another process is saving to the same folder.
        AccessError, DiskSpaceError: the system refused.
    """
    stored = {spec.name: spec.dtype for spec in stored_specs(tensors, dtype)}
    _check_tensors(tensors, stored, str(folder))
    place = out_path(folder).resolve()
    if place.exists() and not place.is_dir():
        raise UsageError("the folder to save to is a file", where=str(folder))
    try:
        with _work_folder(place) as (work, movable):
            new = work / "new"
            new.mkdir()
            write_file(new / ADAPTER_CONFIG, config_bytes(config))
            header = {"format": "pt", **(metadata or {})}
            write_pieces(new / ADAPTER_SAFE, _content(tensors, stored, header))
            if card is not None and _may_replace_card(place / CARD):
                write_file(new / CARD, card.encode())
            if tokenizer is not None:
                _save_tokenizer(tokenizer, new)
            sync_folder(new)
            _put_in_place(new, place, movable)
    except OSError as error:
        raise write_error(place, error) from error
    return out_path(folder)


# -- content ---------------------------------------------------------------------------------------


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return ``adapter_config.json`` as PEFT writes it: sorted keys, two spaces, no final newline.

    Sets become sorted lists, so that the bytes do not depend on their order.
    """
    plain = {**as_json(config), "inference_mode": True}
    return json.dumps(plain, indent=2, sort_keys=True, default=_refuse_value).encode()


def _refuse_value(value: object) -> Any:
    raise UsageError(
        "the adapter's config holds a value that JSON cannot", found=type(value).__name__
    )


def stored_specs(
    tensors: Mapping[str, torch.Tensor], dtype: str | torch.dtype | None
) -> list[TensorSpec]:
    """Return what tensors will be in the file, if ``dtype`` is chosen.

    Raises:
        UsageError: the dtype is none that can be written.
    """
    chosen = parse_dtype(str(dtype) if dtype is not None else None)
    found = []
    for key, tensor in tensors.items():
        spec = spec_of(key, tensor.shape, tensor.dtype)
        stored = _stored_dtype(key, tensor, chosen)
        known = stored in WORKING_DTYPES
        size = nbytes_of(stored, spec.shape) if known else spec.nbytes
        found.append(replace(spec, dtype=stored, nbytes=size))
    return found


def _stored_dtype(key: str, tensor: torch.Tensor, chosen: str | None) -> str:
    own = dtype_name(tensor.dtype)
    if chosen is None or own not in WORKING_DTYPES or _MAGNITUDE in key:
        return own
    is_factor = any(part in _FACTORS for part in key.removeprefix(PREFIX).split("."))
    return chosen if is_factor or DTYPES[own].bits > DTYPES[chosen].bits else own


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], stored: Mapping[str, str], where: str
) -> None:
    """Refuse tensors that no program could use; every one is looked at.

    Raises:
        AdapterError: as :func:`write_adapter` says.
    """
    if not tensors:
        raise AdapterError("the adapter holds no tensors", where=where)
    found = (_trouble(key, tensor, stored[key], where) for key, tensor in tensors.items())
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise AdapterError(capped(problems, Path(where)))


def _trouble(key: str, tensor: torch.Tensor, stored: str, where: str) -> Problem | None:
    label = f"{where}: {key}"
    if stored not in WORKING_DTYPES:
        return Problem("has a dtype that adapters do not have", label,
                       " or ".join(WORKING_DTYPES), str(tensor.dtype))  # fmt: skip
    if tensor.is_meta:
        return Problem("has no values: it is on the meta device", label,
                       hint="Load the adapter's weights before saving it")  # fmt: skip
    if tensor.numel() == 0:
        return Problem("is empty", label, found=str(tuple(tensor.shape)),
                       hint="Sharded training (ZeRO-3, FSDP) has to gather the weights before "
                       "saving")  # fmt: skip
    bad = _not_finite(tensor)
    if bad:
        return Problem("holds values that are not finite", label, "finite numbers",
                       f"{bad} NaN or infinite", "Training diverged; nothing was saved"
                       )  # fmt: skip
    lost = _not_finite(_as(tensor, stored)) if dtype_name(tensor.dtype) != stored else 0
    if lost:
        return Problem(f"does not fit {DTYPES[stored].config_name}: values would become infinite",
                       label, found=f"{lost} that are too large",
                       hint="Give another dtype: bfloat16 has the range of float32")  # fmt: skip
    return None


def _not_finite(tensor: torch.Tensor) -> int:
    return int(tensor.numel() - torch.isfinite(tensor.detach()).sum().item())


def _as(tensor: torch.Tensor, stored: str) -> torch.Tensor:
    return tensor.detach().to(torch_dtype_of(stored))


def _content(
    tensors: Mapping[str, torch.Tensor], stored: Mapping[str, str], metadata: Mapping[str, str]
) -> Iterator[bytes]:
    """Yield the bytes of the weights file: the reference library's order, then each tensor."""
    keys = sorted(tensors, key=lambda key: (-DTYPES[stored[key]].bits, key))
    yield build_header([(k, stored[k], tuple(tensors[k].shape)) for k in keys], metadata)
    for key in keys:
        flat = _as(tensors[key], stored[key]).cpu().contiguous().reshape(-1).view(torch.uint8)
        for at in range(0, flat.numel(), _PIECE):
            yield flat[at : at + _PIECE].numpy().tobytes()


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Let a tokenizer save itself, and flush what it wrote."""
    before = set(folder.iterdir())
    with path_of_utf8(folder) as path:  # the tokenizers library takes no other
        tokenizer.save_pretrained(path)
    for made in set(folder.iterdir()) - before:
        if made.is_file():
            sync_path(made)


def _may_replace_card(path: Path) -> bool:
    """Whether a card is absent, or one that a program made."""
    from regraft.runtime.saving.card import is_made

    try:
        text = head_of(path, _CARD_BYTES).decode("utf-8", "replace")
    except (OSError, RegraftError):  # a pipe, say
        return not os.path.lexists(path)
    return is_made(text)


# -- into place ------------------------------------------------------------------------------------


@contextmanager
def _work_folder(place: Path) -> Iterator[tuple[Path, bool]]:
    """Make the folder that new files are written in, locked; and say if folders can be swapped.

    The lock ends with the process. It is beside the adapter's folder, or in it where the parent may
    not be written or the folder is a mount point.
    """
    beside, movable = place.parent / f".{place.name}.saving", True
    if place.exists() and not _can_move(place):
        beside, movable = place / ".saving", False
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(beside) as folder:
        try:
            for left in beside.iterdir():
                if not is_lock(left.name):
                    remove_all(left)
            yield beside, movable
        finally:
            with suppress(OSError):
                folder.remove()


def _can_move(place: Path) -> bool:
    """Whether a folder can be renamed without harm: nobody else's view of it hangs on its place."""
    try:
        inside = Path.cwd()
    except FileNotFoundError:  # it was removed
        inside = Path()
    is_current = inside == place or place in inside.parents
    return not is_current and not os.path.ismount(place) and os.access(place.parent, os.W_OK)


def _locked(folder: Path) -> OpenFolder:
    """Return a folder, made if need be, that is open and locked.

    Raises:
        BusyError: another process holds its lock.
        AccessError: it is another user's, others may write to it, or it is a link.
    """
    for _ in range(_TRIES):
        made = make_private(folder)
        check_place(folder, _ELSEWHERE)
        with suppress(FileNotFoundError):  # its last owner may just have removed it
            opened = OpenFolder(folder)
            try:
                if not made:
                    check_own(opened, _ELSEWHERE)
                if not opened.lock():
                    raise _busy(folder)
                if opened.is_in_place():
                    return opened
            except BaseException:
                opened.close()
                raise
            opened.close()
    raise _busy(folder)


def _busy(folder: Path) -> BusyError:
    return BusyError("another process is saving to the same folder", where=str(folder),
                     hint="Wait for it to end, or save to another folder")  # fmt: skip


def _put_in_place(new: Path, place: Path, movable: bool) -> None:
    """Put the files of ``new`` at ``place``, in the way the module says."""
    if not place.exists():
        new.rename(place)
        sync_folder(place.parent)
        return
    old = place / ADAPTER_CONFIG
    changes = old.exists() and b"".join(file_pieces(old)) != (new / ADAPTER_CONFIG).read_bytes()
    if not (changes and movable and can_exchange() and _exchanged(new, place)):
        _rename_files(new, place, remove_config=changes)
    with suppress(FileNotFoundError):
        (place / ADAPTER_TORCH).unlink()


def _rename_files(new: Path, place: Path, *, remove_config: bool) -> None:
    """Rename files one by one: weights, then the config, then what is not the adapter itself."""
    if remove_config:
        (place / ADAPTER_CONFIG).unlink()
        sync_folder(place)
    names = sorted(path.name for path in new.iterdir())
    first = [ADAPTER_SAFE, ADAPTER_CONFIG]
    for name in [*first, *(n for n in names if n not in first)]:
        if (place / name).is_dir():
            remove_all(place / name)
        (new / name).replace(place / name)
        if name in first:
            sync_folder(place)  # the config must not reach the disk before the weights
    sync_folder(place)


def _exchanged(new: Path, place: Path) -> bool:
    """Swap a folder for one with the new files and links to its others; False if that cannot be.

    What comes into the old folder while that happens is moved to the new one.
    """
    made = {path.name for path in new.iterdir()} | {ADAPTER_TORCH}
    try:
        shutil.copystat(place, new)
        _link_others(place, new, made)
        for folder, _, _ in os.walk(new):
            sync_folder(Path(folder))
        swapped = exchange_at_once(new, place)
    except OSError as error:
        if error.errno not in _IN_PLACE_ONLY:
            raise
        swapped = False
    if swapped:
        sync_folder(place.parent)
        _link_others(new, place, made)
        return True
    for path in new.iterdir():
        if path.name not in made:
            remove_all(path)
    return False


def _link_others(source: Path, target: Path, made: set[str]) -> None:
    """Link every file below a folder that the other one lacks, but for some at its top."""
    for parent, folders, files in os.walk(source):
        here = Path(parent).relative_to(source)
        for name in folders:
            if (Path(parent) / name).is_symlink():
                files.append(name)
            else:
                (target / here / name).mkdir(exist_ok=True)
        for name in files:
            if (here != Path() or name not in made) and not os.path.lexists(target / here / name):
                os.link(Path(parent) / name, target / here / name, follow_symlinks=False)
