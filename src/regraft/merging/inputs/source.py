"""Where the bytes of a merge's tensors come from: their files, or an undo that is under way."""

from __future__ import annotations

from typing import Protocol

from regraft.formats.files.reading import FilePool
from regraft.numerics.arrays import Bytes
from regraft.tensors import TensorSpec


class Source(Protocol):
    """Reads tensors of a base; safe to use from several threads."""

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with the bytes of a tensor that begin ``offset`` bytes into it."""

    def cost(self, spec: TensorSpec) -> int:
        """Return the memory that reading a tensor takes besides the buffer."""

    def grain(self, spec: TensorSpec) -> int:
        """Return the bytes whose multiples are good places to cut a tensor."""

    def release(self, spec: TensorSpec) -> None:
        """Let go of what was kept for a tensor that will not be read again."""

    def origin(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the tensor of a file whose bytes are those that :meth:`read` gives; None of bytes
        that are computed."""

    def expected(self, name: str) -> str | None:
        """Return no expected digest: a file on disk is read as it is."""


class WholeSource:
    """A source of which everything is there as it is: any place is as good as another to read."""

    def cost(self, spec: TensorSpec) -> int:
        """Return 0."""
        del spec
        return 0

    def grain(self, spec: TensorSpec) -> int:
        """Return 1."""
        del spec
        return 1

    def release(self, spec: TensorSpec) -> None:
        """Do nothing."""

    def origin(self, spec: TensorSpec) -> TensorSpec | None:
        """Return None: the bytes may be computed."""
        del spec
        return None

    def expected(self, name: str) -> str | None:
        """Return None: it holds what it holds."""
        del name
        return None


class FileSource(WholeSource):
    """The files themselves."""

    def __init__(self, files: FilePool) -> None:
        self._files = files

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Read from the tensor's file."""
        self._files.read_into(spec, offset, buffer.data)

    def origin(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the tensor itself."""
        return None if spec.is_virtual else spec
