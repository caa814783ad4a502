"""The model card of a merge: where it comes from, how it was made, how to load it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regraft.formats.files.reading import is_there
from regraft.formats.files.text import plain_text, python_string, shell_word, unspelled
from regraft.merging.files.markup import block, cell, code, prose
from regraft.merging.files.receipt import Receipt

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}", re.ASCII)


def model_card(
    receipt: Receipt, *, claims: Iterable[str | None], inherited: Mapping[str, Any], auto_class: str
) -> str:
    """Return the text of README.md.

    Args:
        receipt: what was done.
        claims: what adapters and the base's config call a base that is given as a folder.
        inherited: the base's licence and the like.
        auto_class: the transformers class that loads the model.
    """
    return f"{_front_matter(receipt, claims, inherited)}\n{_body(receipt, auto_class)}"


def _front_matter(
    receipt: Receipt, claims: Iterable[str | None], inherited: Mapping[str, Any]
) -> str:
    import yaml

    base = next(filter(None, map(repository_of, (receipt.base.source, *claims))), None)
    adapters = [repository_of(adapter.source) for adapter in receipt.adapters]
    models = [name for name in [base, *adapters] if name]
    data: dict[str, Any] = dict(inherited)
    relation = "merge" if receipt.adapters else "quantized" * bool(receipt.options.get("quantize"))
    if models:
        data["base_model"] = list(dict.fromkeys(models))
    if models and relation:
        data["base_model_relation"] = relation
    tags = ["merge", "lora"] if receipt.adapters else []
    data |= {"library_name": "transformers", "tags": [*tags, "regraft"]}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


_IN_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?\Z")
_TEMPORARY = re.compile(r"^\.?te?mp[-_.](?=.)|^\.(?=.+\.te?mp$)|\.te?mp\Z", re.IGNORECASE)
_NAMELESS = re.compile(r"|\.?te?mp|tmp[a-z0-9_]{8}", re.IGNORECASE)
"""What tempfile and others call a folder that is moved or removed when it is done."""


def title_of(folder: str | Path, otherwise: str) -> str:
    """Return what a card calls its folder: its last name, without marks of a temporary one.

    Args:
        folder: as it was named; it may be relative, such as ``"."``.
        otherwise: for a folder whose name says nothing, such as ``tmpk3x_19ab``.
    """
    name = _TEMPORARY.sub("", Path(os.path.normpath(Path(folder).absolute())).name)
    return otherwise if _NAMELESS.fullmatch(name) else name


def repository_of(source: str | None) -> str | None:
    """Return the Hub id that a source is, or that it is a copy of in the Hub's cache; or None."""
    if not isinstance(source, str):  # of a config, which may hold anything
        return None
    found = _IN_CACHE.search(source)
    return hub_id(source) or (hub_id(f"{found[1]}/{found[2]}") if found else None)


def hub_id(source: str | None) -> str | None:
    """Return the Hub id that a source is, without its revision; None if it is none."""
    name = source.partition("@")[0] if isinstance(source, str) else ""
    return name if _REPOSITORY.fullmatch(name) and not is_there(name) else None


def _body(receipt: Receipt, auto_class: str) -> str:
    adapters = "\n".join(
        f"| adapter {i + 1} | {cell(_shown(unspelled(a.source)))} | {a.weight:g} |"
        for i, a in enumerate(receipt.adapters)
    )
    title = title_of(unspelled(receipt.output), "merged" if receipt.adapters else "model")
    load = f"model = {auto_class}.from_pretrained({python_string(title)})"
    return f"""
# {prose(title)}

{_kind(receipt)}

{block(f"from transformers import {auto_class}{chr(10) * 2}{load}", "python")}

| | source | weight |
|---|---|---|
| base | {cell(_shown(unspelled(receipt.base.source)))} | |
{adapters}

{_done(receipt)}

Made by [regraft](https://github.com/regraft/regraft) {receipt.regraft}, arithmetic version
{receipt.arithmetic}:

{block(_command(receipt))}

`regraft/receipt.json` holds the digest of every tensor read and written.
"""


def _kind(receipt: Receipt) -> str:
    """Return what the model is, in a sentence or two."""
    coded = bool(receipt.options.get("quantize"))
    plain = "A quantized transformers model" if coded else "A plain transformers model"
    if not receipt.adapters:
        plain_made = "dequantized" if receipt.base_formats else "converted"
        return f"{plain}, {'quantized' if coded else plain_made} from another."
    return f"{plain}: adapters merged into a base. No adapter library is needed to run it."


def _done(receipt: Receipt) -> str:
    totals, formats = receipt.totals, ", ".join(receipt.base_formats)
    said = []
    if receipt.adapters:
        said.append(
            f"{totals.merged} of {totals.tensors} tensors were merged. The adapters moved them by\n"
            f"{totals.relative_delta:.2%} of their norm; {totals.changed_share:.1%} of the merged\n"
            "elements changed."
        )
    if formats:
        said.append(f"The base is quantized ({formats}): merged into what its codes stand for.")
    if totals.survived is not None:
        said.append(
            f"Rounding to codes ({receipt.options['rounding']}) kept {totals.survived:.1%} of the "
            "adapters' deltas."
        )
    if receipt.trained_on is not None and totals.relative_gap is not None:
        said.append(
            f"The adapters were trained on {code(_shown(unspelled(receipt.trained_on)))}; "
            f"{totals.relative_gap:.3g} times the deltas' norm lies between the two bases."
        )
    return "\n\n".join(said) or f"{totals.tensors} tensors were written."


def _command(receipt: Receipt) -> str:
    """Return the command with folders by their names alone."""
    command = receipt.command
    others = [receipt.trained_on] if receipt.trained_on is not None else []
    sources = [receipt.base.source, *(a.source for a in receipt.adapters), *others, receipt.output]
    for source in sorted(map(unspelled, sources), key=len, reverse=True):
        is_out = source == unspelled(receipt.output)
        shown = title_of(source, Path(source).name) if is_out else _shown(source)
        command = _renamed(command, source, shown)
    return command


def _renamed(command: str, source: str, shown: str) -> str:
    """Return a command with another name in place of one, as a shell or as Python has it."""
    for form in (shell_word, repr, plain_text):
        whole = rf"(?<![\w./~-]){re.escape(form(source))}(?![\w./-])"
        command = re.sub(whole, form(shown).replace("\\", r"\\"), command)
    return command


def _shown(source: str) -> str:
    """Return a name as it is on the disk, of a folder without its path: nobody else's business."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111  (a name of no user stays as it is)
    if not is_there(path):
        return source
    return repository_of(source) or Path(os.path.normpath(path.absolute())).name


AUTO_CLASSES = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForImageClassification", "AutoModelForImageClassification"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
)


def auto_class_of(config: Mapping[str, Any]) -> str:
    """Return the transformers auto class that loads a config's architecture."""
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    for ending, auto in AUTO_CLASSES:
        if architecture.endswith(ending):
            images = auto == "AutoModelForSeq2SeqLM" and "vision_config" in config
            return "AutoModelForImageTextToText" if images else auto
    return "AutoModel"
