"""GGUF files: their metadata, and where each tensor's bytes lie; no tensor is read.

The header is read front to back, and everything in it is held against the size of the file before
memory is taken for it. The ``gguf`` package says which types of blocks there are. (Its own reader
makes an array of every token of the vocabulary, and believes what a file says of itself.)

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import (
    FormatError,
    InputError,
    MissingExtraError,
    Problem,
    UnsupportedError,
)
from regraft.formats.files.reading import open_regular, read_at, typed_os_errors
from regraft.formats.problems import DOWNLOAD_AGAIN, SAFE_NAME, capped, is_unsafe_name, quoted
from regraft.tensors import TensorSpec

__all__ = [
    "GgufArray", "GgufEntry", "GgufFile", "GgufHead", "GgufTensor", "find_gguf", "gguf_package",
    "open_gguf", "read_head",
]  # fmt: skip

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 64 * 2**20
_MAX_TENSORS, _LEAST_TENSOR_BYTES = 300_000, 24
_MAX_KEYS, _LEAST_KEY_BYTES = 100_000, 13
_MAX_DIMENSIONS = 4
_LIMIT = 2**63
_SHORT_ARRAY = 4096
"""Numbers that an array may have to be read at once; one token's score after another is not."""

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""How :mod:`struct` names GGUF's types of numbers."""

_TEXT, _ARRAY = 8, 9
_PIECE_BYTES = 2**20
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: as llama.cpp names it, such as ``blk.0.attn_q.weight``.
        type: name of its ggml type, such as ``Q4_K``.
        shape: its dimensions, the last one contiguous: ggml's, in reverse.
        stored: where its blocks lie, as one row of bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    stored: TensorSpec


@dataclass(frozen=True)
class GgufArray:
    """A long array of the metadata, such as a vocabulary: where it lies.

    Attributes:
        kind: GGUF's number of the type of its elements.
        count: number of elements.
        path, start, nbytes: the bytes of its elements.
    """

    kind: int
    count: int
    path: Path
    start: int
    nbytes: int

    def values(self) -> list[Any]:
        """Return the elements: strings or numbers.

        Raises:
            FormatError: a string is not UTF-8, or the file has changed.
            InputError: the file has gone.
            AccessError: the system refused to read it.
        """
        fd = open_regular(self.path)
        try:
            raw = read_at(fd, self.path, self.start, self.nbytes)
        finally:
            os.close(fd)
        try:
            if self.kind != _TEXT:
                return list(struct.unpack(f"<{self.count}{_NUMBERS[self.kind]}", raw))
            return list(_texts(raw, self.count))
        except (struct.error, UnicodeDecodeError):
            found = f"other bytes after byte {self.start}"
            raise _malformed(self.path, "strings in UTF-8", found) from None


Value = int | float | bool | str | tuple[int | float | bool, ...] | GgufArray
"""A value of the metadata."""


@dataclass(frozen=True)
class GgufFile:
    """A model in GGUF: one file, or all parts of one that was split.

    Attributes:
        paths: its files, in order.
        architecture: what llama.cpp calls its architecture, such as ``llama``.
        metadata: keys and values of the first file.
        tensors: by name, in order of file and offset.
    """

    paths: tuple[Path, ...]
    architecture: str
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    def of_architecture(self, key: str) -> Value | None:
        """Return the value of a key that begins with the architecture; None if it is not there."""
        return self.metadata.get(f"{self.architecture}.{key}")


