"""``regraft.save``: an adapter of a live model becomes a folder. Importing it loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import OutputExistsError
from regraft.formats.layout import ADAPTER_CONFIG, ADAPTER_SAFE, ADAPTER_TORCH, is_model_weights
from regraft.libraries import require
from regraft.merging.files.publish import out_path

if TYPE_CHECKING:
    import torch


def save(
    what: Any,
    folder: str | Path,
    *,
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
    overwrite: bool = True,
    base_revision: str | None = None,
) -> Path:
    """Save an adapter in PEFT's format, with a model card.

    What is there before is replaced when all of the new adapter is on the disk; a process that is
    killed meanwhile leaves the one or the other. The base's own weights are never written, and its
    embeddings only where they were trained or their vocabulary grew.

    Args:
        what: a model that adapters are attached to, what ``attach`` returned, a ``PeftModel``, a
            transformers model with ``add_adapter``'s adapters, or a ``LiveAdapter``.
        folder: made if it is not there; files that are no adapter's stay in it.
        name: which adapter; the only one, or the only active one, if None.
        dtype: what factors are stored in: ``"float32"``, ``"bfloat16"``, ``"float16"``; as they
            are if None.
        tokenizer: saved along.
        overwrite: whether an adapter that is in the folder may be replaced.
        base_revision: the base's revision; the one it was loaded from if None and known.

    Returns:
        The folder.

    Raises:
        UsageError: there is no such adapter, more than one could be meant, or ``what`` is nothing
            that has adapters.
        UnsupportedError: the adapter is not LoRA.
        OutputExistsError: an adapter is there and ``overwrite`` is false, or a full model is there.
        AdapterError: a tensor holds NaN or infinity; nothing is written.
        BusyError: another process is saving to the same folder.
        DiskSpaceError, AccessError: the system refused.
        MissingExtraError: torch is not installed.
    """
    place = out_path(folder)
    _check_place(place, overwrite=overwrite)
    require("torch", why="a live model")
    from regraft.runtime.saving.saved import saved_of, write_saved

    found = saved_of(what, name, base_revision)
    return write_saved(found, place, dtype=dtype, tokenizer=tokenizer)


def _check_place(place: Path, *, overwrite: bool) -> None:
    """Refuse a folder that an adapter would harm.

    Raises:
        OutputExistsError: as :func:`save` says.
    """
    if not place.is_dir():
        return
    names = {path.name for path in place.iterdir()}
    if names & {ADAPTER_CONFIG, ADAPTER_SAFE, ADAPTER_TORCH}:
        if not overwrite:
            raise OutputExistsError(
                "there is an adapter already", where=str(place),
                hint="Save to another folder, or pass overwrite=True",
            )  # fmt: skip
    elif any(map(is_model_weights, names)):
        raise OutputExistsError(
            "the folder holds a full model, which an adapter beside it would make unloadable",
            where=str(place), hint="Save the adapter to a folder of its own",
        )  # fmt: skip
