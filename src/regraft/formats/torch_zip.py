"""PyTorch's zip files (``.bin``): where each tensor's bytes lie, without reading them.

The pickle in the file says which part of which record a tensor is (see
:mod:`regraft.formats.torch_pickle`); the zip's own directory says where the record is. PyTorch is
not needed, and no code of the file is run. Records have to be plain, as PyTorch writes them.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import FormatError, Problem, UnsupportedError
from regraft.formats.files.reading import open_regular, read_at
from regraft.formats.files.text import visible
from regraft.formats.problems import DOWNLOAD_AGAIN, SAFE_NAME, capped, is_unsafe_name, quoted
from regraft.formats.torch_pickle import PickleError, StoredTensor, kind_of, read_pickle
from regraft.tensors import BY_CONFIG_NAME, TensorSpec

_ZIP_TROUBLE = (
    zipfile.BadZipFile, struct.error, ValueError, OverflowError, LookupError, NotImplementedError,
)  # fmt: skip
"""What :mod:`zipfile` raises of files that are none, or of a version that it does not know."""

_MAX_PICKLE_BYTES = 16 * 2**20
_MAX_DIRECTORY_BYTES = 8 * 2**20
_ZIP_TAIL_BYTES = 2**16 + 2**10
_DIRECTORY_END, _DIRECTORY_END_BYTES = b"PK\x05\x06", 22
_ZIP64_DIRECTORY_END, _ZIP64_DIRECTORY_END_BYTES = b"PK\x06\x06", 56
_ZIP64_LOCATOR, _ZIP64_LOCATOR_BYTES = b"PK\x06\x07", 20
_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1
_TAR_MARK, _TAR_MARK_AT = b"ustar", 257
_MAGIC_BYTES = _TAR_MARK_AT + len(_TAR_MARK)
_SAVE_AGAIN = "Load it in PyTorch and save it as safetensors"


@dataclass(frozen=True)
class _Archive:
    """A zip that is open, and has been found to be as PyTorch writes it.

    Attributes:
        path: the file.
        fd: its descriptor.
        prefix: the folder in the zip that all records lie in, with its slash.
        records: every record by its name in the zip.
    """

    path: Path
    fd: int
    prefix: str
    records: dict[str, zipfile.ZipInfo]

    def place(self, name: str) -> tuple[int, int]:
        """Return where a record's bytes begin, and how many there are; (-1, -1) for none."""
        entry = self.records.get(self.prefix + name)
        if entry is None:
            return -1, -1
        return _data_offset(self.fd, self.path, entry), entry.file_size

    def read(self, name: str) -> bytes | None:
        """Return a small record; checksums are not looked at, as some files have none."""
        start, size = self.place(name)
        return None if start < 0 else read_at(self.fd, self.path, start, size)


def read_torch_file(path: Path, under: str | None = None) -> dict[str, TensorSpec]:
    """Return the tensors of a PyTorch zip file by name, in order of offset.

    Two tensors that share a storage get two specs over the same bytes.

    Args:
        path: the file.
        under: the key of the tensors' dict, where another dict is around it.

    Raises:
        FormatError: it is not a sound zip of uncompressed records with a flat dict of dense,
            contiguous tensors; it lists every bad tensor.
        UnsupportedError: sound, but big-endian, TorchScript, or in a format before PyTorch 1.6.
        InputError: there is no such file.
        AccessError: the system refused to read it.
    """
    fd = open_regular(path)
    try:
        archive = _open_archive(fd, path)
        tensors = _state_dict(archive, under)
        placed = _place_all(archive, tensors)
    except _ZIP_TROUBLE as error:
        raise FormatError(
            "is not a sound zip",
            where=str(path),
            expected="a zip as PyTorch writes it",
            found=quoted(str(error)),
            hint=DOWNLOAD_AGAIN,
        ) from None
    finally:
        os.close(fd)
    placed.sort(key=lambda spec: spec.start)
    return {spec.name: spec for spec in placed}


def _open_archive(fd: int, path: Path) -> _Archive:
    """Return the zip's records, after a look at all that can be wrong with them."""
    _check_magic(path, read_at(fd, path, 0, _MAGIC_BYTES))
    _check_directory(fd, path)
    with os.fdopen(os.dup(fd), "rb") as file, zipfile.ZipFile(file) as opened:
        entries = opened.infolist()
    _check_entries(path, entries)
    prefix = entries[0].filename.partition("/")[0] + "/" if entries else ""
    archive = _Archive(path, fd, prefix, {entry.filename: entry for entry in entries})
    _check_byte_order(archive)
    _check_no_program(archive)
    return archive


