"""PyTorch's zip files (``.bin``): where each tensor's bytes lie, without reading them.

Only ``torch.load(weights_only=True)`` ever unpickles. It loads onto the "meta" device, which
allocates nothing, and tells at which offset of the file each storage begins. Those offsets are
believed only where the zip's own directory has an uncompressed record of the same size there.
"""

from __future__ import annotations

import functools
import io
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from regraft.errors import (
    EnvironmentShortfall,
    FormatError,
    MissingExtraError,
    Problem,
    UnsupportedError,
)
from regraft.formats.problems import DOWNLOAD_AGAIN, SAFE_NAME, capped, is_unsafe_name, quoted
from regraft.formats.reading import open_regular, read_at
from regraft.tensors import BY_CONFIG_NAME, TensorSpec

_SAFE_TORCH = (2, 10)
"""The first version without CVE-2025-32434 (before 2.6) and CVE-2026-24747 (before 2.10): with
``weights_only`` too, a file could run code there, or corrupt memory."""

_MAX_PICKLE_BYTES = 16 * 2**20
_MAX_DIRECTORY_BYTES = 32 * 2**20
_ZIP_TAIL_BYTES = 2**16 + 2**10
_DIRECTORY_END, _DIRECTORY_END_BYTES = b"PK\x05\x06", 22
_ZIP64_DIRECTORY_END, _ZIP64_DIRECTORY_END_BYTES = b"PK\x06\x06", 56
_ZIP64_LOCATOR, _ZIP64_LOCATOR_BYTES = b"PK\x06\x07", 20
_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1
_SAVE_AGAIN = "Load it in PyTorch and save it as safetensors"


def read_torch_file(path: Path) -> dict[str, TensorSpec]:
    """Return the tensors of a PyTorch zip file by name, in order of offset.

    Two tensors that share a storage get two specs over the same bytes.

    Raises:
        FormatError: it is not a sound zip of uncompressed records with a flat dict of dense,
            contiguous tensors; it lists every bad tensor.
        UnsupportedError: sound, but big-endian or in the format before PyTorch 1.6.
        MissingExtraError: PyTorch is not installed.
        EnvironmentShortfall: PyTorch is too old to be safe.
        InputError: there is no such file.
        AccessError: the system refused to read it.
    """
    records = _records(path)
    torch = _torch()
    value = _load(torch, path)
    _check_flat(torch, path, value)
    placed = [_place(path, name, tensor, records) for name, tensor in value.items()]
    problems = [place for place in placed if isinstance(place, Problem)]
    if problems:
        raise FormatError(capped(problems, path))
    specs = [place for place in placed if isinstance(place, TensorSpec)]
    specs.sort(key=lambda spec: spec.start)
    return {spec.name: spec for spec in specs}


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtraError(
            "PyTorch is needed to read .bin files",
            hint="Run pip install 'regraft[torch]', or use the safetensors files of this model",
        ) from None
    _check_version(torch)
    return torch


def _check_version(torch: ModuleType) -> None:
    release = re.match(r"(\d+)\.(\d+)(?:\.\d+)?(?P<early>a|b|rc|\.?dev)?", str(torch.__version__))
    if release is not None:
        version = (int(release[1]), int(release[2]))
        if version > _SAFE_TORCH or (version == _SAFE_TORCH and not release["early"]):
            return
    raise EnvironmentShortfall(
        "this PyTorch can be made to run code by a .bin file (CVE-2025-32434, CVE-2026-24747)",
        expected="PyTorch 2.10 or newer",
        found=str(torch.__version__),
        hint="Run pip install -U 'torch>=2.10', or use the safetensors files of this model",
    )


