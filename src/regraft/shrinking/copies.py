"""Copies of the base's embeddings in an adapter: are they what the base has?

PEFT saves an embedding along when it (or the output head) is a target, or when the vocabulary grew.
That is right for a vocabulary that grew, and a waste otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regraft.adapters.dialects.peft import strip_wrappers
from regraft.adapters.model import Adapter
from regraft.adapters.wrappers import plain_key
from regraft.deltas.rounding import Bytes, decode, encode
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.planning.whole_parts import whole_part
from regraft.names import NameMap
from regraft.shrinking.report import Outcome
from regraft.tensors import WORKING_DTYPES, TensorSpec

TILE = 2**20
"""Elements that are compared at a time."""

_UNTRAINED = ".original_module."


@dataclass(frozen=True)
class Copy:
    """A tensor of the adapter that belongs to the base.

    Attributes:
        parameter: the parameter it is a copy of.
        spec: the tensor.
    """

    parameter: str
    spec: TensorSpec


def copies_in(files: AdapterFiles, adapter: Adapter) -> list[Copy]:
    """Return the copies in an adapter: embeddings that were saved along but not trained whole."""
    found = [Copy(w.parameter, w.spec) for w in adapter.whole if w.origin == "embedding"]
    known = {whole.spec.name for whole in adapter.whole}
    for name, spec in files.tensors.items():
        if _UNTRAINED in name and name not in known:  # beside the copy that modules_to_save trained
            plain = plain_key(name).replace(_UNTRAINED, ".")
            found.append(Copy(strip_wrappers(plain), spec))
    return found


def compare(copies: Sequence[Copy], base: Checkpoint) -> list[Outcome]:
    """Return what each copy is to a base's tensor of that name, by value.

    Raises:
        FormatError, InputError, AccessError: a tensor cannot be read.
    """
    index = BaseIndex(base, NameMap.for_config(base.config))
    with FilePool() as files:
        return [_outcome(copy, index, files) for copy in copies]


def _outcome(copy: Copy, index: BaseIndex, files: FilePool) -> Outcome:
    finds = index.find(copy.parameter)
    pairs = [
        (whole_part(copy.spec, found, held, index), held.spec)
        for found in finds
        for held in found.held
    ]
    if not pairs:
        return "absent"
    for part, spec in pairs:
        if part is None or spec.dtype not in WORKING_DTYPES:
            return "incomparable"
        if part.shape != spec.shape or not _equal(part, spec, files):
            return "differs"
    return "dropped"


def _equal(copy: TensorSpec, spec: TensorSpec, files: FilePool) -> bool:
    """Whether a base's tensor has a copy's values, once it is in the dtype of the copy."""
    for first in range(0, copy.numel, TILE):
        count = min(TILE, copy.numel - first)
        theirs = decode(_read(files, spec, first, count), spec.dtype)
        ours = decode(_read(files, copy, first, count), copy.dtype)
        if not np.array_equal(ours, decode(encode(theirs, copy.dtype), copy.dtype)):
            return False
    return True


def _read(files: FilePool, spec: TensorSpec, first: int, count: int) -> Bytes:
    raw = np.empty(count * spec.itemsize, np.uint8)
    files.read_into(spec, first * spec.itemsize, raw.data)
    return raw