def _check_magic(path: Path, magic: bytes) -> None:
    if magic.startswith(_LOCAL_HEADER_MAGIC):
        return
    if magic[:1] == b"\x80":
        raise UnsupportedError(
            "is a PyTorch file of the kind written before version 1.6",
            where=str(path),
            expected="PyTorch's zip format",
            found="a bare pickle",
            hint=_SAVE_AGAIN,
        )
    if magic[_TAR_MARK_AT:].startswith(_TAR_MARK):
        raise UnsupportedError(
            "is a PyTorch file of the kind written before version 0.1.10",
            where=str(path),
            expected="PyTorch's zip format",
            found="a tar archive",
            hint=_SAVE_AGAIN,
        )
    raise FormatError(
        "is not a PyTorch file",
        where=str(path),
        expected="a zip that begins with PK",
        found=quoted(magic[:4].decode("latin-1")),
        hint=f"{DOWNLOAD_AGAIN}; a Git LFS pointer must first be fetched (git lfs pull)",
    )


def _check_directory(fd: int, path: Path) -> None:
    """Refuse a zip whose directory would take gigabytes once :mod:`zipfile` has read it."""
    size = os.fstat(fd).st_size
    start = max(0, size - _ZIP_TAIL_BYTES)
    tail = read_at(fd, path, start, size - start)
    at = tail.rfind(_DIRECTORY_END)
    if at < 0 or len(tail) < at + _DIRECTORY_END_BYTES:
        raise zipfile.BadZipFile("it has no directory")
    length = int(struct.unpack_from("<L", tail, at + 12)[0])
    if tail[max(0, at - _ZIP64_LOCATOR_BYTES) : at].startswith(_ZIP64_LOCATOR):
        at -= _ZIP64_LOCATOR_BYTES + _ZIP64_DIRECTORY_END_BYTES
        if at < 0 or not tail.startswith(_ZIP64_DIRECTORY_END, at):
            raise zipfile.BadZipFile("its directory has no size")
        length = max(length, int(struct.unpack_from("<Q", tail, at + 40)[0]))
    if length > _MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"a directory of {length} bytes")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    problems = [
        Problem(
            "the zip is not as PyTorch writes it", f"{path}, {quoted(entry.filename)}", **trouble
        )
        for entry in entries
        for trouble in _entry_troubles(entry)
    ]
    if len({entry.filename.lower() for entry in entries}) != len(entries):
        problems.append(Problem("the zip names a record twice", str(path), hint=DOWNLOAD_AGAIN))
    if problems:
        raise FormatError(capped(problems, path))


def _entry_troubles(entry: zipfile.ZipInfo) -> Iterator[dict[str, str]]:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        yield {
            "expected": "a plain record",
            "found": "a compressed or encrypted one",
            "hint": _SAVE_AGAIN,
        }
    if "/data/" not in entry.filename and entry.file_size > _MAX_PICKLE_BYTES:
        yield {
            "expected": f"at most {_MAX_PICKLE_BYTES} bytes besides the tensors",
            "found": f"{entry.file_size} bytes",
        }


def _check_byte_order(archive: _Archive) -> None:
    order = archive.read("byteorder")
    if order not in (None, b"little"):
        raise UnsupportedError(
            "was saved on a big-endian machine",
            where=str(archive.path),
            expected="little-endian tensors",
            found=quoted(order.decode("latin-1")),
            hint=_SAVE_AGAIN,
        )


def _check_no_program(archive: _Archive) -> None:
    if archive.prefix + "constants.pkl" in archive.records:
        raise UnsupportedError(
            "is a TorchScript program, not weights alone",
            where=str(archive.path),
            expected="a state dict as torch.save writes it",
            found="constants.pkl in the zip",
            hint="Load it with torch.jit.load and save its state_dict() as safetensors",
        )


