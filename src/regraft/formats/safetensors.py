"""The safetensors container: reading headers strictly, and building them.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes. What
:func:`read_header` accepts is a strict subset of what the reference parser accepts: that one takes
duplicate tensor names, unknown fields and names such as ``../../x``, which are refused here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import FormatError, Problem
from regraft.formats.files.json_file import json_trouble, unique_object
from regraft.formats.files.reading import open_regular, read_at
from regraft.formats.problems import DOWNLOAD_AGAIN, SAFE_NAME, capped, is_unsafe_name, quoted
from regraft.tensors import DTYPES, TensorSpec, nbytes_of

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the JSON."""

MAX_TENSORS = 300_000
"""Far above any real file; keeps a hostile header from taking gigabytes once it is parsed."""

METADATA_KEY = "__metadata__"

_PREFIX_BYTES = 8
_LIMIT = 2**63
_TOKENS_PER_TENSOR = 16
_SPARE_TOKENS = 1_000_000
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Header:
    """What the header of one safetensors file says, checked against the file's size.

    Attributes:
        path: the file.
        tensors: by name, in order of offset; together they fill the file to its last byte.
        metadata: the free-form strings under ``__metadata__``.
        data_start: absolute offset of the first tensor's first byte.
        file_size: bytes of the whole file.
    """

    path: Path
    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int
    file_size: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, every part of it checked.

    Raises:
        FormatError: the file is not well-formed; it lists every bad tensor.
        InputError: there is no such file.
        AccessError: the system refused to read it.
    """
    raw, file_size = _raw_header(path)
    fields = _parse(path, raw)
    metadata = fields.pop(METADATA_KEY, None)
    metadata = {} if metadata is None else metadata  # null, which MLX writes, is none at all
    problems = _metadata_problems(path, metadata)
    problems += [p for name in fields for p in _tensor_problems(path, name, fields[name])]
    if problems:
        raise FormatError(capped(problems, path))
    data_start = _PREFIX_BYTES + len(raw)
    tensors = _specs(path, fields, data_start)
    problems = _layout_problems(path, tensors, data_start, file_size)
    if problems:
        raise FormatError(capped(problems, path))
    return Header(path, {t.name: t for t in tensors}, metadata, data_start, file_size)


def _raw_header(path: Path) -> tuple[bytes, int]:
    """Return the JSON's bytes and the file's size."""
    fd = open_regular(path)
    try:
        file_size = os.fstat(fd).st_size
        prefix = read_at(fd, path, 0, _PREFIX_BYTES)
        length = int.from_bytes(prefix, "little")
        room = file_size - _PREFIX_BYTES
        if len(prefix) < _PREFIX_BYTES or not 2 <= length <= min(room, MAX_HEADER_BYTES):
            raise _bad_length(path, file_size, length)
        raw = read_at(fd, path, _PREFIX_BYTES, length)
    finally:
        os.close(fd)
    if len(raw) < length or raw[:1] != b"{":
        raise FormatError(
            "is not a safetensors file",
            where=str(path),
            expected="a JSON header that begins with '{'",
            found=quoted(raw[:8].decode("latin-1")),
            hint=f"Check that this is the file you mean. {DOWNLOAD_AGAIN}",
        )
    return raw, file_size


def _bad_length(path: Path, file_size: int, length: int) -> FormatError:
    if file_size < _PREFIX_BYTES:
        expected, found = "at least 10 bytes", f"{file_size} bytes"
    elif length > MAX_HEADER_BYTES:
        expected, found = f"a header of at most {MAX_HEADER_BYTES} bytes", f"{length} bytes"
    else:
        expected = "a header of 2 bytes or more that fits the file"
        found = f"a header of {length} bytes in a file of {file_size} bytes"
    return FormatError(
        "is not a whole safetensors file",
        where=str(path),
        expected=expected,
        found=found,
        hint=f"{DOWNLOAD_AGAIN}; a Git LFS pointer must first be fetched (git lfs pull)",
    )


def _refuse_bloat(path: Path, raw: bytes) -> None:
    """Raise where the JSON holds far more values than its tensors need, before it is parsed."""
    tensors = raw.count(b'"data_offsets"')
    tokens = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if tensors > MAX_TENSORS or tokens > _TOKENS_PER_TENSOR * tensors + _SPARE_TOKENS:
        raise FormatError(
            "the safetensors header would take too much memory",
            where=str(path),
            expected=f"at most {MAX_TENSORS} tensors, and little besides them",
            found=f"{tensors} tensors, and {tokens} brackets and commas",
            hint=f"Do not trust this file. {DOWNLOAD_AGAIN}, from its author",
        )


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    _refuse_bloat(path, raw)
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=unique_object, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            "the safetensors header cannot be read",
            where=str(path),
            expected="UTF-8 JSON in which no key occurs twice",
            found=json_trouble(error),
            hint=DOWNLOAD_AGAIN,
        ) from None
    assert isinstance(fields, dict)  # it begins with a brace
    return fields


def _integer(digits: str) -> int:
    """Return the number; ``-0``, which the reference parser refuses, becomes a negative one."""
    return -1 if digits == "-0" else int(digits)


def _metadata_problems(path: Path, metadata: Any) -> list[Problem]:
    if not isinstance(metadata, dict):
        found = f"a {type(metadata).__name__}"
    else:
        bad = [key for key, value in metadata.items() if not _is_text(key) or not _is_text(value)]
        if not bad:
            return []
        found = f"something else at {quoted(bad[0])}"
    expected = "an object of strings"
    return [
        Problem(f"{METADATA_KEY} is malformed", str(path), expected, found, DOWNLOAD_AGAIN),
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _tensor_problems(path: Path, name: str, entry: Any) -> list[Problem]:
    """Return what is wrong with one tensor's entry, looked at by itself."""
    parts = entry_trouble(name, entry)
    if parts is None:
        return []
    what, expected, found = parts
    return [Problem(what, f"{path}, tensor {quoted(name)}", expected, found, DOWNLOAD_AGAIN)]


