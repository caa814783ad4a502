"""PyTorch's files of adapters: read without PyTorch, and written by it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.form import Moved, NewFile
from regraft.formats.files.reading import FilePool
from regraft.formats.safetensors import read_header
from regraft.formats.torch_zip import read_torch_file
from regraft.libraries import require
from regraft.tensors import DTYPES, TensorSpec

_DIRECTORY_BYTES, _TENSOR_BYTES = 2**13, 2**10
"""At most what PyTorch adds to a file, and to the values of a tensor."""


def read_tensors(path: Path, under: str | None = None) -> dict[str, TensorSpec]:
    """Return the tensors of a file of PyTorch's, or of safetensors.

    Args:
        path: the file.
        under: the key of the tensors' dict in a dict around it, if there is one.

    Raises:
        FormatError, InputError, AccessError: it cannot be read.
    """
    if path.suffix == ".safetensors":
        return read_header(path).tensors
    return read_torch_file(path, under)


def torch_file(name: str, tensors: Mapping[str, Moved], under: str | None = None) -> NewFile:
    """Return a file as ``torch.save`` writes it; its size is an upper bound.

    Args:
        name: the file's.
        tensors: by name.
        under: the key of a dict around them, if there is to be one.

    Raises:
        MissingExtraError: PyTorch is not installed.
    """
    require("torch", why=f"Writing {name}")

    def pieces(files: FilePool) -> Iterator[bytes]:
        import torch

        found = {key: _as_torch(tensor, files) for key, tensor in tensors.items()}
        content = io.BytesIO()
        torch.save(found if under is None else {under: found}, content)
        yield content.getvalue()

    room = sum(tensor.nbytes + _TENSOR_BYTES for tensor in tensors.values())
    return NewFile(name, room + _DIRECTORY_BYTES, pieces)


def _as_torch(tensor: Moved, files: FilePool) -> Any:
    import torch

    dtype = getattr(torch, DTYPES[tensor.dtype].config_name)
    raw = bytearray(tensor.bits(files).tobytes())
    return torch.frombuffer(raw, dtype=dtype).reshape(tensor.shape)
