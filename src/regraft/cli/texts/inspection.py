"""An inspection as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.cli.text import count, pairs, percent, plural, size, table
from regraft.formats.problems import quoted
from regraft.inspection import GGUF, AdapterFacts, Inspection, MergeFacts, ModelFacts

_KINDS = {"base": "a base model", "merged": "a merged model", "adapter": "an adapter"}

FEW_FILES = 8
"""Up to this many files are listed one by one."""

_SHOWN = 12
"""Up to so many names of a list are shown."""


def render(inspection: Inspection) -> str:
    """Return what :func:`regraft.inspect` found, as text."""
    revision = f" at {inspection.revision}" if inspection.revision else ""
    merged = inspection.merge
    kind = "a converted model" if merged and not merged.adapters else _KINDS[inspection.kind]
    title = f"{inspection.source}{revision}: {kind}"
    rows = [
        *(_merge_rows(inspection.merge) if inspection.merge else _unknown_merge(inspection)),
        *(_model_rows(inspection.model) if inspection.model else []),
        *(_adapter_rows(inspection.adapter) if inspection.adapter else []),
        *_size_rows(inspection),
    ]
    parts = [f"{title}\n{_indented(pairs(rows))}", _files(inspection)]
    return "\n\n".join(part for part in parts if part)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _size_rows(inspection: Inspection) -> list[tuple[str, str]]:
    total = inspection.bytes or 1
    shares = [f"{d.dtype} {percent(d.bytes / total)}" for d in inspection.dtypes]
    if _in_gguf(inspection):
        counted = zip(shares, inspection.dtypes, strict=True)
        shares = [f"{share} in {plural(d.tensors, 'tensor')}" for share, d in counted]
    packed = _quantized(inspection) and not _in_gguf(inspection)
    elements = "elements stored" if packed else "parameters"
    files = plural(len(inspection.files), "file")
    return [
        ("size", f"{count(inspection.parameters)} {elements}, {size(inspection.bytes)} in {files}"),
        ("types" if _in_gguf(inspection) else "dtypes", ", ".join(shares)),
    ]


def _quantized(inspection: Inspection) -> bool:
    return inspection.model is not None and inspection.model.quantization is not None


def _in_gguf(inspection: Inspection) -> bool:
    return inspection.model is not None and inspection.model.quantization == GGUF


def _unknown_merge(inspection: Inspection) -> list[tuple[str, str]]:
    """Return what to say of a merged GGUF file without its receipt."""
    if inspection.kind != "merged":
        return []
    return [("merged from", "not known: there is no receipt of it in its folder NAME.gguf.regraft")]


def _model_rows(model: ModelFacts) -> list[tuple[str, str]]:
    shape = [
        f"{number} {name}"
        for number, name in (
            (model.layers, "layers"),
            (model.hidden, "hidden"),
            (model.vocab, "vocabulary"),
        )
        if number is not None
    ]
    tied = {True: "tied", False: "not tied", None: ""}[model.tied_embeddings]
    return [
        ("model", ", ".join(filter(None, [model.model_type or "", *model.architectures]))),
        ("shape", ", ".join(shape)),
        ("embeddings", tied),
        ("quantization", model.quantization or ""),
    ]


def _merge_rows(merge: MergeFacts) -> list[tuple[str, str]]:
    if not merge.adapters:
        return [("made from", merge.base), ("on", f"{merge.created} by regraft {merge.regraft}")]
    rows = [("merged from", merge.base)]
    rows += [("with", name + _times(weight)) for name, weight in merge.adapters]
    rows += [("on", f"{merge.created} by regraft {merge.regraft}")]
    return [*rows, ("moved", f"|delta|/|W| {percent(merge.relative_delta)}")]


def _times(weight: float | None) -> str:
    return "" if weight in (None, 1.0) else f" x {weight:g}"


def _adapter_rows(adapter: AdapterFacts) -> list[tuple[str, str]]:
    revision = f" at {adapter.base_revision}" if adapter.base_revision else ""
    return [
        ("adapter", ", ".join(filter(None, [_kind(adapter), adapter.task_type or ""]))),
        ("dialect", adapter.dialect if adapter.dialect != "peft" else ""),
        ("claims base", f"{adapter.base}{revision}" if adapter.base else _no_base(adapter)),
        ("fingerprint", _of_base(adapter)),
        ("rank", _rank(adapter)),
        ("scale", _scale(adapter)),
        ("adapts", _adapted(adapter)),
        ("targets", _names(adapter.target_modules)),
        ("parameters of", _names(adapter.target_parameters)),
        ("saved whole", _names(adapter.modules_to_save)),
        ("token rows", plural(adapter.token_rows, "row") if adapter.token_rows else ""),
        ("bias", "" if adapter.bias == "none" else adapter.bias),
        ("init", "" if adapter.init in ("true", "false") else adapter.init),
        ("trained with", f"peft {adapter.peft_version}" if adapter.peft_version else ""),
        ("not known", ", ".join(map(quoted, adapter.unknown_settings))),
        ("cannot merge", "; ".join(adapter.unmergeable)),
        ("needs its base", adapter.needs_base),
    ]


def _no_base(adapter: AdapterFacts) -> str:
    return "" if adapter.needs_base else "none"


def _kind(adapter: AdapterFacts) -> str:
    flags = {"rsLoRA": adapter.rslora, "DoRA": adapter.dora, "with lora_bias": adapter.lora_bias}
    return " ".join([adapter.peft_type, *(name for name, is_set in flags.items() if is_set)])


def _of_base(adapter: AdapterFacts) -> str:
    """Return what the adapter carries of its base's weights."""
    found = adapter.fingerprint
    if found is None:
        return ""
    base = "its quantized base" if found.quantized else "its base"
    return f"{found.values} values of {plural(found.parameters, 'parameter')} of {base}"


def _rank(adapter: AdapterFacts) -> str:
    """Return the config's rank, and the tensors' where they say more."""
    stated = "" if adapter.r is None else str(adapter.r)
    if list(adapter.ranks) in ([], [adapter.r]):
        return stated
    seen = ", ".join(f"{rank} in {plural(n, 'module')}" for rank, n in adapter.ranks.items())
    return f"{stated} in the config; seen: {seen}" if stated else seen


def _scale(adapter: AdapterFacts) -> str:
    if adapter.scale is None:
        return ""
    formula = "alpha/sqrt(r)" if adapter.rslora else "alpha/r"
    varies = ", and other scales by pattern" if adapter.patterned else ""
    return f"{adapter.scale:.6g} ({formula}, alpha {adapter.alpha:g}){varies}"


def _adapted(adapter: AdapterFacts) -> str:
    if not adapter.adapted:
        return "no module"
    return f"{plural(adapter.modules, 'module')}: {_counts(adapter.adapted)}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{number}" for name, number in counts.items())


def _names(names: Any) -> str:
    """Return an expression as it is; of a list the first names, sorted, and how many more."""
    if isinstance(names, str):
        return names
    rest = len(names) - _SHOWN
    listed = sorted(names)[: _SHOWN if rest > 1 else None]
    return ", ".join(listed) + (f", and {rest} more" if rest > 1 else "")


def _files(inspection: Inspection) -> str:
    """Return the files as a table; of many, the first and the last ones."""
    rows = [(file.name, str(file.tensors), size(file.bytes)) for file in inspection.files]
    if len(rows) > FEW_FILES:
        half = FEW_FILES // 2
        rows = [*rows[:half], ("...", "", ""), *rows[-half:]]
    return table([("file", "tensors", "bytes"), *rows], "lrr", indent="  ")
