"""A model as a GGUF file: planned as a whole, refused before anything is written, then streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import FormatError, Problem, UnsupportedError
from regraft.exporting.streaming import ALIGNMENT, header_bytes, tensor_bytes
from regraft.exporting.tensors import TYPES, ExportedTensor, exported_tensors
from regraft.exporting.tokens.choosing import tokenizer_of
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.gguf import gguf_package
from regraft.formats.problems import capped, quoted
from regraft.merging.files.publish import write_pieces
from regraft.merging.inputs.base import see
from regraft.merging.inputs.dequantized_view import Quantization, check_scales
from regraft.merging.inputs.source import FileSource, Source
from regraft.merging.inputs.stacking import plain_values
from regraft.names.gguf import FAMILIES, GgufFamily
from regraft.names.gguf_metadata import (
    factors_of,
    family_of,
    is_tied,
    metadata_of,
    sizes_of,
    unsaid,
    window_note,
)
from regraft.progress import Progress, ProgressMeter
from regraft.tensors import WORKING_DTYPES

_COUNTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
_BASE_BYTES, _SHARE = 256 * 2**20, 16
_LEAST_ROOM, _MOST_ROOM = 2**20, 32 * 2**20


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file that is to be written.

    Attributes:
        architecture: ``general.architecture``.
        type: the type of its matrices.
        header: everything before the tensors.
        tensors: its tensors, in order.
        tokenizer: what the tokenizer is to llama.cpp, in words.
        metadata: its keys and values.
        notes: what the user should know.
        quantization: how the model is quantized, None if it is not.
    """

    architecture: str
    type: str
    header: bytes
    tensors: tuple[ExportedTensor, ...]
    tokenizer: str
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]
    quantization: Quantization | None

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        padded = sum(tensor.nbytes + -tensor.nbytes % ALIGNMENT for tensor in self.tensors)
        return len(self.header) + padded

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have each type."""
        return dict(Counter(tensor.type for tensor in self.tensors))


def plan_gguf(stored: Checkpoint, kind: str | None, like: Path | None) -> GgufExport:
    """Return the file that a model becomes; weights are not read.

    Args:
        stored: the model as it is on disk.
        kind: type of its matrices, of :data:`regraft.exporting.tensors.TYPES`; None for the
            dtype that most of its values have.
        like: a GGUF file of the same model, whose tokenizer is taken; None for the folder's own.

    Raises:
        UnsupportedError: a kind of model, of tokenizer or of tensors that cannot be exported.
        FormatError: the model contradicts its config.
    """
    plain, quantization = see(stored)
    if quantization is not None:
        check_scales(quantization)
    config = stored.config or {}
    architecture, family = _family(stored, config)
    _check_config(stored, family, config)
    if is_tied(family, config):
        _check_tied(plain)
    chosen = kind or _main_dtype(plain)
    tensors = exported_tensors(architecture, family, config, plain, chosen)
    rows = config["vocab_size"]
    tokenizer = tokenizer_of(stored.root, config, rows, like)
    own = {f"{architecture}.{key}": v for key, v in metadata_of(family, config).items()}
    metadata = _general(stored, config) | own | _file(chosen) | dict(tokenizer.metadata)
    note = window_note(family, config)
    return GgufExport(
        architecture, chosen, header_bytes(architecture, metadata, tensors), tuple(tensors),
        tokenizer.kind, metadata, (*tokenizer.notes, *([note] if note else [])), quantization,
    )  # fmt: skip


def write_gguf(export: GgufExport, path: Path, max_memory: int, progress: Progress | None) -> str:
    """Write the file and flush it to the disk; return its blake3 (hex).

    Args:
        export: what to write.
        path: where.
        max_memory: cap on resident memory in bytes.
        progress: told of the bytes that are written.

    Raises:
        RegraftError: what reading, encoding and writing raise.
    """
    told = ProgressMeter(progress, "export", export.nbytes)
    with FilePool() as files:
        stored = FileSource(files)
        quantization = export.quantization
        source = stored if quantization is None else plain_values(quantization, stored)
        return write_pieces(path, _pieces(export, source, _room(max_memory), told))


def _pieces(export: GgufExport, source: Source, room: int, told: ProgressMeter) -> Iterator[bytes]:
    yield export.header
    told.add(len(export.header))
    for tensor in export.tensors:
        for piece in tensor_bytes(tensor, source, room):
            yield piece
            told.add(len(piece))
        told.add(0, tensor.name)


def _room(max_memory: int) -> int:
    """Return what the values of a piece may take: encoding takes several times as much."""
    return min(max((max_memory - _BASE_BYTES) // _SHARE, _LEAST_ROOM), _MOST_ROOM)


def _family(stored: Checkpoint, config: Mapping[str, Any]) -> tuple[str, GgufFamily]:
    found = family_of(config)
    if found is not None:
        return found
    if stored.config is None:
        raise UnsupportedError(
            "which kind of model it is cannot be told", where=stored.source,
            expected="a folder with config.json", hint="Give the folder that holds the config too",
        )  # fmt: skip
    kinds = sorted({kind for f in FAMILIES.values() for kind in (f.model_type, *f.also)})
    raise UnsupportedError(
        "models of this kind are not exported", where=stored.source,
        expected=f"model_type {', '.join(kinds)}", found=quoted(config.get("model_type")),
        hint="llama.cpp's convert_hf_to_gguf.py knows more kinds, and takes the folder as it is",
    )  # fmt: skip


def _check_config(stored: Checkpoint, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Refuse a config that lacks a number, or says what a GGUF file cannot."""
    where = str(stored.root / "config.json")
    counts = {key: config.get(key) for key in _COUNTS}
    groups = config.get("num_key_value_heads")
    counts |= {} if groups is None else {"num_key_value_heads": groups}
    wrong = [
        Problem("the config does not describe the model", where, f"{key}: a positive number",
                quoted(value), "Download config.json again")
        for key, value in counts.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]  # fmt: skip
    if wrong:
        raise FormatError(capped(wrong, stored.root))
    try:
        found = unsaid(family, config)
        if not found:  # what is made of it later has to be there, too
            metadata_of(family, config), factors_of(family, config), sizes_of(family, config)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise FormatError("the config does not describe the model", where=where, found=str(error),
                          hint="Download config.json again") from None  # fmt: skip
    if found:
        hint = "Serve the folder with transformers or vLLM"
        raise UnsupportedError(capped(
            [Problem(each.what, where, each.expected, each.found, hint) for each in found],
            stored.root,
        ))  # fmt: skip


