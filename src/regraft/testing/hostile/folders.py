"""Merged folders with one file changed: does un-merge refuse them, or give the base back?

A run fails if something other than a :class:`~regraft.errors.RegraftError` comes out, if an
un-merge gives anything but the base, if a merge gives other weights than that of the sound folder,
or if a refusal leaves an output.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

import regraft
from regraft.errors import RegraftError
from regraft.formats.safetensors import build_header
from regraft.merging.files.receipt import sealed
from regraft.merging.files.side_files import json_bytes
from regraft.tensors import nbytes_of
from regraft.testing.hostile import mutation, tiny
from regraft.testing.hostile.odd import SOUND_VALUES, damaged, to_json
from regraft.testing.hostile.report import (
    FuzzReport,
    attempt_case,
    count_outcome,
    run_cases,
    scratch,
)

Files = Mapping[str, bytes]
"""The contents of a folder by path; a case is a folder's files with something changed."""

README = """---
language: [en]
license: apache-2.0
tags:
- llama
pipeline_tag: text-generation
model-index:
- name: tiny
  results: []
---
# A tiny model

Text of the card.
"""

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_FRONT_MATTER = (
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n",
    "tags: !!python/object/apply:os.getcwd []\n",
    "license: 2020-13-45\n",
    "date: 2020-02-30\n",
    "license: =\n",
    "? [a, b]\n: c\n",
    "\ttags: x\n",
    "license: *nowhere\n",
    "<<: x\n",
    "<<: [{a: 1}, 3]\n",
    "license: 1:60:60\n",
    "big: 0x" + "f" * 9000 + "\n",
    "big: " + "9" * 9000 + "\n",
    "license: !!binary ä\n",
    "---\n",
    "...\n",
    "%YAML 9.9\n",
    "a: 'unclosed\n",
    "[" * 3000 + "\n",
    "{a: " * 500 + "\n",
    "license: !!set {a}\n",
    "license: !!omap [a: 1]\n",
    "- list\n",
    "just text\n",
    "license: \x00\n",
    "license: \x1b[2J\n",
    "1: 2\n",
    "null: x\n",
    "tags: {a: b}\n",
    "tags: [1, null]\n",
    "base_model: [x, {y: z}]\n",
    "license: |\n  a\n ---\n",
    "license: mit\nlicense: gpl\n",
    ".inf: .nan\n",
    "x" * 200_000 + ": y\n",
    "a: &a {b: *a}\n",
)
"""Lines that a card's YAML may begin with; some are sound, others raise in one way or another."""

_TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ undefined.thing.there }}",
    "{{ 'x' * 10**12 }}",
    "{% include '/etc/passwd' %}",
    "{{ ''.__class__.__mro__ }}",
    "{% if %}",
    "{{",
    "{{ raise_exception('no') }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "\x00",
    "{{ messages | tojson }}",
    "",
)

_SIDE_JSON: dict[str, Any] = {
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": TEMPLATE,
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
    },
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "do_sample": False},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
    "tokenizer.json": {
        "version": "1.0", "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "<s>"},
    },
    "preprocessor_config.json": {"image_size": 4, "do_resize": True},
    "added_tokens.json": {"<x>": 19},
}  # fmt: skip
_SIDE_KEYS = ("chat_template", "eos_token", "bos_token", "added_tokens_decoder", "model", "vocab",
              "tokenizer_class", "auto_map", "added_tokens", "eos_token_id", "version")  # fmt: skip


