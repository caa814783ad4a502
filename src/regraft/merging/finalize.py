"""After the weights: index, config, side files, card and receipt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blake3 import blake3

from regraft._version import __version__
from regraft.errors import redacted
from regraft.formats.checkpoint import INDEX_STEMS
from regraft.formats.files.text import plain_text, spelled
from regraft.formats.layout import RECEIPT
from regraft.merging.execution.outcome import Outcome, is_stored
from regraft.merging.execution.scheduler import Task
from regraft.merging.files.card import auto_class_of, model_card
from regraft.merging.files.publish import copy_file, write_file, write_pieces
from regraft.merging.files.receipt import (
    InputRecord,
    Receipt,
    TensorRecord,
    Totals,
    file_key,
    lost_warning,
    receipt_pieces,
)
from regraft.merging.files.side_files import CARD, json_bytes, updated_config
from regraft.merging.planning.base_drift import warning as gap_warning
from regraft.merging.planning.plan import Plan
from regraft.merging.planning.sides import Sides
from regraft.merging.planning.targets import Target
from regraft.merging.undo.keeping import UndoSettings, keep_base
from regraft.merging.undo.merged_adapters import check_copies
from regraft.merging.undo.patch import PatchWriter

Used = Callable[[], tuple[float, int, int]]
"""Asks for seconds, peak memory in bytes, and threads."""


def write_rest(
    task: Task, outcome: Outcome, folder: Path, command: str, used: Used, sides: Sides,
    patch: PatchWriter | None = None, keeping: UndoSettings | None = None,
) -> Receipt:  # fmt: skip
    """Write everything but the weights into ``folder``; the receipt is last.

    Args:
        task: the merge, which is done.
        outcome: what it left.
        folder: the output.
        command: how it was called.
        used: asks for time, memory and threads.
        sides: what lies beside the inputs' weights.
        patch: the undo patch with all tensors' sections; it is completed and closed.
        keeping: what else is kept for an undo.

    Raises:
        RegraftError: a side file cannot be read, or something cannot be written.
        ChangedError: an adapter that is kept is not the one that was merged.
    """
    plan = task.plan
    if plan.is_gguf:
        return _write_receipt_alone(task, outcome, folder, command, used, patch, keeping)
    config = updated_config(plan.base.config or {}, plan.config_updates)
    rest = _Rest(folder)
    for name, path in sides.files.items():
        rest.copy(name, path)
    if plan.base.config is not None:
        rest.write("config.json", json_bytes(config))
    if len(plan.shards) > 1:
        rest.write(_index_name(plan), json_bytes(_index(plan), sort_keys=True))
    receipt = _receipt(plan, outcome, command, used)
    card = model_card(
        receipt, claims=_claims(plan), inherited=sides.metadata,
        auto_class=auto_class_of(config),
    )  # fmt: skip
    rest.write(CARD, card.encode())
    if patch is not None and keeping is not None:
        receipt = _keep(task, receipt, patch, folder, rest.digests, keeping)
    receipt = replace(receipt, files=rest.digests, headers=_header_digests(task.targets))
    receipt = _with_usage(receipt, used)
    write_pieces(folder / RECEIPT, receipt_pieces(receipt))
    return receipt


def _keep(
    task: Task, receipt: Receipt, patch: PatchWriter, folder: Path, digests: dict[str, str],
    keeping: UndoSettings,
) -> Receipt:  # fmt: skip
    """Keep what an undo needs; return the receipt with its size, and add its files' digests."""
    digests |= keep_base(task.plan, task.keeps, patch, folder, digests, keeping)
    if keeping.adapters:
        check_copies(folder, receipt, [Path(adapter.root) for adapter in task.plan.adapters])
    totals = replace(receipt.totals, undo_bytes=patch.path.stat().st_size)
    return replace(receipt, totals=totals)


def _write_receipt_alone(
    task: Task, outcome: Outcome, folder: Path, command: str, used: Used,
    patch: PatchWriter | None, keeping: UndoSettings | None,
) -> Receipt:  # fmt: skip
    """Write the receipt of a GGUF file: config, tokenizer and card are in the file, or the base's.

    It is moved beside the file, and what is kept for an undo with it; paths here are those of every
    output.
    """
    receipt, digests = _receipt(task.plan, outcome, command, used), dict[str, str]()
    if patch is not None and keeping is not None:
        receipt = _keep(task, receipt, patch, folder, digests, keeping)
    receipt = replace(receipt, files=digests, headers=_header_digests(task.targets))
    receipt = _with_usage(receipt, used)
    write_pieces(folder / RECEIPT, receipt_pieces(receipt))
    return receipt


def _claims(plan: Plan) -> list[str | None]:
    """Return what the adapters, and the base's own config, call the base."""
    own = (plan.base.config or {}).get("_name_or_path")
    named = [adapter.settings.base_model_name_or_path for adapter in plan.adapters]
    return [*named, own if isinstance(own, str) else None]


class _Rest:
    """Writes the files beside the weights, and keeps their digests for the receipt."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.digests: dict[str, str] = {}

    def write(self, name: str, content: bytes) -> None:
        write_file(self._folder / name, content)
        self.digests[file_key(name)] = blake3(content).hexdigest()

    def copy(self, name: str, path: Path) -> None:
        self.digests[file_key(name)] = copy_file(path, self._folder / name)


def _header_digests(targets: Sequence[Target]) -> dict[str, str]:
    """Return the digests of the weight files' headers."""
    return {t.name: blake3(content).hexdigest() for t in targets for _, content in t.pieces}


