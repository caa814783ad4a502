"""The undo patch on disk: a safetensors file of byte sections, written front to back.

Its header is written last, into room left for it at the front and filled up with spaces: what the
sections are called is known beforehand, how long they become is not.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from regraft.deltas.undo import compression
from regraft.errors import FormatError
from regraft.formats.files.reading import FilePool
from regraft.formats.safetensors import read_header
from regraft.merging.files.direct_io import sync_or_empty, write_error
from regraft.numerics.arrays import Bytes, Floats
from regraft.system.opening import open_to_write
from regraft.tensors import TensorSpec

STREAMS, UNITS, FACTORS = "streams", "units", "factors"
"""Sections of a tensor that was merged: its units' streams, their lengths, what DoRA and
factorizations need."""

PLANES, CHUNKS = "planes", "chunks"
"""Sections of a tensor that is told from another one: its chunks, and their lengths."""

_ENTRY_BYTES = 120
"""Room in the header for one section, besides its name."""

_ALIGN = 4096


def section(tensor: str, kind: str) -> str:
    """Return the name of a tensor's section."""
    return f"{tensor}/{kind}"


def file_section(name: str) -> str:
    """Return the name of the section with what a weight file holds besides its tensors."""
    return f"file:{name}"


@dataclass(frozen=True)
class Written:
    """A section of a patch: its name, its place among the data, and its blake3 (hex)."""

    name: str
    begin: int
    end: int
    digest: str


class PatchWriter:
    """Writes sections one after the other; not for several threads at once."""

    def __init__(self, path: Path, names: Iterable[str], done: Sequence[Written] = ()) -> None:
        """Begin a file, or go on with one after the sections that are ``done``.

        Args:
            path: the file.
            names: every section that there may be.
            done: those that are written already, in order.

        Raises:
            AccessError, DiskSpaceError: the system refused.
        """
        self.path, self.sections = path, list(done)
        longest = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room = -(-(longest + 64) // _ALIGN) * _ALIGN
        self._at = self._begin = done[-1].end if done else 0
        self._hash = blake3()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(open_to_write(path), "r+b", buffering=2**20)
            try:
                self._file.truncate(self._room + self._at)
                self._file.write((self._room - 8).to_bytes(8, "little"))
                self._file.seek(self._room + self._at)
            except OSError:
                self.abandon()
                raise
        except OSError as error:
            raise write_error(path, error) from error

    def append(self, content: bytes | Bytes) -> None:
        """Add bytes to the section that is open."""
        view = content if isinstance(content, bytes) else content.data
        try:
            self._file.write(view)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._hash.update(view)
        self._at += len(view)

    def end(self, name: str) -> Written | None:
        """Close the section that is open under a name; one without bytes is left out."""
        if self._at == self._begin:
            return None
        written = Written(name, self._begin, self._at, self._hash.hexdigest())
        self.sections.append(written)
        self._begin, self._hash = self._at, blake3()
        return written

    def flush(self) -> None:
        """Hand what was written to the system."""
        try:
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        """Write the header, flush to the disk and close."""
        entries: dict[str, Any] = {"__metadata__": {"format": "regraft.undo"}}
        for each in self.sections:
            span = [each.begin, each.end]
            shape = [each.end - each.begin]
            entries[each.name] = {"dtype": "U8", "shape": shape, "data_offsets": span}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (self._room - 8 - len(header))
        try:
            self._file.seek(0)
            self._file.write(len(header).to_bytes(8, "little") + header)
            self._file.flush()
            sync_or_empty(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise write_error(self.path, error) from error

    def abandon(self) -> None:
        """Close without a header, so that the work can go on later."""
        with contextlib.suppress(OSError):
            self._file.close()

    @staticmethod
    def holds(path: Path, files: FilePool, written: Written) -> bool:
        """Whether an unfinished patch still holds a section as it was written."""
        with path.open("rb") as file:
            room = int.from_bytes(file.read(8), "little")
        length = written.end - written.begin
        start = 8 + room + written.begin
        spec = TensorSpec(written.name, "U8", (length,), path, start, length)
        return digest_of(files, spec) == written.digest


def digest_of(files: FilePool, spec: TensorSpec, piece: int = 2**20) -> str | None:
    """Return the blake3 (hex) of a tensor's bytes; None if the file ends before they do."""
    try:
        return files.digest(spec, piece)
    except FormatError:
        return None


class PatchReader:
    """Reads sections of a patch; safe to use from several threads."""

    def __init__(self, path: Path, files: FilePool) -> None:
        """Open a patch.

        Raises:
            FormatError: it is none, or is damaged.
            InputError, AccessError: it cannot be opened.
        """
        self.path, self._files = path, files
        header = read_header(path)
        self._specs = header.tensors

    def part(self, name: str, begin: int, end: int) -> Bytes:
        """Return a range of a section.

        Raises:
            FormatError: the section is shorter.
        """
        if end <= begin:
            return np.empty(0, np.uint8)
        spec = self._specs.get(name)
        if spec is None or end > spec.nbytes or begin < 0:
            raise self.damaged(name, f"at least {end} bytes", f"{spec.nbytes if spec else 0}")
        content = np.empty(end - begin, np.uint8)
        self._files.read_into(spec, begin, content.data)
        return content

    def floats(self, name: str, count: int) -> Floats:
        """Return a section of ``count`` float32 values."""
        return self.part(name, 0, 4 * count).view(np.float32)

    def table(self, name: str, size: int) -> bytes:
        """Return a compressed section that has ``size`` bytes uncompressed.

        Raises:
            FormatError: it has not.
        """
        spec, most = self._specs.get(name), compression.most_compressed(size)
        if spec is None or not spec.nbytes:
            return bytes(size)
        if spec.nbytes > most:
            raise self.damaged(name, f"at most {most} bytes", f"{spec.nbytes}")
        try:
            return compression.decompress(self._files.read_bytes(spec), size)
        except ValueError as error:
            raise self.damaged(name, f"{size} compressed bytes", str(error)) from None

    def damaged(self, name: str, expected: str, found: str) -> FormatError:
        """Return the error for a section that does not hold what it should."""
        return FormatError(
            "the undo patch is damaged", where=f"{self.path}, section {name!r}", expected=expected,
            found=found, hint="Restore the file from where the merged model came from",
        )  # fmt: skip


def packed(content: bytes) -> bytes:
    """Return bytes compressed, for :meth:`PatchReader.table`; nothing if all are zero."""
    if content.count(0) == len(content):
        return b""
    return compression.compress(content)