def _records(path: Path) -> dict[int, int]:
    """Return the size of every storage in the zip by the absolute offset of its first byte."""
    fd = open_regular(path)
    try:
        _check_magic(path, read_at(fd, path, 0, len(_LOCAL_HEADER_MAGIC)))
        _check_directory(fd, path)
        with os.fdopen(os.dup(fd), "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            _check_byte_order(path, archive)
        storages = [entry for entry in entries if "/data/" in entry.filename]
        return {_data_offset(fd, path, entry): entry.file_size for entry in storages}
    except (zipfile.BadZipFile, struct.error, ValueError, OverflowError, LookupError) as error:
        raise FormatError(
            "is not a sound zip",
            where=str(path),
            expected="a zip as PyTorch writes it",
            found=quoted(str(error)),
            hint=DOWNLOAD_AGAIN,
        ) from None
    finally:
        os.close(fd)


def _check_magic(path: Path, magic: bytes) -> None:
    if magic == _LOCAL_HEADER_MAGIC:
        return
    if magic[:1] == b"\x80":
        raise UnsupportedError(
            "is a PyTorch file of the kind written before version 1.6",
            where=str(path),
            expected="PyTorch's zip format",
            found="a bare pickle",
            hint=_SAVE_AGAIN,
        )
    raise FormatError(
        "is not a PyTorch file",
        where=str(path),
        expected="a zip that begins with PK",
        found=quoted(magic.decode("latin-1")),
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
    if len({entry.filename for entry in entries}) != len(entries):
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


def _check_byte_order(path: Path, archive: zipfile.ZipFile) -> None:
    for name in archive.namelist():
        if name.count("/") == 1 and name.endswith("/byteorder") and archive.read(name) != b"little":
            raise UnsupportedError(
                "was saved on a big-endian machine",
                where=str(path),
                expected="little-endian tensors",
                found=quoted(archive.read(name).decode("latin-1")),
                hint=_SAVE_AGAIN,
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


def _load(torch: Any, path: Path) -> Any:
    """Return the unpickled value, its tensors without memory but knowing their offsets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _tells_offsets_on_meta(torch):
                return torch.load(path, weights_only=True, map_location="meta")
            return _load_fake(torch, path)
    except Exception as error:  # a bad file can make torch's unpickler raise anything
        raise FormatError(
            "PyTorch cannot read it as tensors only",
            where=str(path),
            expected="a flat dict of tensors, and no other objects",
            found=f"{type(error).__name__}: {quoted(str(error).partition(chr(10))[0])}",
            hint=f"{_SAVE_AGAIN}, if you trust its origin",
        ) from None


@functools.cache
def _tells_offsets_on_meta(torch: Any) -> bool:
    """Return whether this PyTorch notes offsets when it loads onto "meta"; older ones do not."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    tensor = torch.load(file, weights_only=True, map_location="meta")
    return hasattr(tensor.untyped_storage(), "_checkpoint_offset")


def _load_fake(torch: Any, path: Path) -> Any:
    """Return the value with fake tensors: slower to start, but older versions can do it too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(path, weights_only=True)


def _check_flat(torch: Any, path: Path, value: Any) -> None:
    if not isinstance(value, dict):
        trouble = f"a {type(value).__name__}"
    else:
        odd = [k for k, v in value.items() if not (isinstance(k, str) and torch.is_tensor(v))]
        if not odd:
            return
        trouble = f"a {type(value[odd[0]]).__name__} under {quoted(odd[0])}"
    raise FormatError(
        "is not a plain state dict",
        where=str(path),
        expected="a flat dict from names to tensors",
        found=trouble,
        hint="Save the model's state_dict() alone, best as safetensors",
    )


def _place(path: Path, name: str, tensor: Any, records: dict[int, int]) -> TensorSpec | Problem:
    """Return where a tensor's bytes lie, or why they cannot be read as they are."""
    where = f"{path}, tensor {quoted(name)}"
    odd = _oddity(name, tensor)
    if odd:
        return Problem("cannot be read as plain bytes", where, *odd, _SAVE_AGAIN)
    dtype = BY_CONFIG_NAME[str(tensor.dtype).removeprefix("torch.")].name
    storage_start = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    skipped = tensor.storage_offset() * tensor.element_size()
    nbytes = tensor.numel() * tensor.element_size()
    if skipped + nbytes > records.get(storage_start, -1):
        found = f"{records.get(storage_start, 'no')} bytes at {storage_start}"
        expected = f"a record of at least {skipped + nbytes} bytes"
        return Problem("its storage is not in the zip", where, expected, found, DOWNLOAD_AGAIN)
    return TensorSpec(name, dtype, tuple(tensor.shape), path, storage_start + skipped, nbytes)


def _oddity(name: str, tensor: Any) -> tuple[str, str] | None:
    """Return (expected, found) for a tensor whose storage does not hold its values in order."""
    if is_unsafe_name(name):
        return SAFE_NAME, quoted(name)
    if str(tensor.layout) != "torch.strided":
        return "a dense tensor", str(tensor.layout)
    dtype = BY_CONFIG_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or dtype.bits % 8:
        return "a dtype that safetensors knows", str(tensor.dtype)
    if tensor.is_conj() or tensor.is_neg():
        return "values as stored", "a lazily conjugated or negated view"
    if not tensor.is_contiguous():
        return "a contiguous tensor", f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
    return None
