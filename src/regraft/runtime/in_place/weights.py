"""Access to the memory of live tensors, as the bytes that a file would have.

A tensor is a run of bytes, row by row. Where it lies in the computer's own memory in that order, a
range of it is looked at where it is. Anything else, such as a transposed tensor or one on another
device, goes through a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from regraft.errors import UnsupportedError
from regraft.numerics.arrays import Bytes


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """Return the memory of a contiguous tensor on the CPU; changing it changes the tensor."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    raw: Bytes = flat.numpy()
    return raw


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's data without the class and the history that it has."""
    return tensor.detach().as_subclass(torch.Tensor)


class TensorMemory:
    """The bytes of a live tensor; safe to use from several threads, on ranges that do not meet.

    Attributes:
        tensor: what is read and written, without a copy.
        itemsize: bytes of an element; ranges begin and end between elements.
    """

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        """Take a tensor; ``name`` is what messages call it.

        Raises:
            UnsupportedError: its values are not in memory, or not as they seem.
        """
        check_at_hand(tensor, name)
        self.tensor = plain(tensor)
        self.itemsize: int = tensor.element_size()
        self._raw = bytes_of(self.tensor) if _is_direct(self.tensor) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(map(int, self.tensor.shape)) * self.itemsize

    def part(self, offset: int, length: int) -> Bytes | None:
        """Return a range of the memory itself; None where it cannot be looked at."""
        return None if self._raw is None else self._raw[offset : offset + length]

    def read(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with the bytes from ``offset``."""
        if self._raw is not None:
            buffer[:] = self._raw[offset : offset + buffer.size]
            return
        for piece, host in self._pieces(offset, buffer):
            host.copy_(piece)

    def write(self, offset: int, buffer: Bytes) -> None:
        """Set the bytes from ``offset`` to those of a buffer."""
        if self._raw is not None:
            self._raw[offset : offset + buffer.size] = buffer
            return
        for piece, host in self._pieces(offset, buffer):
            piece.copy_(host)

    def _pieces(self, offset: int, buffer: Bytes) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parts of the tensor with the parts of a buffer, of the same shape, they go with."""
        done, dtype = 0, self.tensor.dtype
        first, count = offset // self.itemsize, buffer.size // self.itemsize
        for piece in pieces_of(self.tensor, first, count):
            size = piece.numel() * self.itemsize
            host = torch.from_numpy(buffer[done : done + size]).view(dtype)
            yield piece, host.reshape(piece.shape)
            done += size


def pieces_of(tensor: torch.Tensor, first: int, count: int) -> Iterator[torch.Tensor]:
    """Yield views of a tensor that hold a range of its elements, counted row by row, in order."""
    if not count:
        return
    if tensor.dim() == 0:
        yield tensor
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)[first : first + count]
        return
    each, last = math.prod(tensor.shape[1:]), first + count
    while first < last:
        row, skipped = divmod(first, each)
        if skipped or last - first < each:
            take = min(each - skipped, last - first)
            yield from pieces_of(tensor[row], skipped, take)
            first += take
        else:
            yield tensor[row : last // each]
            first = last // each * each


def check_at_hand(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor whose values cannot be read and written where it is.

    Raises:
        UnsupportedError: it has been offloaded, or its class keeps its values in another way.
    """
    if tensor.device.type == "meta":
        raise UnsupportedError(
            "the weight is offloaded, so its values are not in memory", where=name,
            expected="a tensor on a device", found="device meta",
            hint="Load the model without offloading (a device_map that fits), or merge its files "
            "with regraft.merge()",
        )  # fmt: skip
    inner = tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
    known = type(inner) is torch.Tensor or type(tensor).__module__.startswith("bitsandbytes.")
    if not known and not isinstance(inner, torch.nn.Parameter):
        raise UnsupportedError(
            "the weight is no plain tensor", where=name, expected="torch.Tensor",
            found=type(inner).__name__,
            hint="Merge the model's files with regraft.merge() instead",
        )  # fmt: skip


def _is_direct(tensor: torch.Tensor) -> bool:
    aligned = tensor.data_ptr() % max(tensor.element_size(), 1) == 0
    return bool(aligned and tensor.device.type == "cpu" and tensor.is_contiguous())
