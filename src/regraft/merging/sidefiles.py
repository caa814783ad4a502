"""The files that travel with the weights: tokenizer, templates, processors, code, licence."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.formats.json_file import read_json_object
from regraft.formats.reading import access_error

_TEXT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".codes")
_LEGAL = re.compile(r"^(licen[cs]e|notice|use_policy|copying)([._-].*)?$", re.IGNORECASE)
_NEVER = re.compile(
    r"(^config\.json$|\.index\.json$|^adapter_config\.json$|^adapters?\.|^trainer_state\.json$"
    r"|^training_args|^optimizer|^scheduler|^rng_state|^all_results|^train_results|^eval_results"
    r"|^requirements.*\.txt$|^merges_log)"
)
_TOKENIZER = re.compile(
    r"^(tokenizer|vocab|merges|special_tokens_map|added_tokens|spiece|sentencepiece|source\.spm"
    r"|target\.spm|tekken|bpe\.codes|dict\.txt|.*\.tiktoken$|.*\.model$)"
)
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CARD = "README.md"
_TEMPLATES = "additional_chat_templates"
_LARGEST = 256 * 2**20


def plan_side_files(base: Path, adapters: Sequence[Path], *, code: bool) -> dict[str, Path]:
    """Return the files to copy: name in the output to path.

    The tokenizer of the first adapter that brings one takes the place of the base's as a whole,
    and so does its chat template.

    Args:
        base: the base's folder.
        adapters: the adapters' folders.
        code: whether the config's ``auto_map`` names Python files, which then travel along.
    """
    files = {p.name: p for p in _files(base) if travels(p.name, code=code)}
    files |= _templates(base)
    for folder in adapters:
        own = {p.name: p for p in _files(folder) if travels(p.name, code=False)}
        tokenizer = {name: path for name, path in own.items() if _TOKENIZER.match(name)}
        template = {name: path for name, path in own.items() if name.startswith("chat_template")}
        template |= _templates(folder)
        if not (tokenizer or template):
            continue
        if _is_complete(tokenizer):
            files = {name: path for name, path in files.items() if not _TOKENIZER.match(name)}
        if template or _has_template(tokenizer):
            files = {name: p for name, p in files.items() if "chat_template" not in name}
        return files | tokenizer | template
    return files


def adapter_side_files(folder: Path) -> dict[str, Path]:
    """Return the files that go along with an adapter's weights and config: name to path.

    These are its model card, tokenizer, templates, licences and the like; not the state of its
    training, nor files above 256 MiB.

    Args:
        folder: the adapter's folder.

    Raises:
        AccessError: the system refused to look into it.
    """
    along = {p.name: p for p in _files(folder) if p.name == CARD or travels(p.name, code=False)}
    return along | _templates(folder)


def travels(name: str, *, code: bool) -> bool:
    """Whether a file of a model's folder goes along with its weights."""
    if _NEVER.search(name):
        return False
    return bool(_LEGAL.match(name)) or name.endswith(_TEXT) or (code and name.endswith(".py"))


def _files(folder: Path) -> Iterable[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_file() and p.stat().st_size <= _LARGEST)
    except OSError as error:
        raise access_error(folder, error) from error


def _templates(folder: Path) -> dict[str, Path]:
    inner = folder / _TEMPLATES
    if not inner.is_dir():
        return {}
    return {f"{_TEMPLATES}/{p.name}": p for p in _files(inner) if p.suffix == ".jinja"}


def _is_complete(tokenizer: Mapping[str, Path]) -> bool:
    """Whether an adapter's tokenizer stands on its own: a config and a vocabulary."""
    vocabulary = set(tokenizer) - set(_TOKENIZER_SETTINGS)
    return "tokenizer_config.json" in tokenizer and bool(vocabulary)


def _has_template(tokenizer: Mapping[str, Path]) -> bool:
    path = tokenizer.get("tokenizer_config.json")
    return path is not None and bool(read_json_object(path).get("chat_template"))


def updated_config(config: Mapping[str, Any], updates: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with updates by dotted path; new keys come last, None removes one.

    Raises:
        KeyError: a path leads through something that is not an object.
    """
    result = copy.deepcopy(dict(config))
    for path, value in updates.items():
        *parents, leaf = path.split(".")
        place = result
        for parent in parents:
            place = place[parent]
        if value is None:
            place.pop(leaf, None)
        else:
            place[leaf] = value
    return result


def json_bytes(value: Any, *, sort_keys: bool = False) -> bytes:
    """Return JSON as transformers writes it: two spaces, a final newline."""
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, sort_keys=sort_keys)
    text = io.BytesIO()  # and no list of its pieces, which takes six times the memory
    for piece in encoder.iterencode(value):
        text.write(piece.encode())
    text.write(b"\n")
    return text.getvalue()