def _data_offset(fd: int, path: Path, entry: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin: after its local header, name and padding."""
    header = read_at(fd, path, entry.header_offset, _LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(_LOCAL_HEADER_MAGIC):
        raise zipfile.BadZipFile(f"no record at byte {entry.header_offset}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + _LOCAL_HEADER_BYTES + int(name_length) + int(extra_length)
    if start + entry.file_size > os.fstat(fd).st_size:
        raise zipfile.BadZipFile(f"{entry.filename} reaches beyond the end of the file")
    return start


def _state_dict(archive: _Archive, under: str | None) -> dict[str, StoredTensor]:
    """Return the tensors that the pickle describes, by name.

    Raises:
        FormatError: it is damaged, or holds anything else.
    """
    content = archive.read("data.pkl")
    if content is None:
        raise zipfile.BadZipFile("it has no data.pkl")
    try:
        value = read_pickle(content)
    except PickleError as error:
        raise FormatError(
            "cannot be read as tensors only",
            where=str(archive.path),
            expected="a flat dict of tensors, and no other objects",
            found=quoted(str(error)),
            hint=f"{_SAVE_AGAIN}, if you trust its origin",
        ) from None
    if under is not None and isinstance(value, dict) and isinstance(value.get(under), dict):
        value = value[under]
    _check_flat(archive.path, value)
    return dict(value)


def _check_flat(path: Path, value: Any) -> None:
    if not isinstance(value, dict):
        trouble = f"a {kind_of(value)}"
    else:
        odd = [
            k for k, v in value.items() if not (isinstance(k, str) and isinstance(v, StoredTensor))
        ]
        if not odd:
            return
        trouble = f"a {kind_of(value[odd[0]])} under {quoted(odd[0])}"
    raise FormatError(
        "is not a plain state dict",
        where=str(path),
        expected="a flat dict from names to tensors",
        found=trouble,
        hint="Save the model's state_dict() alone, best as safetensors",
    )


def _place_all(archive: _Archive, tensors: dict[str, StoredTensor]) -> list[TensorSpec]:
    """Return where all tensors' bytes lie.

    Raises:
        FormatError: some cannot be read as they are; it lists them.
    """
    specs: list[TensorSpec] = []
    problems: list[Problem] = []
    places: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        where = f"{archive.path}, tensor {quoted(name)}"
        if odd := _oddity(name, tensor):
            problems.append(Problem("cannot be read as plain bytes", where, *odd, _SAVE_AGAIN))
            continue
        if tensor.key not in places:
            places[tensor.key] = archive.place(f"data/{tensor.key}")
        spec = _place(archive.path, name, tensor, *places[tensor.key])
        if spec is None:
            parts = _misplaced(tensor, places[tensor.key][1])
            problems.append(Problem("its storage is not in the zip", where, *parts, DOWNLOAD_AGAIN))
        else:
            specs.append(spec)
    if problems:
        raise FormatError(capped(problems, archive.path))
    return specs


def _place(path: Path, name: str, tensor: StoredTensor, start: int, size: int) -> TensorSpec | None:
    """Return where a tensor lies in its record; None where the record does not hold it."""
    begin, nbytes = _span(tensor)
    if size != tensor.storage_bytes or begin + nbytes > size:
        return None
    dtype = BY_CONFIG_NAME[tensor.dtype].name
    return TensorSpec(name, dtype, tensor.shape, path, start + begin, nbytes)


def _span(tensor: StoredTensor) -> tuple[int, int]:
    """Return where a tensor begins in its storage and how long it is, in bytes."""
    itemsize = BY_CONFIG_NAME[tensor.dtype].bits // 8
    return tensor.offset * itemsize, math.prod(tensor.shape) * itemsize


def _misplaced(tensor: StoredTensor, size: int) -> tuple[str, str]:
    """Return (expected, found) for a tensor that its record does not hold."""
    needed = max(sum(_span(tensor)), tensor.storage_bytes)
    found = "no record" if size < 0 else f"{size} bytes in its record"
    return f"{needed} bytes in data/{visible(tensor.key[:64])}", found


def _oddity(name: str, tensor: StoredTensor) -> tuple[str, str] | None:
    """Return (expected, found) for a tensor whose storage does not hold its values in order."""
    if is_unsafe_name(name):
        return SAFE_NAME, quoted(name)
    if tensor.oddity:
        return "a dense tensor with its values as stored", tensor.oddity
    dtype = BY_CONFIG_NAME.get(tensor.dtype)
    if dtype is None or dtype.bits % 8:
        return "a dtype that safetensors knows", quoted(tensor.dtype)
    if not tensor.is_contiguous:
        return "a contiguous tensor", f"shape {tensor.shape}, strides {tensor.strides}"
    return None
