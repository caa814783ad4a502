"""Mutated safetensors headers."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from regraft.tensors import DTYPES, nbytes_of
from regraft.testing.hostile.odd import (
    ODD_NUMBERS,
    ODD_TEXTS,
    ODD_VALUES,
    Pairs,
    damaged,
    nested,
    pick,
    to_json,
)

_NAMES = (
    "a", "b", "weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight",
    "lm_head.weight", "权重", "é", "a/b", "x y", 'odd "quoted"', "a..b", "...", "0", "\U0001f600",
    "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight",
)  # fmt: skip
_BAD_DTYPES = ("f32", "F128", "", "BF16 ", "bf16", "F8", "F8_E4M3FN", "INT8", "U4", "I4", "F6",
               "C128", "float32", "F32\0")  # fmt: skip

Doc = list[tuple[Any, Any]]
Change = Callable[[random.Random, Pairs], None]


def sound_header(rng: random.Random) -> tuple[Pairs, int]:
    """Return the pairs of a sound header, and how many bytes of data it describes."""
    entries, offset = Pairs(), 0
    for name in rng.sample(_NAMES, rng.choice((0, 1, 1, 2, 2, 3, 4))):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice((0, 1, 2, 3, 4, 8)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
        if math.prod(shape) * DTYPES[dtype].bits % 8:
            shape.append(4)
        end = offset + nbytes_of(dtype, tuple(shape))
        fields = Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", [offset, end])])
        entries.append((name, fields))
        offset = end
    rng.shuffle(entries)
    if rng.random() < 0.4:
        metadata = {"format": "pt", "note": 'é "x" \n'}
        entries.insert(rng.randint(0, len(entries)), ("__metadata__", metadata))
    return entries, offset


def _tensor(rng: random.Random, entries: Pairs) -> tuple[int, Pairs] | None:
    """Return the place and the fields of one entry, None where there is none left."""
    places = [i for i, (_, fields) in enumerate(entries) if isinstance(fields, Pairs)]
    if not places:
        return None
    at = rng.choice(places)
    return at, entries[at][1]


def _on_fields(change: Callable[[random.Random, Pairs], None]) -> Change:
    def changed(rng: random.Random, entries: Pairs) -> None:
        if found := _tensor(rng, entries):
            change(rng, found[1])

    return changed


def _on_list(key: str, change: Callable[[random.Random, list[Any]], None]) -> Change:
    def changed(rng: random.Random, fields: Pairs) -> None:
        for at, (name, value) in enumerate(fields):
            if name == key and isinstance(value, list):
                fields[at] = (name, values := list(value))
                change(rng, values)

    return _on_fields(changed)


def _odd_item(rng: random.Random, values: list[Any]) -> None:
    value = pick(rng, ODD_NUMBERS)
    at = rng.randint(0, len(values))
    if at == len(values) or rng.random() < 0.2:
        values.insert(at, value)
    else:
        values[at] = value


def _shifted(rng: random.Random, values: list[Any]) -> None:
    by = rng.choice((-8, -4, -1, 1, 4, 8, 2**31, 2**62, 2**63, 2**64, -(2**63)))
    for at in rng.choice(((0,), (1,), (0, 1))):
        if at < len(values) and type(values[at]) is int:
            values[at] += by


def _swapped(_: random.Random, values: list[Any]) -> None:
    values.reverse()


def _shorter(rng: random.Random, values: list[Any]) -> None:
    if values:
        values.pop(rng.randrange(len(values)))


def _odd_dtype(rng: random.Random, fields: Pairs) -> None:
    known = tuple(DTYPES)
    value = rng.choice(known) if rng.random() < 0.4 else pick(rng, (*_BAD_DTYPES, *ODD_VALUES))
    _put(fields, "dtype", value)


def _put(fields: Pairs, key: str, value: Any) -> None:
    for at, (name, _) in enumerate(fields):
        if name == key:
            fields[at] = (key, value)


def _odd_field(rng: random.Random, fields: Pairs) -> None:
    if fields:
        at = rng.randrange(len(fields))
        fields[at] = (fields[at][0], pick(rng, ODD_VALUES))


def _field_twice(rng: random.Random, fields: Pairs) -> None:
    if fields:
        fields.insert(rng.randint(0, len(fields)), rng.choice(fields))


def _fewer_fields(rng: random.Random, fields: Pairs) -> None:
    if fields:
        fields.pop(rng.randrange(len(fields)))


def _more_fields(rng: random.Random, fields: Pairs) -> None:
    key = rng.choice(("x", "Dtype", "offsets", "", "data_offsets ", "strides"))
    fields.append((key, pick(rng, ODD_VALUES)))


def _field_renamed(rng: random.Random, fields: Pairs) -> None:
    if fields:
        at = rng.randrange(len(fields))
        fields[at] = (pick(rng, (*ODD_TEXTS, "Shape", "DTYPE")), fields[at][1])


def _fields_shuffled(rng: random.Random, fields: Pairs) -> None:
    rng.shuffle(fields)


def _deep(rng: random.Random, fields: Pairs) -> None:
    if fields:
        at = rng.randrange(len(fields))
        depth = rng.choice((2, 60, 127, 128, 129, 500, 3000))
        fields[at] = (fields[at][0], nested(depth, rng.choice(("[]", "{}"))))


def _huge_but_empty(_: random.Random, fields: Pairs) -> None:
    _put(fields, "shape", [10**5, 0, 10**10])
    for at, (name, value) in enumerate(fields):
        if name == "data_offsets" and isinstance(value, list) and value:
            fields[at] = (name, [value[0], value[0]])


def _tensor_twice(rng: random.Random, entries: Pairs) -> None:
    if entries:
        entries.insert(rng.randint(0, len(entries)), rng.choice(entries))


def _tensor_renamed(rng: random.Random, entries: Pairs) -> None:
    if entries:
        at = rng.randrange(len(entries))
        others = tuple(name for name, _ in entries)
        entries[at] = (pick(rng, (*ODD_TEXTS, *others)), entries[at][1])


def _tensor_gone(rng: random.Random, entries: Pairs) -> None:
    if entries:
        entries.pop(rng.randrange(len(entries)))


def _tensor_replaced(rng: random.Random, entries: Pairs) -> None:
    if entries:
        at = rng.randrange(len(entries))
        entries[at] = (entries[at][0], pick(rng, ODD_VALUES))


def _more_tensors(rng: random.Random, entries: Pairs) -> None:
    begin = rng.choice((0, 1, 4, 8, 2**63, 2**64 - 1))
    size = rng.choice((0, 1, 4, 8, 2**62))
    fields = [("dtype", "U8"), ("shape", [size]), ("data_offsets", [begin, begin + size])]
    entries.append((rng.choice(_NAMES), Pairs(fields)))


def _odd_metadata(rng: random.Random, entries: Pairs) -> None:
    texts = Pairs((pick(rng, ODD_TEXTS), pick(rng, ODD_VALUES)) for _ in range(2))
    twice = Pairs([("a", "1"), ("a", "1")])
    entries.append(("__metadata__", pick(rng, (texts, twice, *ODD_VALUES))))


_HEADER_CHANGES: tuple[Change, ...] = (
    _on_list("shape", _odd_item), _on_list("shape", _swapped), _on_list("shape", _shorter),
    _on_list("data_offsets", _odd_item), _on_list("data_offsets", _shifted),
    _on_list("data_offsets", _swapped), _on_list("data_offsets", _shorter),
    _on_list("data_offsets", _shifted), _on_list("shape", _odd_item),
    _on_fields(_odd_dtype), _on_fields(_odd_field), _on_fields(_field_twice),
    _on_fields(_fewer_fields), _on_fields(_more_fields), _on_fields(_field_renamed),
    _on_fields(_fields_shuffled), _on_fields(_deep), _on_fields(_huge_but_empty),
    _tensor_twice, _tensor_renamed, _tensor_renamed, _tensor_gone, _tensor_replaced,
    _more_tensors, _odd_metadata,
)  # fmt: skip

_CORPUS = 512


def mutated_headers(seed: int | str, count: int) -> Iterator[bytes]:
    """Yield the contents of small safetensors files: sound ones, and ones with changes.

    Args:
        seed: the same seed yields the same files.
        count: how many.
    """
    rng = random.Random(f"headers {seed}")
    corpus = [sound_header(rng) for _ in range(_CORPUS)]
    data = rng.randbytes(1 << 16)
    for _ in range(count):
        entries, size = corpus[int(rng.random() * _CORPUS)]
        chance = rng.random()
        if chance < 0.85:
            entries = Pairs((n, Pairs(f) if isinstance(f, Pairs) else f) for n, f in entries)
        for _ in range(0 if chance > 0.7 else 1 if chance > 0.25 else rng.randint(2, 4)):
            rng.choice(_HEADER_CHANGES)(rng, entries)
        raw = to_json(entries).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            raw += b" " * rng.randrange(9)
        if chance > 0.95:
            yield _file(raw, data[:size])  # as it was
        elif chance > 0.6 or rng.random() < 0.2:
            yield _damaged_file(rng, raw, data[:size])
        else:
            yield _file(raw, data[: max(0, size + rng.choice((0, 0, 0, 0, 0, 1, -1, 8)))])


def _file(raw: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw + data


def _damaged_file(rng: random.Random, raw: bytes, data: bytes) -> bytes:
    """Return a file with something done to its bytes: of the header, of the length, or of all."""
    how = rng.random()
    if how < 0.6:
        return _file(damaged(rng, raw), data)
    if how < 0.75:
        return damaged(rng, _file(raw, data))
    if how < 0.85:
        lengths = (0, 1, 2, len(raw) - 1, len(raw) + 1, len(raw) + len(data), 10**8, 10**8 + 1,
                   2**31, 2**32, 2**63, 2**64 - 1, len(raw) << 8)  # fmt: skip
        return struct.pack("<Q", max(0, rng.choice(lengths))) + raw + data
    if how < 0.92:
        whole = _file(raw, data)
        return whole[: rng.randrange(len(whole) + 1)]
    return _file(raw, data + rng.choice((b"\0", b"x", b"\0" * 8, raw)))
