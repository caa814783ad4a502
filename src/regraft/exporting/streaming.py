"""The bytes of a GGUF file, front to back: its header, then its tensors in pieces of whole rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import NumericError
from regraft.exporting.tensors import ExportedTensor
from regraft.formats.gguf import gguf_package
from regraft.formats.problems import quoted
from regraft.merging.inputs.source import Source
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.formats.gguf import UNQUANTIZED, stored_rows
from regraft.tensors import TensorSpec

ALIGNMENT = 32
"""Each tensor begins at a multiple of so many bytes."""

_NUMPY = {"F32": "<f4", "F16": "<f2"}

_ARRAYS = {"tokenizer.ggml.scores": "FLOAT32", "tokenizer.ggml.token_type": "INT32"}
"""GGUF's types of the numbers in known arrays; others are told by their values."""


def header_bytes(
    architecture: str, metadata: Mapping[str, Any], tensors: Sequence[ExportedTensor]
) -> bytes:
    """Return what lies before the first tensor, filled up to the alignment.

    Args:
        architecture: ``general.architecture``.
        metadata: values by their whole key: whole numbers, real ones, booleans, strings, lists.
        tensors: in order.
    """
    gguf = gguf_package()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            # A dtype that is not uint8, so that the shape is taken as one of elements.
            writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        content = path.read_bytes()
    return content + bytes(-len(content) % ALIGNMENT)


def _add(writer: Any, key: str, value: Any) -> None:
    gguf = gguf_package()
    types = gguf.GGUFValueType
    if isinstance(value, list | tuple):
        if value:
            kind = types[_ARRAYS[key]] if key in _ARRAYS else None
            writer.add_key_value(key, list(value), types.ARRAY, sub_type=kind)
        return
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    writer.add_key_value(key, value, kinds[type(value)])


def tensor_bytes(tensor: ExportedTensor, source: Source, room: int) -> Iterator[bytes]:
    """Yield the bytes of a tensor and what fills them up to the alignment.

    Args:
        tensor: the tensor.
        source: what the model's own weights are read from.
        room: bytes of float32 that may be in memory at a time; a row, or where rows are rearranged
            a head of them, is the least.

    Raises:
        NumericError: values are beyond what the type holds.
        RegraftError: what reading raises.
    """
    if tensor.source is None:
        yield np.array(tensor.values, "<f4").tobytes()
    else:
        for rows in _pieces(tensor, room):
            yield _piece(tensor, tensor.source, source, rows)
    yield bytes(-tensor.nbytes % ALIGNMENT)


def _pieces(tensor: ExportedTensor, room: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows: whole heads where these are rearranged."""
    count, width = _matrix(tensor)
    least = count // tensor.heads if tensor.heads else 1
    step = max(room // (4 * width * least), 1) * least
    for first in range(0, count, step):
        yield first, min(first + step, count)


def _matrix(tensor: ExportedTensor) -> tuple[int, int]:
    """Return rows and columns; a rearranged vector is a column, other vectors are a row."""
    if len(tensor.shape) == 2:
        return tensor.shape[0], tensor.shape[1]
    return (tensor.shape[0], 1) if tensor.heads else (1, tensor.shape[0])


def _piece(
    tensor: ExportedTensor, spec: TensorSpec, source: Source, rows: tuple[int, int]
) -> bytes:
    count, width = _matrix(tensor)
    row_bytes = width * spec.itemsize
    raw = np.empty((rows[1] - rows[0], row_bytes), np.uint8)
    source.read(spec, rows[0] * row_bytes, raw.reshape(-1))
    if tensor.heads:
        turned = np.empty_like(raw)
        turned[stored_rows(rows, count, tensor.heads) - rows[0]] = raw
        raw = turned
    if spec.dtype == tensor.type and not tensor.added:
        return raw.tobytes()
    values = _floats(raw, spec.dtype)
    if tensor.added:
        values = values + np.float32(tensor.added)
    return _encoded(values, tensor)


def _floats(raw: Bytes, dtype: str) -> Floats:
    """Return rows of bytes as float32."""
    if dtype != "BF16":
        found: Floats = raw.view(_NUMPY[dtype]).astype(np.float32)
        return found
    wide: Floats = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return wide


_RANGE = "numbers of magnitude up to 65504, or in blocks a few times that: scales are float16"

_SAFE = 65504.0
"""Values up to this magnitude have block scales that float16 holds, whatever the type."""


def _is_lost(values: Floats, encoded: Any, type: str) -> bool:
    """Whether finite values became infinite, or none: their own, or those of a block's scale."""
    if type in ("F32", "BF16") or not np.abs(values).max(initial=0.0) > _SAFE:
        return False
    gguf = gguf_package()
    back = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[type])
    return bool((np.isfinite(values) & ~np.isfinite(back)).any())


def _encoded(values: Floats, tensor: ExportedTensor) -> bytes:
    gguf = gguf_package()
    with np.errstate(all="ignore"):
        blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.type])
        lost = _is_lost(values, blocks, tensor.type)
    odd = tensor.type not in UNQUANTIZED and not np.isfinite(values).all()
    if lost or odd:
        raise NumericError(
            "a weight cannot be written in this type", where=f"tensor {quoted(tensor.name)}",
            expected=_RANGE if lost else "finite numbers",
            found=f"{np.abs(values).max():g}",
            hint="Use --type bf16 or f32",
        )  # fmt: skip
    out: bytes = blocks.tobytes()
    return out