def _check_tied(plain: Checkpoint) -> None:
    """Refuse a head that is stored, is no embedding, and is said to be the embedding.

    transformers 4 takes the embedding for it, and transformers 5 what is stored.
    """
    one, other = (plain.tensors.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    if one is None or other is None or one.is_virtual or other.is_virtual:
        return
    with FilePool() as files:
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        if same and files.digest(one) == files.digest(other):
            return
    raise UnsupportedError(
        "the model has an output head of its own, and its config says that it has none",
        where=f"{plain.source}, tensor 'lm_head.weight'",
        expected="the values of 'model.embed_tokens.weight', or tie_word_embeddings: false",
        hint="If the head was trained, set tie_word_embeddings to false in config.json",
    )  # fmt: skip


def _main_dtype(plain: Checkpoint) -> str:
    """Return the dtype that most values have."""
    counts: Counter[str] = Counter()
    for spec in plain.tensors.values():
        counts[spec.dtype] += spec.numel
    found = counts.most_common(1)[0][0] if counts else "F16"
    return found if found in WORKING_DTYPES else "F16"


def _general(stored: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    name = config.get("_name_or_path")
    if not isinstance(name, str) or not name:
        name = stored.source
    return {"general.type": "model", "general.name": Path(name).name or "model"}


def _file(kind: str) -> dict[str, Any]:
    version = int(gguf_package().GGML_QUANT_VERSION)
    return {"general.file_type": TYPES[kind], "general.quantization_version": version}
