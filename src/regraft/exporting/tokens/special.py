"""Special tokens, what is added to texts, and chat templates, of every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.exporting.tokens.form import refused
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.problems import quoted

_KEYS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id",
    "sep": "seperator_token_id", "pad": "padding_token_id", "mask": "mask_token_id",
}  # fmt: skip
"""GGUF's keys below ``tokenizer.ggml`` (one is misspelled there), by transformers' names."""


def special_tokens(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int],
    rows: int,
) -> dict[str, int]:  # fmt: skip
    """Return the ids of special tokens, by transformers' names: ``bos`` and so on.

    What the tokenizer says comes first, then the model's config.

    Args:
        folder: the model's folder.
        config: the model's config.
        settings: the content of ``tokenizer_config.json``.
        ids: the id of each token, by its text.
        rows: of the embedding.
    """
    more = folder / "special_tokens_map.json"
    mapped = read_json_object(more) if more.is_file() else {}
    found: dict[str, int] = {}
    for name in _KEYS:
        own = _content(settings.get(f"{name}_token")) or _content(mapped.get(f"{name}_token"))
        row = ids.get(own) if own is not None else None
        if row is None:
            row = config.get(f"{name}_token_id")
        if isinstance(row, int) and not isinstance(row, bool) and 0 <= row < rows:
            found[name] = row
    return found


def _content(token: Any) -> str | None:
    """Return a token's text; it stands alone or in an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def special_metadata(special: Mapping[str, int]) -> dict[str, int]:
    """Return what GGUF says of special tokens."""
    return {f"tokenizer.ggml.{_KEYS[name]}": row for name, row in special.items()}


def added_ends(rules: Mapping[str, Any], special: Mapping[str, int], where: str) -> dict[str, bool]:
    """Return whether ``bos`` and ``eos`` are put before and after a text.

    Args:
        rules: the content of ``tokenizer.json``.
        special: ids of special tokens by name.
        where: the file, for messages.

    Raises:
        UnsupportedError: something else is put around texts.
    """
    single = _template(rules.get("post_processor"), where)
    before, after = _around(single)
    bos, eos = special.get("bos"), special.get("eos")
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise refused("llama.cpp puts other tokens around a text", where,
                      "bos_token before it and eos_token after it, or nothing",
                      quoted(f"{before} before and {after} after"))  # fmt: skip
    return {"bos": bool(before), "eos": bool(after)}


def _around(single: list[int | None]) -> tuple[list[int | None], list[int | None]]:
    """Return the ids before and after the text, which stands as None."""
    at = single.index(None)
    return single[:at], single[at + 1 :]


def _template(rule: Mapping[str, Any] | None, where: str) -> list[int | None]:
    """Return what becomes of a single text: ids, and None for the text."""
    kind = (rule or {}).get("type")
    if rule is None or kind == "ByteLevel":
        return [None]
    if kind == "Sequence":
        found = [_template(each, where) for each in rule.get("processors") or ()]
        return next((each for each in found if each != [None]), [None])
    if kind != "TemplateProcessing":
        raise refused("it is not known what is put around texts", where,
                      "a TemplateProcessing", quoted(kind))  # fmt: skip
    tokens = rule.get("special_tokens") or {}
    single: list[int | None] = []
    for piece in rule.get("single") or ():
        if "Sequence" in piece:
            single.append(None)
        else:
            single += tokens.get(piece["SpecialToken"]["id"], {}).get("ids", ())
    return single if None in single else [None]


def ends_metadata(ends: Mapping[str, bool]) -> dict[str, bool]:
    """Return what GGUF says of what is put around texts."""
    return {f"tokenizer.ggml.add_{name}_token": added for name, added in ends.items()}


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a model's chat templates by name; its own one is called ``default``.

    As in transformers, files come before what stands in ``tokenizer_config.json``.
    """
    own, found = settings.get("chat_template"), dict[str, str]()
    if isinstance(own, str):
        found["default"] = own
    elif isinstance(own, list):
        pairs = (each for each in own if isinstance(each, dict))
        found = {str(each.get("name")): str(each.get("template")) for each in pairs}
    with typed_os_errors(folder):
        alone = folder / "chat_template.jinja"
        if alone.is_file():
            found["default"] = alone.read_text(encoding="utf-8")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = path.read_text(encoding="utf-8")
    return found


def template_metadata(templates: Mapping[str, str]) -> dict[str, Any]:
    """Return what GGUF says of chat templates."""
    others = {name: text for name, text in templates.items() if name != "default"}
    found: dict[str, Any] = {}
    if others:
        found["tokenizer.chat_templates"] = sorted(others)
    found |= {f"tokenizer.chat_template.{name}": text for name, text in sorted(others.items())}
    if "default" in templates:
        found["tokenizer.chat_template"] = templates["default"]
    return found
