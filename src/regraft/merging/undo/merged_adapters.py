"""The adapters of a merged model: the copies that were kept, held against the receipt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from regraft.errors import ChangedError, MismatchError, Problem
from regraft.formats.adapter_files import AdapterFiles, open_adapter
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import AGAIN
from regraft.formats.hub import Located
from regraft.formats.problems import quoted
from regraft.merging.files.receipt import InputRecord, Receipt
from regraft.merging.undo.keeping import copy_name
from regraft.merging.undo.manifest import undo_of
from regraft.merging.undo.patch import digest_of
from regraft.tensors import TensorSpec


def weights_of(receipt: Receipt) -> list[float]:
    """Return the weight of each adapter that was merged."""
    return [record.weight if record.weight is not None else 1.0 for record in receipt.adapters]


def open_kept(folder: Path, names: Sequence[str], receipt: Receipt) -> list[AdapterFiles]:
    """Open the copies that a merge kept of its adapters.

    Args:
        folder: the merged model.
        names: of their folders, in the order of the receipt.
        receipt: the merge's.

    Raises:
        RegraftError: one cannot be opened.
    """
    return [
        open_adapter(Located(undo_of(folder) / name, record.source, None, record.revision))
        for name, record in zip(names, receipt.adapters, strict=True)
    ]


def unlike(tensors: Mapping[str, TensorSpec], record: InputRecord) -> Iterator[str]:
    """Yield the names of tensors that are not, bit for bit, those that a merge read.

    Of a tensor that was cut (``name[rows 0:8]``) the parts show when the merge is done again.

    Args:
        tensors: of the input as it is now, by name.
        record: what the receipt has of it.

    Raises:
        FormatError, InputError, AccessError: one cannot be read.
    """
    with FilePool() as files:
        for name, digest in record.tensors.items():
            spec = tensors.get(name)
            if spec is None and name.rpartition("[")[0] in tensors:
                continue
            if spec is None or digest_of(files, spec) != digest:
                yield name


def check_copies(folder: Path, receipt: Receipt, roots: Sequence[Path]) -> None:
    """Refuse copies of adapters whose tensors are not those that were read while merging.

    Args:
        folder: the merged model.
        receipt: what was read.
        roots: where the adapters lie, in the order of the receipt.

    Raises:
        ChangedError: an adapter was changed before it was copied; lists every one.
        RegraftError: a copy cannot be opened, for that reason.
    """
    copies = open_kept(folder, [copy_name(n) for n, _ in enumerate(roots)], receipt)
    problems = [
        Problem(
            "the adapter was changed while it was being read", str(root / copy.weights_file),
            "the tensors that were merged", f"others: {quoted(other)}", AGAIN,
        )
        for root, copy, record in zip(roots, copies, receipt.adapters, strict=True)
        if (other := next(unlike(copy.tensors, record), None)) is not None
    ]  # fmt: skip
    if problems:
        raise ChangedError(problems)


def check_adapter(adapter: AdapterFiles, record: InputRecord) -> None:
    """Refuse an adapter whose tensors are not those that were merged.

    Raises:
        MismatchError: some are not; lists them.
    """
    if other := list(unlike(adapter.tensors, record)):
        shown = ", ".join(quoted(name) for name in other[:3]) + ", ..." * (len(other) > 3)
        raise MismatchError(
            "this is not the adapter that was merged, or it has been changed since",
            where=f"{adapter.root}/{adapter.weights_file}",
            expected=f"the {len(record.tensors)} tensors that the receipt has of {record.source}",
            found=f"{len(other)} others: {shown}",
            hint="Give the adapter as it was, or take the merged model from where it was unchanged",
        )