def _index_name(plan: Plan) -> str:
    """Return the index's name: that of the shards where loaders look for it, else the usual one."""
    stem = plan.shards[0].name.partition("-")[0].partition(".")[0]
    return f"{stem if stem in INDEX_STEMS else 'model'}.safetensors.index.json"


def _index(plan: Plan) -> dict[str, Any]:
    totals = plan.totals()
    return {
        "metadata": {"total_parameters": totals["parameters"], "total_size": plan.nbytes},
        "weight_map": {step.name: shard.name for shard in plan.shards for step in shard.steps},
    }


def _receipt(plan: Plan, outcome: Outcome, command: str, used: Used) -> Receipt:
    base_digests = {
        record.source: record.source_blake3
        for step, record in zip(plan.steps, outcome.records, strict=True)
        if is_stored(step)
    } | outcome.kept_digests
    base = InputRecord(spelled(plan.base.source), plan.base.revision, None, base_digests)
    receipt = Receipt(
        regraft=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=redacted(plain_text(command)),
        output=spelled(str(plan.out)),
        base=base,
        adapters=_adapter_records(plan, outcome),
        options=dict(plan.options),
        tensors=outcome.records,
        totals=_totals(plan, outcome.records, used),
        warnings=plan.warnings,
        base_formats=plan.quantization.formats if plan.quantization is not None else (),
        trained_on=spelled(plan.trained_on.base.source) if plan.trained_on is not None else None,
    )
    quiet = (receipt.quiet_warning,) if receipt.quiet else ()
    said = (*plan.warnings, *quiet, *_of_figures(outcome.records))
    return replace(receipt, warnings=tuple(redacted(plain_text(text)) for text in said))


def _of_figures(records: Sequence[TensorRecord]) -> list[str]:
    """Return what to say of deltas that rounding lost, and of bases that are far apart."""
    gaps = [(r.name, r.base_gap, r.delta_norm or 0.0) for r in records if r.base_gap is not None]
    said = [lost_warning([(r.name, r.survived) for r in records if r.survived is not None])]
    return [*filter(None, [*said, gap_warning(gaps)])]


def _with_usage(receipt: Receipt, used: Used) -> Receipt:
    seconds, peak, _ = used()
    return replace(receipt, totals=replace(receipt.totals, seconds=seconds, peak_memory=peak))


def _adapter_records(plan: Plan, outcome: Outcome) -> tuple[InputRecord, ...]:
    by_file: dict[Path, dict[str, str]] = defaultdict(dict)
    for (path, name), digest in outcome.adapter_digests.items():
        by_file[path][name] = digest
    for step, record in zip(plan.steps, outcome.records, strict=True):
        if step.source_adapter is not None and not step.only_scales:
            by_file[step.source.path][record.source] = record.source_blake3
    records = []
    for adapter in plan.adapters:
        paths = {target.a.path for target in adapter.targets}
        paths |= {whole.spec.path for whole in adapter.whole}
        paths |= {rows.spec.path for rows in adapter.token_rows}
        digests = {n: d for path in paths for n, d in sorted(by_file[path].items())}
        records.append(
            InputRecord(spelled(adapter.source), adapter.revision, adapter.weight, digests)
        )
    return tuple(records)


def _coded_totals(records: Sequence[TensorRecord]) -> dict[str, Any]:
    """Return shares over all tensors: of the delta in codes, of noise, and of what lies between."""
    coded = [r for r in records if r.survived is not None and r.delta_norm and r.weight_norm]
    deltas = sum((r.delta_norm or 0.0) ** 2 for r in coded)
    kept = sum((r.survived or 0.0) * (r.delta_norm or 0.0) ** 2 for r in coded)
    weights = sum((r.weight_norm or 0.0) ** 2 for r in coded)
    noise = sum(((r.noise or 0.0) * (r.weight_norm or 0.0)) ** 2 for r in coded)
    gapped = [r for r in records if r.base_gap is not None]
    gaps = sum((r.base_gap or 0.0) ** 2 for r in gapped)
    moved = sum((r.delta_norm or 0.0) ** 2 for r in gapped)

    def share(part: float, whole: float) -> float | None:
        return float(f"{part / whole:.9g}") if whole else None

    return {
        "survived": share(kept, deltas),
        "noise": share(noise**0.5, weights**0.5),
        "relative_gap": share(gaps**0.5, moved**0.5),
    }


def _totals(plan: Plan, records: tuple[TensorRecord, ...], used: Used) -> Totals:
    counts = plan.totals()
    weights = sum((r.weight_norm or 0.0) ** 2 for r in records if r.weight_norm is not None)
    deltas = sum((r.delta_norm or 0.0) ** 2 for r in records if r.weight_norm is not None)
    touched = [r for r in records if r.action in ("merge", "replace")]
    elements = sum(r.elements for r in touched)
    seconds, peak, threads = used()
    totals = Totals(
        **counts,
        relative_delta=float(f"{(deltas / weights) ** 0.5:.9g}") if weights else 0.0,
        changed_share=sum(r.changed for r in touched) / elements if elements else 0.0,
        seconds=seconds,
        peak_memory=peak,
        threads=threads,
    )
    return replace(totals, **_coded_totals(records))
