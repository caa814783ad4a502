"""The adapters that a merge of regraft kept beside its model: they come out exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regraft.errors import RegraftError
from regraft.extracting.report import ExtractReport
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.layout import ADAPTER_SAFE, receipt_path
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import copy_file
from regraft.merging.files.receipt import Receipt, read_receipt
from regraft.merging.undo.manifest import UNDO, read_manifest
from regraft.merging.undo.merged_adapters import weights_of
from regraft.merging.undo.patch import digest_of
from regraft.progress import Progress, tell


@dataclass(frozen=True)
class Kept:
    """Adapters that a merge kept.

    Attributes:
        folders: where they lie.
        weights: the factors that they were merged with.
        unchanged: how many tensors of the model are the base's.
    """

    folders: tuple[Path, ...]
    weights: tuple[float, ...]
    unchanged: int


def kept_adapters(base: Checkpoint, merged: Checkpoint) -> Kept | None:
    """Return the adapters of a merge; None unless it kept all, and both models are as they were.

    All tensors are held against its receipt, in the base and in the model.

    Raises:
        RegraftError: one of them cannot be read.
    """
    if merged.single_file or not receipt_path(merged.root).is_file():
        return None
    try:
        receipt = read_receipt(receipt_path(merged.root))
        names = read_manifest(merged.root, receipt).adapters
    except RegraftError:  # a damaged receipt says nothing; the weights do
        return None
    if "method" in receipt.options:  # the model has not the sum of their deltas
        return None
    if not names or None in names or not _is_as_it_was(base, merged, receipt):
        return None
    folders = tuple(merged.root / UNDO / str(name) for name in names)
    changed = sum(1 for record in receipt.tensors if record.features)
    return Kept(folders, tuple(weights_of(receipt)), len(receipt.tensors) - changed)


def _is_as_it_was(base: Checkpoint, merged: Checkpoint, receipt: Receipt) -> bool:
    with FilePool() as files:
        return all(
            _is(files, base, record.source, record.source_blake3)
            and _is(files, merged, record.name, record.blake3)
            for record in receipt.tensors
        )


def _is(files: FilePool, model: Checkpoint, name: str, digest: str) -> bool:
    spec = model.tensors.get(name)
    return spec is not None and digest_of(files, spec) == digest


def written_from_kept(kept: Kept, output: OutputFolder, progress: Progress | None) -> ExtractReport:
    """Write the adapter of a merge: its copy, or of several the exact sum with their weights.

    Raises:
        RegraftError: something cannot be read or written.
    """
    if kept.weights == (1.0,):
        _copy(kept.folders[0], output, progress)
    else:
        from regraft.combining.verb import combine  # compiled loops; most extractions need none

        pairs = list(zip(kept.folders, kept.weights, strict=True))
        combine(pairs, output.path, method="cat", overwrite=output.overwrite, progress=progress)
    size = (output.path / ADAPTER_SAFE).stat().st_size
    return ExtractReport(
        base="", tuned="", output="", exact=True, dtype="", rank=None, energy=None, max_error=None,
        modules=(), whole=(), left_out=(), unchanged=kept.unchanged, error=0.0, uncertain=0.0,
        bytes=size, warnings=(), seconds=0.0, peak_memory=0,
    )  # fmt: skip


def _copy(folder: Path, output: OutputFolder, progress: Progress | None) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    output.check_space(sum(path.stat().st_size for path in files))
    with output.work() as work:
        work.begin("extract")
        work.keep_only(())
        for path in files:
            copy_file(path, work.out / path.name)
        tell(progress, "finish", 0)