def write_files(folder: Path, files: Files) -> None:
    """Make a folder hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder by path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def sound_base() -> dict[str, bytes]:
    """Return the files of a tiny base with a card, a tokenizer and a template."""
    return {
        "model.safetensors": _weights(tiny.base_tensors(), 0),
        "config.json": to_json(tiny.base_config()).encode(),
        "README.md": README.encode(),
        "chat_template.jinja": TEMPLATE.encode(),
        **{name: to_json(value).encode() for name, value in _SIDE_JSON.items()},
    }


def sound_adapter() -> dict[str, bytes]:
    """Return the files of an adapter on it."""
    return {
        "adapter_model.safetensors": _weights(tiny.adapter_tensors(), 1),
        "adapter_config.json": to_json(tiny.adapter_config()).encode(),
        "README.md": README.encode(),
    }


def _weights(tensors: list[tiny.TensorShape], seed: int) -> bytes:
    """Return a weight file of numbers between a quarter and a half, in any float dtype."""
    rng = np.random.default_rng(seed)
    parts = []
    for _, dtype, shape in tensors:
        raw = rng.integers(0x80, 0x100, nbytes_of(dtype, shape), dtype=np.uint8)
        raw[nbytes_of(dtype, (1,)) - 1 :: nbytes_of(dtype, (1,))] = 0x3E
        parts.append(raw.tobytes())
    return build_header(tensors, {"format": "pt"}) + b"".join(parts)


# Folders of merged models


def mutated_merges(
    seed: int | str, count: int, merged: Files
) -> Iterator[tuple[dict[str, bytes], bool]]:
    """Yield the files of merged models with something changed in ``regraft/`` or beside it.

    Args:
        seed: the same seed makes the same files.
        count: how many.
        merged: the files of the merge's own.

    Returns:
        The files, and whether the receipt is another than the merge's own.
    """
    for number in range(count):
        rng = random.Random(f"merges {seed} {number}")
        files = dict(merged)
        for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 3))):
            _change_one(rng, files)
        if rng.random() < 0.5:
            files = _resealed(files, files if rng.random() < 0.8 else {})
        yield files, files.get(_RECEIPT) != merged[_RECEIPT]


_RECEIPT = "regraft/receipt.json"


def _change_one(rng: random.Random, files: dict[str, bytes]) -> None:
    """Change, remove, swap or add one file; those of the undo and the receipt most often."""
    own = [name for name in files if name.startswith("regraft/")]
    names = own if own and rng.random() < 0.85 else list(files)
    if not names:
        return
    name = rng.choice(names)
    how = rng.random()
    if how < 0.1:
        del files[name]
    elif how < 0.2:
        files[name] = files[rng.choice(list(files))]
    elif how < 0.3:
        added = rng.choice(("modeling.py", "x.json", "base/config.json", "undo/base/added.py"))
        files[rng.choice(("", "regraft/", "regraft/undo/base/")) + added] = files[name]
    elif name.endswith(".json") and how < 0.8:
        files[name] = _changed_json(rng, files[name])
    else:
        files[name] = damaged(rng, files[name])


def _changed_json(rng: random.Random, content: bytes) -> bytes:
    """Return a JSON file with one to three values changed."""
    try:
        value = mutation.as_pairs(json.loads(content))
    except (ValueError, RecursionError):
        return damaged(rng, content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutation.changed_json(rng, value, _SIDE_KEYS, SOUND_VALUES)
    return to_json(value).encode("utf-8", "surrogatepass")


def _resealed(files: dict[str, bytes], told: Files) -> dict[str, bytes]:
    """Return the files with a receipt whose digests fit them, where it is still JSON.

    Args:
        files: of the merged model.
        told: those whose digests it is to have too, besides its own.
    """
    try:
        value = json.loads(files.get(_RECEIPT, b""))
        value.pop("digest", None)
        value["files"] |= {n: blake3(c).hexdigest() for n, c in told.items() if n in value["files"]}
        return {**files, _RECEIPT: sealed(json_bytes(value))}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return files


def run_merges(count: int, seed: int | str = 0, folder: Path | None = None) -> FuzzReport:
    """Un-merge models whose undo, receipt or other files were changed; one in five is swapped.

    As long as the receipt is the merge's own, the base comes out to the byte, or an error. With
    another receipt, whatever comes out, errors are typed and leave no output.

    Args:
        count: how many.
        seed: of :func:`mutated_merges`.
        folder: where scratch folders may lie; a temporary one by default.
    """
    report = FuzzReport("merged folders")
    with scratch(folder) as place:
        base, adapter, merged, out = (place / n for n in ("base", "adapter", "merged", "out"))
        write_files(base, sound_base())
        write_files(adapter, sound_adapter())
        regraft.merge(base, [adapter], merged)
        wanted = read_files(base)

        def one(case: tuple[dict[str, bytes], bool]) -> None:
            files, forged = case
            write_files(merged, files)
            shutil.rmtree(out, ignore_errors=True)
            undo = report.count % 5 > 0
            act: Callable[[], Any] = (
                (lambda: regraft.unmerge(merged, out))
                if undo
                else (lambda: regraft.swap(merged, [adapter], out))
            )
            outcome = attempt_case(report, act, sorted(files.items()))
            count_outcome(report, outcome)
            if isinstance(outcome, RegraftError) and out.exists():
                report.differ("a refusal left an output", repr(sorted(files)))
            elif undo and not forged and out.exists() and read_files(out) != wanted:
                report.differ("something other than the base came out", repr(sorted(files)))

        run_cases(report, mutated_merges(seed, count, read_files(merged)), count, one)
    return report


# Folders of bases and adapters


def mutated_sides(
    seed: int | str, count: int, base: Files, adapter: Files
) -> Iterator[tuple[dict[str, bytes], dict[str, bytes]]]:
    """Yield bases and adapters whose card, tokenizer, template or other side files were changed.

    Args:
        seed: the same seed makes the same files.
        count: how many.
        base: the files of the sound base.
        adapter: those of the adapter.
    """
    for number in range(count):
        rng = random.Random(f"sides {seed} {number}")
        pair = dict(base), dict(adapter)
        for _ in range(rng.choice((1, 1, 2, 3))):
            files = pair[rng.random() < 0.25]
            name = rng.choice([n for n in files if _is_side_file(n)] or ["README.md"])
            files[name] = _changed_side(rng, name, files.get(name, b""))
        yield pair


def _is_side_file(name: str) -> bool:
    return not name.endswith(".safetensors") and name not in ("config.json", "adapter_config.json")


def _changed_side(rng: random.Random, name: str, content: bytes) -> bytes:
    how = rng.random()
    if how < 0.15:
        return damaged(rng, content)
    if how < 0.2:
        return rng.choice((b"", b"\0" * 5000, b"\xff\xfe" * 40, b"[" * 100_000, b"9" * 10_000))
    if name == "README.md":
        head, rest = content[:4], content[4:]
        return head + rng.choice(_FRONT_MATTER).encode() + rest
    if name.endswith(".jinja"):
        return rng.choice(_TEMPLATES).encode()
    return _changed_json(rng, content)


def run_sides(count: int, seed: int | str = 0, folder: Path | None = None) -> FuzzReport:
    """Merge bases and adapters whose side files were changed.

    The weights of what comes out are those of the sound merge; a refusal leaves no output.

    Args:
        count: how many.
        seed: of :func:`mutated_sides`.
        folder: where scratch folders may lie; a temporary one by default.
    """
    report = FuzzReport("side files")
    with scratch(folder) as place:
        base, adapter, out = (place / name for name in ("base", "adapter", "out"))
        sound = sound_base(), sound_adapter()
        write_files(base, sound[0])
        write_files(adapter, sound[1])
        regraft.merge(base, [adapter], out)
        wanted = (out / _WEIGHTS).read_bytes()

        def one(case: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
            shutil.rmtree(out, ignore_errors=True)
            for path, files in zip((base, adapter), case, strict=True):
                write_files(path, files)
            told = [
                (n, c[:2000])
                for f, s in zip(case, sound, strict=True)
                for n, c in f.items()
                if s.get(n) != c
            ]
            outcome = attempt_case(report, lambda: regraft.merge(base, [adapter], out), told)
            count_outcome(report, outcome)
            if isinstance(outcome, RegraftError) and out.exists():
                report.differ("a refusal left an output", repr(told))
            elif (
                outcome
                and not isinstance(outcome, RegraftError)
                and (out / _WEIGHTS).read_bytes() != wanted
            ):
                report.differ("the weights are others", repr(told))

        run_cases(report, mutated_sides(seed, count, *sound), count, one)
    return report


_WEIGHTS = "model.safetensors"
