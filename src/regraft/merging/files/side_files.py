"""The files that travel with the weights: tokenizer, templates, processors, code, licence."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.formats.files.inside import contents_of
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.text import plain_text
from regraft.formats.problems import quoted

_TEXT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".codes")
_LEGAL = re.compile(r"^(licen[cs]e|notice|use_policy|copying)([._-].*)?\Z", re.IGNORECASE)
_NEVER = re.compile(
    r"(^config\.json\Z|\.index\.json\Z|^adapter_config\.json\Z|^adapters?\.|^trainer_state\.json\Z"
    r"|^training_args|^optimizer|^scheduler|^rng_state|^all_results|^train_results|^eval_results"
    r"|^requirements.*\.txt\Z|^merges_log)"
)
_TOKENIZER = re.compile(
    r"^(tokenizer|vocab|merges|special_tokens_map|added_tokens|spiece|sentencepiece|source\.spm"
    r"|target\.spm|tekken|bpe\.codes|dict\.txt|.*\.tiktoken\Z|.*\.model\Z)"
)
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CARD = "README.md"
TEMPLATES = "additional_chat_templates"
_TEMPLATE = ("chat_template", TEMPLATES)


@dataclass(frozen=True)
class SideFiles:
    """What goes along with an output.

    Attributes:
        files: name in the output to path.
        left_out: what would go along by its name and does not, one sentence each.
    """

    files: Mapping[str, Path]
    left_out: tuple[str, ...] = ()


def plan_side_files(base: Path, adapters: Sequence[Path], *, code: bool) -> SideFiles:
    """Return the files to copy.

    The tokenizer of the first adapter that brings one takes the place of the base's as a whole,
    and so does its chat template.

    Args:
        base: the base's folder.
        adapters: the adapters' folders.
        code: whether the config's ``auto_map`` names Python files, which then travel along.

    Raises:
        AccessError: the system refused to look into a folder.
        FormatError: an adapter's ``tokenizer_config.json`` cannot be read.
    """
    found = _along(base, lambda name: travels(name, code=code))
    files, left_out = dict(found.files), list(found.left_out)
    for folder in adapters:
        own = _along(folder, lambda name: travels(name, code=False) and _is_tokenizer(name))
        left_out += own.left_out
        template = {n: path for n, path in own.files.items() if n.startswith(_TEMPLATE)}
        tokenizer = {name: path for name, path in own.files.items() if name not in template}
        if not (tokenizer or template):
            continue
        if _is_complete(tokenizer):
            files = {name: path for name, path in files.items() if not _TOKENIZER.match(name)}
        if template or _has_template(tokenizer):
            files = {name: p for name, p in files.items() if "chat_template" not in name}
        return SideFiles(files | tokenizer | template, tuple(left_out))
    return SideFiles(files, tuple(left_out))


def adapter_side_files(folder: Path) -> SideFiles:
    """Return the files that go along with an adapter's weights and config.

    These are its model card, tokenizer, templates, licences and the like; not the state of its
    training, nor files above 256 MiB.

    Args:
        folder: the adapter's folder.

    Raises:
        AccessError: the system refused to look into it.
    """
    return _along(folder, lambda name: name == CARD or travels(name, code=False))


def tokenizer_files(folder: Path) -> Mapping[str, Path]:
    """Return the tokenizer's files in a folder, and chat templates, by their names."""
    return _along(folder, _is_tokenizer).files


def travels(name: str, *, code: bool) -> bool:
    """Whether a file of a model's folder goes along with its weights."""
    if _NEVER.search(name):
        return False
    return bool(_LEGAL.match(name)) or name.endswith(_TEXT) or (code and name.endswith(".py"))


def _is_tokenizer(name: str) -> bool:
    return bool(_TOKENIZER.match(name)) or name.startswith(_TEMPLATE)


def _along(folder: Path, wanted: Callable[[str], bool]) -> SideFiles:
    """Return the files of a folder that are wanted by name, and its chat templates."""
    found = contents_of(folder)
    files = {name: path for name, path in found.files.items() if wanted(name)}
    others = {name: why for name, why in found.others.items() if wanted(name)}
    if (folder / TEMPLATES).is_dir():
        templates = contents_of(folder, TEMPLATES)
        files |= {n: path for n, path in templates.files.items() if path.suffix == ".jinja"}
        others |= {n: why for n, why in templates.others.items() if n.endswith(".jinja")}
    return SideFiles(files, tuple(_left_out(folder, name, why) for name, why in others.items()))


def _left_out(folder: Path, name: str, why: str) -> str:
    shown = quoted(name)
    hint = ". Put a copy of the file in its place if it belongs there" if "link" in why else ""
    return f"{shown} of {plain_text(str(folder))} is {why}, and does not go along{hint}"


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
