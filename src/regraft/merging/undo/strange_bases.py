"""Bases that an adapter is probably not meant for, told without a look at their values.

Where an adapter carries no fingerprint, its config still names its base; and a base that regraft
merged has a receipt, which says what is in it already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.adapters.model import Adapter
from regraft.errors import RegraftError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import FilePool, expanded, is_there
from regraft.formats.layout import RECEIPT, receipt_path
from regraft.merging.files.receipt import InputRecord, read_receipt
from regraft.merging.inputs.dequantized_view import GGUF

_LOOKED_AT = 4
"""So many factors of an adapter tell whether a receipt speaks of it."""


def notes_of_strange_base(adapters: Sequence[Adapter], base: Checkpoint) -> list[str]:
    """Return what to say of adapters that name another kind of base, or are in this one already.

    Args:
        adapters: the adapters.
        base: the base.

    Raises:
        RegraftError: a factor cannot be read.
    """
    notes = [_of_kind(adapter, base) for adapter in adapters if adapter.fingerprint is None]
    return [note for note in (*notes, *_of_receipt(adapters, base)) if note]


def _of_kind(adapter: Adapter, base: Checkpoint) -> str:
    """Return what to say where the base that a config names is here, and is of another kind."""
    named = adapter.settings.base_model_name_or_path or ""
    here = str((base.config or {}).get("model_type") or "")
    for place in (expanded(named), Path(adapter.root) / named):
        if not named or not here or not is_there(place / "config.json"):
            continue
        try:
            kind = str(read_json_object(place / "config.json").get("model_type") or "")
        except RegraftError:
            return ""
        if kind and not (kind.startswith(here) or here.startswith(kind)):
            return (
                f"{adapter.label}: was trained on {named}, a {kind}, and {base.source} is a "
                f"{here}: its names fit, and it may answer nonsense here"
            )
        return ""
    return ""


def _of_receipt(adapters: Sequence[Adapter], base: Checkpoint) -> list[str]:
    """Return what to say of adapters that are merged into the base already."""
    in_gguf = base.container == GGUF
    path = receipt_path(base.shards[0].path) if in_gguf else base.root / RECEIPT
    if (base.single_file and not in_gguf) or not path.is_file():
        return []
    try:
        records = read_receipt(path).adapters
    except RegraftError:  # verify says what is wrong with it
        return []
    return [
        f"{adapter.label}: is merged into {base.source} already, as its receipt says, and is added "
        "once more; regraft unmerge gives back the base, and regraft swap replaces adapters"
        for adapter in adapters
        if any(_is_of(adapter, record) for record in records)
    ]


def _is_of(adapter: Adapter, record: InputRecord) -> bool:
    from regraft.merging.undo.patch import digest_of  # it brings compiled code along

    specs = [spec for target in adapter.targets for spec in (target.a, target.b)]
    told = [spec for spec in specs if spec.name in record.tensors][:_LOOKED_AT]
    with FilePool() as files:
        return bool(told) and all(
            digest_of(files, spec) == record.tensors[spec.name] for spec in told
        )