def gguf_package() -> Any:
    """Return the ``gguf`` package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise MissingExtraError(
            "the gguf package is needed to read GGUF models",
            hint="Run pip install 'regraft[gguf]'",
        ) from None
    return gguf


def find_gguf(path: Path) -> Path:
    """Return the GGUF file that is meant by a file or by a folder that holds one model.

    A file whose name begins with ``mmproj`` is an encoder of images that goes with a model.

    Raises:
        InputError: a folder holds none or several.
        AccessError: the system refused to read it.
    """
    with typed_os_errors(path):
        if not path.is_dir():
            return path
        names = sorted(file.name for file in path.iterdir() if file.suffix == ".gguf")
    parts = {name: _PART.fullmatch(name) for name in names if not name.startswith("mmproj")}
    models = [name for name, part in parts.items() if part is None or part["number"] == "00001"]
    if len(models) == 1:
        return path / models[0]
    raise InputError(
        "which GGUF model is meant?" if models else "holds no GGUF model",
        where=str(path),
        expected="one .gguf file",
        found=", ".join(map(quoted, models[:5])) or "none",
        hint="Give the file by its path" if models else "Check the path",
    )


def open_gguf(path: Path) -> GgufFile:
    """Open a model in GGUF; of a split one, any part may be given.

    Raises:
        FormatError: a file is malformed, or a part is missing; lists every bad tensor.
        UnsupportedError: sound, but big-endian, or of another version than 2 or 3.
        InputError: there is no such file, or it is one part under another name.
        MissingExtraError: the ``gguf`` package is not installed.
        AccessError: the system refused to read it.
    """
    sizes = _block_sizes()
    with typed_os_errors(path):
        paths = _parts(path)
    opened = [_open_part(part, sizes) for part in paths]
    metadata = opened[0][0]
    _check_split(paths, [each for each, _ in opened], sum(len(each) for _, each in opened))
    tensors: dict[str, GgufTensor] = {}
    for part, (_, found) in zip(paths, opened, strict=True):
        _check_unique(part, tensors, found)
        tensors |= {tensor.name: tensor for tensor in found}
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _malformed(paths[0], "general.architecture: the name of one", quoted(architecture))
    return GgufFile(tuple(paths), architecture, metadata, tensors)


def general_type(path: Path) -> str | None:
    """Return ``general.type`` of a GGUF file, such as ``adapter``; None where it does not say.

    The keys of a file are read and no tensors, so no package is needed.

    Raises:
        AccessError: the system refused to read it.
    """
    try:
        fd = open_regular(path)
        try:
            header = _Header(fd, path)
            _, keys = header.counts()
            found = _first(header, keys, "general.type")
        finally:
            os.close(fd)
    except InputError:
        return None  # malformed: whoever opens it says so
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class GgufEntry:
    """What the table of a file says of a tensor.

    Attributes:
        name: as in the file.
        dimensions: as ggml orders them, the contiguous one first.
        kind: ggml's number of its type.
        offset: where its blocks begin, from the beginning of the data.
    """

    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHead:
    """What lies before the tensors of a file, to be written again.

    Attributes:
        version: of the format.
        keys: how many keys there are.
        metadata: their bytes, from the first key to the end of the last value.
        entries: the table of tensors, in its order.
        alignment: what offsets are multiples of.
        size: bytes up to where the data begin.
    """

    version: int
    keys: int
    metadata: bytes
    entries: tuple[GgufEntry, ...]
    alignment: int
    size: int


def read_head(path: Path) -> GgufHead:
    """Return what lies before the tensors of one file; their places are not checked.

    Raises:
        FormatError, UnsupportedError, InputError, AccessError: as :func:`open_gguf`.
    """
    fd = open_regular(path)
    try:
        header = _Header(fd, path)
        tensors, keys = header.counts()
        first = header.position
        alignment = _alignment(path, _metadata(header, keys))
        metadata = read_at(fd, path, first, header.position - first)
        infos = [_Info.of(header) for _ in range(tensors)]
        (version,) = struct.unpack("<I", read_at(fd, path, len(_MAGIC), 4))
    finally:
        os.close(fd)
    entries = tuple(GgufEntry(i.name, i.dimensions, i.kind, i.offset) for i in infos)
    size = -(-header.position // alignment) * alignment
    return GgufHead(version, keys, metadata, entries, alignment, size)


def _block_sizes() -> dict[int, tuple[str, int, int]]:
    """Return name, elements and bytes of a block of each ggml type, by its number."""
    sizes = gguf_package().GGML_QUANT_SIZES
    return {int(kind): (str(kind.name), int(n), int(b)) for kind, (n, b) in sizes.items()}


def _parts(path: Path) -> list[Path]:
    """Return all files of the model that a file belongs to."""
    part = _PART.fullmatch(path.name)
    count = int(part["count"]) if part else 0
    if part is None or not 1 <= int(part["number"]) <= count:
        return [path]
    names = [f"{part['stem']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if len(missing) == count:
        return [path]
    if not missing:
        return [path.parent / name for name in names]
    raise FormatError(capped([
        Problem("a part of the model is missing", str(path.parent / name), f"all {count} parts",
                hint="Download the missing file")
        for name in missing
    ], path))  # fmt: skip


def _check_split(paths: Sequence[Path], metadata: list[dict[str, Value]], tensors: int) -> None:
    """Hold what the files say of how the model was split against what is there."""
    count = metadata[0].get("split.count", 0)
    if len(paths) == 1:
        if isinstance(count, int) and count > 1:
            raise InputError(
                "is one part of a model, under a name that does not tell the others",
                where=str(paths[0]),
                expected=f"a name such as model-00001-of-{count:05d}.gguf",
                hint="Give it the name back that it was downloaded under",
            )
        return
    for path, each in zip(paths, metadata, strict=True):
        if each.get("split.count") != len(paths):
            found = quoted(each.get("split.count"))
            raise _malformed(path, f"split.count: {len(paths)}, as there are", found)
    said = metadata[0].get("split.tensors.count", tensors)
    if said != tensors:
        raise _malformed(paths[0], f"split.tensors.count: {tensors}, as there are", quoted(said))


def _check_unique(path: Path, there: dict[str, GgufTensor], found: list[GgufTensor]) -> None:
    twice = [tensor.name for tensor in found if tensor.name in there]
    if twice:
        raise FormatError(capped([
            Problem("a tensor is in two parts", f"{path}, {quoted(name)}", hint=DOWNLOAD_AGAIN)
            for name in twice
        ], path))  # fmt: skip


def _open_part(
    path: Path, sizes: dict[int, tuple[str, int, int]]
) -> tuple[dict[str, Value], list[GgufTensor]]:
    """Return metadata and tensors of one file, in order of offset."""
    fd = open_regular(path)
    try:
        header = _Header(fd, path)
        tensor_count, key_count = header.counts()
        metadata = _metadata(header, key_count)
        infos = [_Info.of(header) for _ in range(tensor_count)]
        alignment = _alignment(path, metadata)
        start = -(-header.position // alignment) * alignment
        return metadata, _tensors(path, infos, sizes, start, alignment, header.size)
    finally:
        os.close(fd)


def _alignment(path: Path, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _malformed(path, "general.alignment: a power of two", quoted(alignment))
    return alignment


class _Header:
    """The head of a file, taken front to back; what the file does not hold cannot be taken."""

    def __init__(self, fd: int, path: Path) -> None:
        self.path, self.size = path, os.fstat(fd).st_size
        self._fd, self._piece, self._at, self._start = fd, b"", 0, 0

    @property
    def position(self) -> int:
        """Absolute offset of the next byte."""
        return self._start + self._at

    def expect(self, count: int, what: str) -> None:
        """Refuse to go on where less than this number of bytes is left."""
        left = self.size - self.position
        if count > left:
            raise _malformed(self.path, f"{count} bytes of {what}", f"{left} up to the file's end")
        if self.position + count > _MAX_HEADER_BYTES:
            most = f"a header of at most {_MAX_HEADER_BYTES} bytes"
            raise _malformed(self.path, most, f"{count} bytes of {what}")

    def take(self, count: int, what: str = "the header") -> bytes:
        """Return the next bytes."""
        if self._at + count > len(self._piece):
            self.expect(count, what)
            more = read_at(self._fd, self.path, self.position, max(count, _PIECE_BYTES))
            self._start, self._piece, self._at = self.position, more, 0
            if len(more) < count:
                raise _malformed(self.path, f"{count} bytes of {what}", f"{len(more)} bytes")
        self._at += count
        return self._piece[self._at - count : self._at]

    def number(self, code: str) -> Any:
        """Return the next number."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, what: str) -> str:
        """Return the next string."""
        raw = self.take(self.number("Q"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            found = quoted(raw[:40].decode("latin-1"))
            raise _malformed(self.path, f"{what} in UTF-8", found) from None

    def skip_texts(self, count: int, what: str) -> None:
        """Go past strings."""
        unpack = struct.Struct("<Q").unpack
        for _ in range(count):
            self.take(unpack(self.take(8, what))[0], what)

    def counts(self) -> tuple[int, int]:
        """Go past the fixed fields; return the number of tensors and of keys."""
        magic = self.take(4) if self.size >= 4 else b""
        if magic != _MAGIC:
            raise _malformed(
                self.path, "a file that begins with GGUF", quoted(magic.decode("latin-1"))
            )
        version = self.number("I")
        if version not in _VERSIONS:
            big_endian = version & 0xFFFF == 0
            raise UnsupportedError(
                "this kind of GGUF is not read", where=str(self.path),
                expected="version 2 or 3, little-endian",
                found="a big-endian file" if big_endian else f"version {version}",
                hint="Convert the model again with a current llama.cpp",
            )  # fmt: skip
        tensors, keys = self.number("Q"), self.number("Q")
        limits = ((tensors, _MAX_TENSORS, "tensors"), (keys, _MAX_KEYS, "keys"))
        for count, most, what in limits:
            if count > most:
                raise _malformed(self.path, f"at most {most} {what}", str(count))
        self.expect(tensors * _LEAST_TENSOR_BYTES + keys * _LEAST_KEY_BYTES, "tensors and keys")
        return tensors, keys


def _metadata(header: _Header, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = header.text("a key")
        if key in metadata:
            raise _malformed(header.path, "each key once", f"{quoted(key)} twice")
        metadata[key] = _value(header, key, header.number("I"))
    return metadata


def _first(header: _Header, count: int, wanted: str) -> Value | None:
    """Return the value of a key, and read no further than that; None if it is not there."""
    for _ in range(count):
        key = header.text("a key")
        value = _value(header, key, header.number("I"))
        if key == wanted:
            return value
    return None


def _value(header: _Header, key: str, kind: int) -> Value:
    if kind in _NUMBERS:
        number: int | float | bool = header.number(_NUMBERS[kind])
        return number
    if kind == _TEXT:
        return header.text(f"the value of {quoted(key)}")
    if kind == _ARRAY:
        return _array(header, key, header.number("I"), header.number("Q"))
    raise _malformed(header.path, f"a value of a known type for {quoted(key)}", f"type {kind}")


def _array(header: _Header, key: str, kind: int, count: int) -> Value:
    what = f"the array {quoted(key)}"
    if kind not in (*_NUMBERS, _TEXT):
        raise _malformed(header.path, f"numbers or strings in {what}", f"type {kind}")
    width = 8 if kind == _TEXT else struct.calcsize("<" + _NUMBERS[kind])
    header.expect(count * width, what)
    start = header.position
    if kind == _TEXT:
        header.skip_texts(count, what)
    elif count <= _SHORT_ARRAY:
        return struct.unpack(f"<{count}{_NUMBERS[kind]}", header.take(count * width, what))
    else:
        header.take(count * width, what)
    return GgufArray(kind, count, header.path, start, header.position - start)


def _texts(raw: bytes, count: int) -> Iterator[str]:
    at = 0
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        yield raw[at + 8 : at + 8 + length].decode()
        at += 8 + length


@dataclass(frozen=True)
class _Info:
    """What the header says of a tensor: its dimensions as ggml orders them."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int

    @classmethod
    def of(cls, header: _Header) -> _Info:
        """Take the next one."""
        name = header.text("a tensor's name")
        count = header.number("I")
        if count > _MAX_DIMENSIONS:
            where = f"dimensions of {quoted(name)}"
            raise _malformed(header.path, f"at most {_MAX_DIMENSIONS} {where}", str(count))
        dimensions = struct.unpack(f"<{count}Q", header.take(8 * count))
        return cls(name, dimensions, header.number("I"), header.number("Q"))


def _tensors(
    path: Path, infos: list[_Info], sizes: dict[int, tuple[str, int, int]], start: int,
    alignment: int, file_size: int,
) -> list[GgufTensor]:  # fmt: skip
    """Return the tensors in order of offset, all that is said of them checked."""
    infos = sorted(infos, key=lambda info: info.offset)
    problems, tensors = [], []
    names: set[str] = set()
    end = 0
    for info in infos:
        trouble = _info_trouble(info, sizes) or _place_trouble(info, sizes, end, alignment)
        if not trouble and start + info.offset + _nbytes(info, sizes) > file_size:
            trouble = ("bytes inside the file", f"bytes up to {start + info.offset} and beyond it")
        if info.name in names:
            trouble = ("each name once", "it twice")
        names.add(info.name)
        if trouble:
            where = f"{path}, tensor {quoted(info.name)}"
            problems.append(Problem("the tensor is malformed", where, *trouble, DOWNLOAD_AGAIN))
            continue
        end = info.offset + _nbytes(info, sizes)
        tensors.append(_tensor(path, info, sizes, start))
    if problems:
        raise FormatError(capped(problems, path))
    return tensors


def _info_trouble(info: _Info, sizes: dict[int, tuple[str, int, int]]) -> tuple[str, str] | None:
    """Return what was expected of a tensor, and found."""
    if is_unsafe_name(info.name):
        return SAFE_NAME, "another name"
    if info.kind not in sizes:
        return "a type that the installed gguf package knows", f"type {info.kind}"
    if math.prod(info.dimensions) >= _LIMIT or any(size >= _LIMIT for size in info.dimensions):
        return "fewer than 2^63 elements", str(info.dimensions)
    name, elements, _ = sizes[info.kind]
    if (info.dimensions[0] if info.dimensions else 1) % elements:
        return f"rows of whole blocks of {elements} ({name})", f"rows of {info.dimensions[:1]}"
    return None


def _place_trouble(
    info: _Info, sizes: dict[int, tuple[str, int, int]], end: int, alignment: int
) -> tuple[str, str] | None:
    if info.offset % alignment:
        return f"an offset that is a multiple of {alignment}", str(info.offset)
    if info.offset < end and _nbytes(info, sizes):
        return "bytes of its own", f"bytes from {info.offset}, where another tensor ends at {end}"
    return None


def _nbytes(info: _Info, sizes: dict[int, tuple[str, int, int]]) -> int:
    _, elements, nbytes = sizes[info.kind]
    return math.prod(info.dimensions) // elements * nbytes


def _tensor(
    path: Path, info: _Info, sizes: dict[int, tuple[str, int, int]], start: int
) -> GgufTensor:
    nbytes = _nbytes(info, sizes)
    stored = TensorSpec(info.name, "U8", (nbytes,), path, start + info.offset, nbytes)
    return GgufTensor(info.name, sizes[info.kind][0], info.dimensions[::-1], stored)


def _malformed(path: Path, expected: str, found: str) -> FormatError:
    return FormatError(
        "the GGUF file is malformed",
        where=str(path),
        expected=expected,
        found=found,
        hint=f"{DOWNLOAD_AGAIN}; a Git LFS pointer must first be fetched (git lfs pull)",
    )