def entry_trouble(name: str, entry: Any) -> tuple[str, str, str] | None:
    """Return (what, expected, found) for the first thing wrong with a tensor's entry, or None."""
    if is_unsafe_name(name):
        return "the tensor's name is unsafe", SAFE_NAME, quoted(name)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = ", ".join(map(quoted, entry)) if isinstance(entry, dict) else "no object"
        return "the tensor's entry is malformed", "dtype, shape and data_offsets", found
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return "the dtype is unknown", f"one of {', '.join(DTYPES)}", quoted(dtype)
    if not _are_sizes(shape):
        return "the shape is malformed", "a list of whole numbers from 0 to 2**63", quoted(shape)
    if not _are_sizes(offsets) or len(offsets) != 2:
        return "data_offsets is malformed", "a begin and an end", quoted(offsets)
    return _size_trouble(dtype, shape, offsets)


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110  # a generator takes twice as long, a hundred thousand times
        if type(n) is not int or not 0 <= n < _LIMIT:  # bool is an int to isinstance
            return False
    return True


def _size_trouble(dtype: str, shape: list[int], offsets: list[int]) -> tuple[str, str, str] | None:
    bits = DTYPES[dtype].bits
    for size in shape:
        bits *= size or 1  # a zero must not hide an overflow in the other dimensions
        if bits >= _LIMIT:
            return "the shape overflows", "less than 2**63 bits", quoted(shape)
    if 0 in shape:
        bits = 0
    if bits % 8:
        return "the tensor ends inside a byte", "a multiple of 8 bits", f"{bits} bits"
    if offsets[1] - offsets[0] != bits // 8:
        expected = f"{bits // 8} bytes for {dtype} {shape}"
        return "size and data_offsets disagree", expected, f"{offsets[0]} to {offsets[1]}"
    return None


def _specs(path: Path, fields: dict[str, Any], data_start: int) -> list[TensorSpec]:
    """Return the tensors in order of offset; an empty one comes before what shares its place."""
    tensors = [
        TensorSpec(
            name, entry["dtype"], tuple(entry["shape"]), path, data_start + begin, end - begin
        )
        for name, entry in fields.items()
        for begin, end in (entry["data_offsets"],)
    ]
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes))


def _layout_problems(
    path: Path, tensors: list[TensorSpec], data_start: int, file_size: int
) -> list[Problem]:
    """Return every gap and overlap, and whether the file ends where the last tensor does."""
    problems = []
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "a gap lies before it"
            where = f"{path}, tensor {quoted(tensor.name)}"
            expected, found = f"it to begin at byte {end}", f"byte {tensor.start}"
            problems.append(Problem(what, where, expected, found, DOWNLOAD_AGAIN))
        end = max(end, tensor.start + tensor.nbytes)
    if end != file_size:
        what = "the file is cut short" if end > file_size else "bytes follow the last tensor"
        expected, found = f"{end} bytes", f"{file_size} bytes"
        problems.append(Problem(what, str(path), expected, found, DOWNLOAD_AGAIN))
    return problems


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    align: int = 8,
    remainder: int = 0,
) -> bytes:
    """Return the first bytes of a file whose tensors lie in the order given, without gaps.

    With ``align=8`` these are the bytes the reference library writes for the same tensors in the
    same order, but for two things: several metadata keys are sorted here, where the library's
    order is random, and empty metadata is left out.

    Args:
        tensors: name, dtype (a key of ``DTYPES``) and shape of each tensor.
        metadata: free-form strings to travel with them.
        align: the data begins at a multiple of this many bytes,
        remainder: or so many behind one.

    Raises:
        FormatError: the header would not be read back: a name is taken twice or is unsafe, a
            tensor ends inside a byte, or the JSON is larger than the format allows.
    """
    entries: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + nbytes_of(dtype, shape)
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        trouble = entry_trouble(name, entry)
        if name in entries or name == METADATA_KEY:
            trouble = ("the tensor's name is taken", "each name once", quoted(name))
        if trouble:
            raise FormatError(Problem(trouble[0], f"tensor {quoted(name)}", *trouble[1:]))
        entries[name] = entry
        offset = end
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return _framed(raw, align, remainder)


def _framed(raw: bytes, align: int, remainder: int = 0) -> bytes:
    raw += b" " * ((remainder - _PREFIX_BYTES - len(raw)) % align)
    if len(raw) > MAX_HEADER_BYTES:
        raise FormatError(
            "the header is too large to write",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{len(raw)} bytes",
            hint="Write more and smaller shards (--shard-size)",
        )
    return len(raw).to_bytes(_PREFIX_BYTES, "little") + raw
