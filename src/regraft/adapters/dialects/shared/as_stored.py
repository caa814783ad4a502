"""An adapter as its file has it: what can be said of one that cannot be read without its base."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from regraft.adapters.dialects.registry import Dialect
from regraft.adapters.dialects.shared.torch_files import read_tensors
from regraft.errors import InputError
from regraft.tensors import VIRTUAL, TensorSpec

_PART = re.compile(r"(?P<module>.+)\.(?P<what>lora_[aAbB]|magnitude|m)(\.weight)?")
_IN_PEFT = {
    "lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector",
    "m": "lora_magnitude_vector",
}  # fmt: skip


def stored_tensors(path: Path, dialect: Dialect) -> tuple[Path, dict[str, TensorSpec]]:
    """Return an adapter's file and its tensors, to be described and not read.

    Modules have the names that they have in the file, factors those of PEFT. A is (r, in); B is
    (rows, r), a stack's of the rows of all its matrices. So a rank is what B says it is: q, k and v
    in one module have one A below the other.

    Args:
        path: its folder, or its weights file.
        dialect: what it is written in.

    Raises:
        RegraftError: the file is missing, or cannot be read.
    """
    file = _weights(path, dialect)
    found = {}
    for name, spec in read_tensors(file, under="model").items():
        match = _PART.fullmatch(name)
        what = match["what"] if match else ""
        peft = f"{match['module']}.{_IN_PEFT[what.lower()]}" if match else name
        shape = _shape(spec.shape, what.lower(), turned=dialect.turned)
        found[peft] = replace(spec, name=peft, shape=shape, start=VIRTUAL)
    return file, found


def _shape(shape: tuple[int, ...], what: str, *, turned: bool) -> tuple[int, ...]:
    """Return a factor's shape as PEFT has it; matrices of a stack lie below each other."""
    if len(shape) < 2 or not what.startswith("lora"):
        return shape
    *stack, rows, columns = shape
    if turned and not stack:
        rows, columns = columns, rows
    for count in stack:
        rows *= count
    return rows, columns


def _weights(path: Path, dialect: Dialect) -> Path:
    """Return an adapter's file: the one of the usual name, else the only one there is."""
    if not path.is_dir():
        return path
    usual = path / dialect.weights
    found = [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
    found = found or sorted(each for each in path.iterdir() if each.suffix in (".pt", ".bin"))
    if len(found) != 1:
        raise InputError("holds no single adapter", where=str(path), expected=dialect.weights,
                         found=", ".join(p.name for p in found[:8]) or "none")  # fmt: skip
    return found[0]
