"""The summary a merge ends with, as text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regraft.cli.text import count, memory, pairs, percent, plural, seconds, size, table
from regraft.formats.files.text import path_word, unspelled
from regraft.merging.files.receipt import InputRecord, Receipt, TensorRecord, Totals
from regraft.tensors import parse_size

MOST_MOVED = 5
"""Tensors listed under "moved most"."""


def render(receipt: Receipt, *, cap: str | int) -> str:
    """Return the summary of a finished merge.

    Args:
        receipt: what the merge returned.
        cap: the memory cap it ran under, as given.
    """
    tables = [_most_moved(receipt.tensors), _least_survived(receipt.tensors)]
    tables.append(_furthest(receipt.tensors))
    parts = [_overview(receipt, parse_size(cap)), *tables, _loading(receipt)]
    return "\n\n".join(part for part in parts if part)


def _overview(receipt: Receipt, cap: int) -> str:
    totals = receipt.totals
    rows = [
        ("base", _input(receipt.base)),
        ("quantized", _formats(receipt)),
        ("trained on", receipt.trained_on or ""),
        *(("adapter", _input(adapter)) for adapter in receipt.adapters),
        ("tensors", actions(vars(totals))),
        ("moved", _moved(totals) if receipt.adapters else ""),
        ("survived", _survived(totals)),
        ("base gap", _gap(totals)),
        ("size", _sizes(receipt)),
        ("digests", _known(receipt)),
        ("undo", _undo(receipt)),
        ("time", speed(totals.bytes_written, totals.seconds, totals.threads)),
        ("memory", peak(totals.peak_memory, cap)),
    ]
    return pairs(rows)


def actions(totals: dict[str, Any]) -> str:
    """Return the tensors by action: ``"291: 196 merged, 95 copied"``."""
    names = ("merged", "replaced", "added", "converted", "copied")
    shares = [f"{totals[name]} {name}" for name in names if totals.get(name)]
    return f"{totals.get('tensors', 0)}: {', '.join(shares)}" if shares else "0"


def _input(record: InputRecord) -> str:
    revision = f" at {record.revision}" if record.revision else ""
    weight = "" if record.weight in (None, 1.0) else f" x {record.weight:g}"
    return f"{record.source}{revision}{weight}"


def _moved(totals: Totals) -> str:
    delta, changed = percent(totals.relative_delta), percent(totals.changed_share)
    return f"|delta|/|W| {delta}, {changed} of the adapted elements changed"


def _formats(receipt: Receipt) -> str:
    """Return what a quantized base is, and what became of it."""
    options = receipt.options
    format = options.get("quantize")
    how = f"rounded {options['rounding']}" if format else ""
    into = f"kept, {how}" if format == "keep" else f"{format}, {how}" if format else "dequantized"
    if receipt.output.endswith(".gguf") and options.get("dtype"):
        into = f"written as {options['dtype']}"
    if receipt.base_formats:
        return f"{', '.join(receipt.base_formats)}: {into}"
    return into if format else ""


def _survived(totals: Totals) -> str:
    if totals.survived is None:
        return ""
    noise, delta = totals.noise or 0.0, totals.relative_delta
    beside = f" ({noise / delta:.2g} x |delta|, spread at random)" if 0 < delta < noise else ""
    return f"{percent(totals.survived)} of the delta, noise {percent(noise)} of |W|{beside}"


def _gap(totals: Totals) -> str:
    if totals.relative_gap is None:
        return ""
    return f"{totals.relative_gap:.3g} x |delta| lies between the bases"


def _sizes(receipt: Receipt) -> str:
    totals = receipt.totals
    files = len({record.file for record in receipt.tensors})
    written, read = size(totals.bytes_written), size(totals.bytes_read)
    return (
        f"{count(totals.parameters)} parameters, {written} in {plural(files, 'file')}, {read} read"
    )


def _known(receipt: Receipt) -> str:
    known = sum(record.known for record in receipt.tensors)
    return f"{known} of {len(receipt.tensors)} known from earlier work" if known else ""


def _undo(receipt: Receipt) -> str:
    """Return what the undo patch takes, and the command that it is for."""
    totals = receipt.totals
    if not totals.undo_bytes:
        return ""
    share = totals.undo_bytes / totals.bytes_written if totals.bytes_written else None
    out = unspelled(receipt.output)
    base = "BASE.gguf" if out.endswith(".gguf") else "BASE"
    command = f"regraft unmerge {path_word(out)} -o {base}"
    return f"{size(totals.undo_bytes)} ({percent(share)} of the model): `{command}`"


def speed(written: int, taken: float, threads: int) -> str:
    """Return time and speed: ``"2.00 s on 2 threads, 900 MB/s written"``."""
    text = f"{seconds(taken)} on {plural(threads, 'thread')}"
    return f"{text}, {size(written / taken)}/s written" if taken > 0 else text


def peak(nbytes: int, cap: int) -> str:
    """Return peak memory beside the cap."""
    return f"{memory(nbytes)} at peak, the cap is {memory(cap)}"


def _most_moved(records: Iterable[TensorRecord]) -> str:
    """Return a table of the tensors with the largest |delta| for their size."""
    moved = sorted((r for r in records if _share(r) > 0), key=_share, reverse=True)[:MOST_MOVED]
    if not moved:
        return ""
    rows = [("moved most", "|delta|/|W|", "changed")]
    rows += [(r.name, percent(_share(r)), percent(_changed(r))) for r in moved]
    return table(rows, "lrr")


def _least_survived(records: Iterable[TensorRecord]) -> str:
    """Return a table of the tensors in codes that lost most of their delta."""
    coded = sorted((r for r in records if r.survived is not None), key=lambda r: r.survived or 0.0)
    if not coded:
        return ""
    rows = [("survived least", "of delta", "noise/|W|")]
    rows += [(r.name, percent(r.survived), percent(r.noise)) for r in coded[:MOST_MOVED]]
    return table(rows, "lrr")


def _furthest(records: Iterable[TensorRecord]) -> str:
    """Return a table of the tensors on which two bases are furthest apart for what is added."""
    gapped = sorted((r for r in records if r.base_gap is not None), key=_gap_share, reverse=True)
    if not gapped:
        return ""
    rows = [("furthest from trained on", "|gap|/|delta|")]
    rows += [(r.name, f"{_gap_share(r):.3g}") for r in gapped[:MOST_MOVED]]
    return table(rows, "lr")


def _gap_share(record: TensorRecord) -> float:
    return (record.base_gap or 0.0) / record.delta_norm if record.delta_norm else 0.0


def _share(record: TensorRecord) -> float:
    """Return |delta|/|W| of one tensor; 0 where it has no delta or W is all zero."""
    return (record.delta_norm or 0.0) / record.weight_norm if record.weight_norm else 0.0


def _changed(record: TensorRecord) -> float:
    return record.changed / record.elements if record.elements else 0.0


def _loading(receipt: Receipt) -> str:
    out = unspelled(receipt.output)
    done = "merged into" if receipt.adapters else "written to"
    return f"{done} {out}\nload it with: {_loader(Path(out))}"


def _loader(out: Path) -> str:
    """Return the line that loads ``out``: of Python, with the class that its config names, or of
    llama.cpp."""
    if out.suffix == ".gguf":
        return f"llama-cli -m {path_word(str(out))}"
    names = _architectures(out)
    if not names:
        return f"safetensors.torch.load_file, on each weights file in {str(out)!r}"
    name = "AutoModelForCausalLM" if names[0].endswith("ForCausalLM") else names[0]
    return f"transformers.{name}.from_pretrained({str(out)!r})"


def _architectures(out: Path) -> list[str]:
    try:
        names = json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found = names if isinstance(names, list) else []
    return [name for name in found if isinstance(name, str) and name.isidentifier()]
