"""The model card of a saved adapter: its base, its size, and how to load and merge it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regraft.errors import redacted
from regraft.formats.files.text import path_word, python_string
from regraft.merging.files.card import repository_of, title_of
from regraft.merging.files.markup import block, cell, code, prose
from regraft.tensors import TensorSpec

MARK = "Saved by [regraft](https://github.com/regraft/regraft)"
"""Stands in every card that is made here; such a card may be replaced."""

PEFT_MARK = "# Model Card for Model ID"
"""Stands in PEFT's card while nobody has filled it in."""

_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_KINDS = (
    ("use_dora", "DoRA"),
    ("use_rslora", "rank-stabilized scale"),
    ("lora_bias", "bias on B"),
)
_NUMBER = re.compile(r"\.\d+(?=\.|\Z)")
_SHOWN_TARGETS = 40


def is_made(card: str) -> bool:
    """Whether a card is one that regraft made, or PEFT and nobody filled in."""
    return MARK in card or PEFT_MARK in card


def adapter_card(
    name: str, config: Mapping[str, Any], specs: Iterable[TensorSpec], base_format: str = "",
    inherited: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Return the text of an adapter's README.md, for the Hub and for people.

    Args:
        name: of the adapter's folder, or its path.
        config: its ``adapter_config.json``.
        specs: its tensors, as they are stored.
        base_format: of a quantized base that it was trained on, such as ``"nf4"``.
        inherited: fields of the front matter, such as the licence, from an earlier card.
    """
    name = title_of(name, "adapter")
    front = _front_matter(config, inherited or {})
    return f"{front}\n{_body(name, config, list(specs), base_format)}"


def _front_matter(config: Mapping[str, Any], inherited: Mapping[str, Any]) -> str:
    import yaml

    base = repository_of(config.get("base_model_name_or_path"))
    data: dict[str, Any] = {"base_model": base} if base else {}
    data |= inherited
    data["library_name"] = "peft"
    pipeline = _PIPELINES.get(str(config.get("task_type")))
    if pipeline:
        data["pipeline_tag"] = pipeline
    tags = [f"base_model:adapter:{base}"] if base else []
    data["tags"] = [*tags, "lora", *(["dora"] if config.get("use_dora") else []), "regraft"]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def _body(name: str, config: Mapping[str, Any], specs: list[TensorSpec], base_format: str) -> str:
    base, load = _base(config), _load_base(config)
    attach = f"adapters = regraft.attach(model, {python_string(name)})"
    wrap = f"model = PeftModel.from_pretrained(model, {python_string(name)})"
    words = " ".join((_word(base, "BASE"), _word(name, "ADAPTER")))
    return f"""
# {prose(name)}

A LoRA adapter{f" for {code(base)}" if base else ""}.

{_facts(config, specs, base_format)}

## Load it

With regraft:

{block(f"import regraft{chr(10)}{load}{chr(10)}{attach}", "python")}

With PEFT:

{block(f"from peft import PeftModel{chr(10)}{load}{chr(10)}{wrap}", "python")}

## Merge it

{block(f"$ regraft merge {words} -o merged", "console")}

{MARK}.
"""


def _word(name: str, otherwise: str) -> str:
    """Return a name as a shell word, or a stand-in for a name that cannot be printed."""
    return path_word(name) if name and name.isprintable() else otherwise


def _load_base(config: Mapping[str, Any]) -> str:
    auto = _AUTO_CLASSES.get(str(config.get("task_type"))) or _class_of(config)
    if auto is None:
        return "\nmodel = ...  # the base"
    revision = config.get("revision")
    chosen = f", revision={python_string(str(revision))}" if revision else ""
    base = python_string(_base(config) or "BASE")
    return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({base}{chosen})"


def _class_of(config: Mapping[str, Any]) -> str | None:
    """Return the class of transformers that an adapter without a task type was trained on."""
    mapping = config.get("auto_mapping")
    if not isinstance(mapping, dict):
        return None
    ours = str(mapping.get("parent_library", "")).partition(".")[0] == "transformers"
    name = str(mapping.get("base_model_class", ""))
    return name if ours and name.isidentifier() else None


def _base(config: Mapping[str, Any]) -> str:
    """Return the base's name; of a folder without its path, which is nobody else's business."""
    name = str(config.get("base_model_name_or_path") or "")
    return repository_of(name) or redacted(Path(name).name)


def _facts(config: Mapping[str, Any], specs: list[TensorSpec], base_format: str) -> str:
    kinds = [label for key, label in _KINDS if config.get(key)]
    dtypes = Counter(spec.dtype for spec in specs)
    size = sum(spec.nbytes for spec in specs)
    rows = (
        ("base", cell(_base(config))),
        ("base revision", cell(str(config.get("revision") or ""))),
        ("base's weights", prose(base_format)),
        ("rank", _number(config, "r", "rank_pattern")),
        ("alpha", _number(config, "lora_alpha", "alpha_pattern")),
        ("kind", ", ".join(kinds)),
        ("targets", _targets(specs)),
        ("also trained", _list(config.get("modules_to_save"))),
        ("parameters", f"{sum(spec.numel for spec in specs):,}"),
        ("size", f"{size / 1e6:.2f} MB ({', '.join(d for d, _ in dtypes.most_common())})"),
    )
    lines = "\n".join(f"| {what} | {value} |" for what, value in rows if value)
    return f"| | |\n|---|---|\n{lines}"


def _number(config: Mapping[str, Any], key: str, patterns: str) -> str:
    value, others = config.get(key), config.get(patterns) or {}
    listed = ", ".join(f"{v:g}" for v in sorted({float(v) for v in others.values()}))
    return prose(f"{value}") + (f" (others by module: {listed})" if listed else "")


def _targets(specs: Iterable[TensorSpec]) -> str:
    """Return the last names of the adapted modules, as the tensors have them."""
    found = {
        _NUMBER.sub("", spec.name.partition(".lora_")[0].replace(".base_layer", "")).split(".")[-1]
        for spec in specs
        if ".lora_" in spec.name
    }
    return _list(sorted(found))


def _list(names: Any) -> str:
    names = [names] if isinstance(names, str) else list(names or ())
    shown = ", ".join(cell(str(name)) for name in names[:_SHOWN_TARGETS])
    return shown + (", ..." if len(names) > _SHOWN_TARGETS else "")
