"""The tensors of the output: where each comes from, whether it can be stored, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from regraft.adapters.wrappers import peft_key
from regraft.deltas.rounding import Bytes, decode, encode
from regraft.errors import Problem
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.files.reading import FilePool
from regraft.formats.safetensors import build_header
from regraft.progress import ProgressMeter
from regraft.shrinking.factors import Stored, read_stored, reduced, shapes
from regraft.shrinking.forms import Form
from regraft.shrinking.targets import Pair
from regraft.tensors import DTYPES, TensorSpec, nbytes_of

PIECE = 2**20
"""Elements of a tensor that are in memory at a time, where it need not be whole."""


@dataclass(frozen=True)
class Item:
    """A tensor of the output.

    Attributes:
        name: its name, which is that in the adapter.
        dtype: what it is stored in.
        shape: its dimensions.
        spec: the tensor it comes from.
        pair: number of the pair of which it is a factor, or B's bias; None for other tensors.
        side: which of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: TensorSpec
    pair: int | None = None
    side: Literal["a", "b", "bias"] = "a"

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the output."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def stored(self) -> TensorSpec:
        """What it is in the output; of its place only the size is told."""
        return replace(self.spec, dtype=self.dtype, shape=self.shape, nbytes=self.nbytes)


def narrowed(stored: str, dtype: str) -> str:
    """Return what a tensor that is no factor is stored in: ``dtype`` if that takes fewer bits."""
    return dtype if DTYPES[stored].bits > DTYPES[dtype].bits else stored


def dtypes_of(files: AdapterFiles, pairs: Sequence[Pair], dtype: str) -> dict[str, str]:
    """Return what every tensor of an adapter would be stored in, by name.

    Factors get the dtype, with B's bias; DoRA's magnitudes stay, because all of the weight is
    multiplied by them; other tensors are rounded to it only if they are wider.
    """
    chosen = {name: narrowed(spec.dtype, dtype) for name, spec in files.tensors.items()}
    for pair in pairs:
        target = pair.target
        chosen |= {spec.name: dtype for spec in (target.a, target.b, target.b_bias) if spec}
        if target.magnitude is not None:
            chosen[target.magnitude.name] = target.magnitude.dtype
    return chosen


def items_of(
    files: AdapterFiles, pairs: Sequence[Pair], forms: Sequence[Form], dtypes: Mapping[str, str]
) -> list[Item]:
    """Return the tensors of the output, in the order of the file.

    That is the reference library's: wide dtypes first, so that every tensor is aligned, then names.

    Args:
        files: the adapter.
        pairs: its factors.
        forms: what each pair becomes.
        dtypes: what each tensor is stored in, by name; those that are not named are left out.
    """
    items = {
        name: Item(name, dtypes[name], spec.shape, spec)
        for name, spec in files.tensors.items()
        if name in dtypes
    }
    for number, (pair, form) in enumerate(zip(pairs, forms, strict=True)):
        a, b, bias = pair.target.a, pair.target.b, pair.target.b_bias
        of_a, of_b = shapes(pair, form.rank)
        items[a.name] = Item(a.name, dtypes[a.name], of_a, a, number, "a")
        items[b.name] = Item(b.name, dtypes[b.name], of_b, b, number, "b")
        if bias is not None:
            items[bias.name] = Item(bias.name, dtypes[bias.name], bias.shape, bias, number, "bias")
    return sorted(items.values(), key=lambda item: (-DTYPES[item.dtype].bits, peft_key(item.name)))


def header_of(items: Sequence[Item], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a file of these tensors.

    Args:
        items: the tensors.
        metadata: the strings in the header of the adapter's file, which go along: among them is
            what the base looked like.
    """
    entries = [(peft_key(item.name), item.dtype, item.shape) for item in items]
    return build_header(entries, {**metadata, "format": "pt"})


# -- what cannot be stored -------------------------------------------------------------------------


def scan(files: FilePool, spec: TensorSpec, dtype: str) -> tuple[int, int]:
    """Return how many values of a tensor are not finite, and how many more would not be.

    Args:
        files: where it is read from.
        spec: the tensor.
        dtype: what it would be stored in.
    """
    bad = lost = 0
    for raw in _pieces_of(files, spec):
        values = decode(raw, spec.dtype)
        here = _not_finite(values)
        bad += here
        if dtype != spec.dtype:
            lost += _not_finite(decode(encode(values, dtype), dtype)) - here
    return bad, lost


def too_large(name: str, where: str, count: int, dtype: str) -> Problem:
    """Return the refusal of a tensor of which some values are beyond a dtype."""
    return Problem(
        f"the adapter does not fit {DTYPES[dtype].config_name}: values would become infinite",
        f"{where}: {name}",
        "values that the dtype can hold",
        f"{count} that are too large",
        "Give another --dtype: bfloat16 has the range of float32",
    )


def overflow_of(pair: Pair, new: Stored, dtype: str, where: str) -> list[Problem]:
    """Return the refusal of each new factor, or bias, that holds infinities."""
    sides = [(pair.target.a.name, new.a), (pair.target.b.name, new.b)]
    if pair.target.b_bias is not None and new.bias is not None:
        sides.append((pair.target.b_bias.name, new.bias))
    counts = [(name, _not_finite(decode(raw, dtype))) for name, raw in sides]
    return [too_large(name, where, count, dtype) for name, count in counts if count]


def _not_finite(values: np.ndarray) -> int:
    return int(values.size - np.count_nonzero(np.isfinite(values)))


# -- bytes -----------------------------------------------------------------------------------------


def content(
    items: Sequence[Item], pairs: Sequence[Pair], forms: Sequence[Form],
    metadata: Mapping[str, str], files: FilePool, told: ProgressMeter,
) -> Iterator[bytes]:  # fmt: skip
    """Yield the bytes of the output's weights file, front to back.

    Factors are in memory one pair at a time, other tensors a piece at a time.
    """
    yield header_of(items, metadata)
    made: tuple[int, Stored] | None = None
    for item in items:
        if item.pair is None:
            for raw in _pieces_of(files, item.spec):
                yield _converted(raw, item.spec.dtype, item.dtype).tobytes()
        else:
            if made is None or made[0] != item.pair:  # a pair's tensors come one after the other
                made = None
                pair, form = pairs[item.pair], forms[item.pair]
                made = item.pair, reduced(pair, read_stored(files, pair), form, item.dtype)
            yield getattr(made[1], item.side).tobytes()
        told.add(item.nbytes, item.name)


def _converted(raw: Bytes, before: str, after: str) -> Bytes:
    return raw if before == after else encode(decode(raw, before), after)


def _pieces_of(files: FilePool, spec: TensorSpec) -> Iterator[Bytes]:
    step = PIECE * spec.itemsize
    for at in range(0, spec.nbytes, step):
        raw = np.empty(min(step, spec.nbytes - at), np.uint8)
        files.read_into(spec, at, raw.data)
        yield raw
