"""A merged model that keeps an undo: opened, with the adapters that were merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.errors import InputError, UsageError
from regraft.formats.checkpoint import Checkpoint, open_checkpoint
from regraft.formats.hub import Located, locate
from regraft.formats.layout import is_gguf, looks_like, receipt_path, records_of
from regraft.merging.files.receipt import Receipt, read_receipt
from regraft.merging.files.single_file import SUFFIX
from regraft.merging.inputs.base import open_base, whole_gguf
from regraft.merging.inputs.expert_stacks import with_version
from regraft.merging.inputs.opening import AdapterArg, open_adapters, parse_adapters
from regraft.merging.undo.manifest import (
    PATCH,
    Manifest,
    check_kept,
    check_undo,
    read_manifest,
    undo_of,
)
from regraft.merging.undo.merged_adapters import check_adapter, open_kept, weights_of


@dataclass(frozen=True)
class MergedModel:
    """A merged model that keeps an undo.

    Attributes:
        located: where it is.
        place: its folder, or its GGUF file.
        receipt, manifest: what it says of itself.
        merged: its weights.
        adapters: those that were merged.
    """

    located: Located
    place: Path
    receipt: Receipt
    manifest: Manifest
    merged: Checkpoint
    adapters: tuple[Adapter, ...]

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return not self.place.is_dir()

    @property
    def patch(self) -> Path:
        """The undo patch."""
        return undo_of(self.place) / PATCH

    @property
    def inputs(self) -> list[Path]:
        """The folders and the file that are read."""
        beside = [records_of(self.place)] if self.is_gguf else []
        return [self.place, *beside, *(adapter.inputs for adapter in self.adapters)]

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's weight files."""
        return sum(file.size for file in self.manifest.files)

    @property
    def files(self) -> list[Path]:
        """The files that decide what comes out."""
        undo = [p for p in undo_of(self.place).rglob("*") if p.is_file()]
        weights = [shard.path for shard in self.merged.shards]
        sides = [] if self.is_gguf else [p for p in self.place.iterdir() if p.is_file()]
        adapters = [path for adapter in self.adapters for path in adapter.files]
        return [*undo, *weights, *sides, *adapters, receipt_path(self.place)]


def open_merged(
    merged: str | Path, adapters: AdapterArg | Sequence[AdapterArg] | None, token: str | None,
    option: str,
) -> MergedModel:  # fmt: skip
    """Open a merged model: receipt, manifest, weights by their headers, the adapters merged."""
    located = locate(merged, kind="merged", token=token)
    place = located.path
    if not place.is_dir() and not is_gguf(place):
        raise InputError("is not a merged model", where=str(merged), expected="a folder")
    _check_is_model(place, str(merged))
    check_kept(place)
    receipt = read_receipt(receipt_path(place))
    check_undo(place, receipt.files)
    manifest = read_manifest(place, receipt)
    merged_now = open_checkpoint(located) if place.is_dir() else whole_gguf(open_base(located))
    opened = _merged_adapters(place, receipt, manifest, adapters, token, option, merged_now)
    return MergedModel(located, place, receipt, manifest, merged_now, tuple(opened))


def _check_is_model(folder: Path, source: str) -> None:
    """Refuse an adapter in the place of a merged model.

    Raises:
        InputError: it is one.
    """
    if looks_like(folder) == "adapter":
        raise InputError(
            "is not a merged model", where=source, expected="what regraft merge or swap wrote",
            found="an adapter", hint="Name the merged model first, then its new adapters",
        )  # fmt: skip


def base_name(out: Path, found: MergedModel) -> str:
    """Return the name of the file that a base comes back as.

    Raises:
        UsageError: the base was no GGUF file, or not one alone.
    """
    names = [file.name for file in found.manifest.files]
    alone = found.is_gguf or found.manifest.single_file is not None
    if not alone or len(names) > 1 or not names[0].endswith(SUFFIX):
        raise UsageError(
            "this base was not one GGUF file", where="-o", expected="a folder", found=str(out),
            hint="Give a name that does not end in .gguf",
        )  # fmt: skip
    return out.name


def _merged_adapters(
    place: Path, receipt: Receipt, manifest: Manifest,
    given: AdapterArg | Sequence[AdapterArg] | None, token: str | None, option: str,
    model: Checkpoint,
) -> list[Adapter]:  # fmt: skip
    """Return the adapters that were merged: the kept copies, or those that the call names.

    Dialects that cannot be read without the base are read with the merged model, which has its
    modules and sizes.

    Raises:
        UsageError: others are given, or with other weights.
        InputError: none are given and none were kept.
        MismatchError: tensors of one have changed since the merge.
    """
    weights = weights_of(receipt)
    merged = _listed([record.source for record in receipt.adapters], weights)
    if given is not None:
        pairs = parse_adapters(given)
        if [weight for _, weight in pairs] != weights:
            found = _listed(*zip(*pairs, strict=True))
            what = "these are not the adapters that were merged"
            raise UsageError(what, where=option, expected=merged, found=found)
        opened = [files for files, _ in open_adapters(pairs, token, base=model)]
    elif None in manifest.adapters:
        raise InputError(
            "the merge kept no copy of its adapters", where=str(undo_of(place)), expected=merged,
            hint=f"Give them with {option}",
        )  # fmt: skip
    else:
        opened = open_kept(place, [str(name) for name in manifest.adapters], receipt)
    for files, record in zip(opened, receipt.adapters, strict=True):
        check_adapter(files, record)
    opened = [with_version(files, receipt.options.get("peft_version")) for files in opened]
    return [read_adapter(files, weight) for files, weight in zip(opened, weights, strict=True)]


def _listed(sources: Sequence[str], weights: Sequence[float]) -> str:
    """Return adapters as they are given on the command line."""
    return ", ".join(f"{s}={w:g}" for s, w in zip(sources, weights, strict=True))
