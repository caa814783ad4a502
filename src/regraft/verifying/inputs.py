"""The base and the adapters that a model should be made of: as named, or as its receipt says.

Compiled code is imported where it is used: a model is held against its receipt without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.adapters.model import Adapter
from regraft.errors import FormatError, InputError, MismatchError, RegraftError
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import expanded, is_there
from regraft.formats.files.text import unspelled
from regraft.formats.hub import locate
from regraft.formats.layout import receipt_path
from regraft.merging.files.receipt import InputRecord, Receipt, read_receipt
from regraft.merging.inputs.base import open_base
from regraft.merging.inputs.expert_stacks import with_version
from regraft.merging.inputs.opening import open_adapters, read_adapters

BaseWithAdapters = tuple[Checkpoint, list[Adapter]]
"""The base and the adapters that a model should be made of."""


@dataclass(frozen=True)
class Inputs:
    """What a merge is to be done again with.

    Attributes:
        recipe: base and adapters; None where they are not at hand.
        said: a sentence on where they were found, or why not; "" where all were named.
        record: what the receipt has of the base, where that was not named.
        files: the adapters' files.
        receipt: the receipt, if there is one.
    """

    recipe: BaseWithAdapters | None
    said: str = ""
    record: InputRecord | None = None
    files: tuple[AdapterFiles, ...] = ()
    receipt: Receipt | None = None


def receipt_in(folder: Path) -> Receipt | None:
    """Return the receipt of a merged model; None where there is none that can be read.

    Raises:
        AccessError: the system refused to read it.
    """
    path = receipt_path(folder)
    if not path.is_file():
        return None
    try:
        return read_receipt(path)
    except FormatError:  # the check against the receipt says so
        return None


def find_inputs(
    folder: Path, base: str | Path | None, adapters: Sequence[tuple[str, float]],
    peft_version: str | None, token: str | None,
) -> Inputs:  # fmt: skip
    """Return base and adapters, each as named, or as the receipt names it.

    Args:
        folder: the merged model.
        base: the base, if it is named.
        adapters: the adapters, if they are named.
        peft_version: as for :func:`regraft.merge`; by default as it was for this merge.
        token: Hub token.

    Raises:
        RegraftError: what is named cannot be opened or read.
    """
    receipt = receipt_in(folder)
    version = peft_version or (receipt.options.get("peft_version") if receipt else None)
    checkpoint = open_base(locate(base, kind="base", token=token)) if base is not None else None
    named = open_adapters(adapters, token, version, checkpoint)
    if checkpoint is not None and named:
        return Inputs((checkpoint, read_adapters(named)), files=_files(named), receipt=receipt)
    if receipt is None or not receipt.adapters:
        return Inputs(None)
    try:
        opened = named or _merged(folder, receipt, version, token, checkpoint)
        found = checkpoint or _base_of(receipt, token)
        read = read_adapters(opened)
    except RegraftError as error:
        problem = error.problems[0]
        why = f"{problem.what} ({problem.where})" if problem.where else problem.what
        return Inputs(None, f"the merge was not done again: {why}; --base and --adapter name both")
    by_receipt = receipt.base if checkpoint is None else None
    said = _said(receipt, base, adapters)
    return Inputs((found, read), said, by_receipt, _files(opened), receipt)


def _files(opened: Sequence[tuple[AdapterFiles, float]]) -> tuple[AdapterFiles, ...]:
    return tuple(files for files, _ in opened)


def not_of_receipt(inputs: Inputs) -> list[str]:
    """Return a sentence for each input that is not what the receipt says was merged.

    A base that the receipt names is taken for granted: its digests were asked for before.

    Raises:
        FormatError, InputError, AccessError: one cannot be read.
    """
    if inputs.recipe is None or inputs.receipt is None or not inputs.receipt.adapters:
        return []
    from regraft.merging.undo.merged_adapters import check_adapter

    base, receipt, said = inputs.recipe[0], inputs.receipt, list[str]()
    if inputs.record is None and not is_that_base(base, receipt.base):
        said.append(f"{base.source} is not the base that the receipt has, {receipt.base.source}")
    if len(inputs.files) != len(receipt.adapters):
        count = len(receipt.adapters)
        return [*said, f"the receipt has {count} adapters, and these are {len(inputs.files)}"]
    for files, record in zip(inputs.files, receipt.adapters, strict=True):
        try:
            check_adapter(files, record)
        except MismatchError:
            said.append(f"{files.source} is not the adapter that the receipt has, {record.source}")
    return said


def _merged(
    folder: Path, receipt: Receipt, version: str | None, token: str | None,
    base: Checkpoint | None,
) -> list[tuple[AdapterFiles, float]]:  # fmt: skip
    """Open the adapters of a receipt: the copies that were kept, or where they were.

    Raises:
        RegraftError: one is not there, or is not what was merged.
    """
    from regraft.merging.undo.manifest import MANIFEST, read_manifest, undo_of
    from regraft.merging.undo.merged_adapters import check_adapter, open_kept, weights_of

    kept = (undo_of(folder) / MANIFEST).is_file()
    names = read_manifest(folder, receipt).adapters if kept else (None,)
    weights = weights_of(receipt)
    if None in names:
        sources = [unspelled(record.source) for record in receipt.adapters]
        _check_at_hand(sources, "adapter")
        model = base or _base_of(receipt, token)  # some dialects cannot be read without
        pairs = [*zip(sources, weights, strict=True)]
        opened = [f for f, _ in open_adapters(pairs, token, base=model)]
    else:
        opened = open_kept(folder, [str(name) for name in names], receipt)
    for files, record in zip(opened, receipt.adapters, strict=True):
        check_adapter(files, record)
    return [(with_version(f, version), weight) for f, weight in zip(opened, weights, strict=True)]


def _base_of(receipt: Receipt, token: str | None) -> Checkpoint:
    source = unspelled(receipt.base.source)
    _check_at_hand([source], "base")
    return open_base(locate(source, kind="base", token=token))


def _check_at_hand(sources: Sequence[str], kind: str) -> None:
    """Refuse what is not on this machine: nothing is fetched that was not asked for.

    Raises:
        InputError: one is not.
    """
    for source in sources:
        if not is_there(expanded(source)):
            raise InputError(f"the {kind} that the receipt names is not here", where=source)


def _said(receipt: Receipt, base: str | Path | None, adapters: Sequence[tuple[str, float]]) -> str:
    """Return what the merge is done again with, and what of that the receipt said."""
    named = [str(base)] if base is not None else []
    named += [source for source, _ in adapters]
    merged = ", ".join(record.source for record in receipt.adapters)
    told = "which the receipt names" if not named else f"where {', '.join(named)} was given"
    whose = ", ".join(source for source, _ in adapters) or merged
    return f"the merge was done again with {base or receipt.base.source} and {whose}, {told}"


def is_that_base(base: Checkpoint, record: InputRecord) -> bool:
    """Whether a base holds every tensor that a merge read, bit for bit.

    Raises:
        FormatError, InputError, AccessError: one cannot be read.
    """
    from regraft.merging.undo.merged_adapters import unlike

    return next(unlike(base.tensors, record), None) is None
