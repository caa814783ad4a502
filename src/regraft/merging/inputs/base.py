"""Opening what can be a base: a checkpoint, plain or quantized, or a GGUF model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from regraft.errors import UnsupportedError
from regraft.formats.checkpoint import Checkpoint, Shard, open_checkpoint
from regraft.formats.files.reading import is_there
from regraft.formats.gguf import open_gguf
from regraft.formats.hub import Located, locate
from regraft.formats.layout import looks_like
from regraft.formats.remote import open_headers
from regraft.merging.inputs.dequantized_view import (
    GGUF,
    Quantization,
    logical_checkpoint,
    see_through,
)
from regraft.quant.formats.gguf import UNQUANTIZED
from regraft.quant.weight import QuantizedWeight
from regraft.tensors import WORKING_DTYPES


def open_base(located: Located) -> Checkpoint:
    """Open a base as it is on disk.

    Raises:
        RegraftError: it is none, or is malformed.
    """
    if looks_like(located.path) != "gguf":
        return open_checkpoint(located)
    from regraft.merging.inputs.gguf import open_gguf_base

    base = open_gguf_base(located.path)
    stored = [weight.codes for weight in base.weights.values()]
    shards = [
        Shard(path, path.name, tuple(spec.name for spec in stored if spec.path == path), {})
        for path in base.files
    ]
    return Checkpoint(
        root=base.root,
        source=located.source,
        revision=located.revision,
        shards=tuple(shards),
        tensors={spec.name: spec for spec in stored},
        config=base.config,
        index_metadata=None,
        container="gguf",
        # Beside a lone file lies what may have nothing to do with it.
        single_file=base.config_is_made,
    )


def whole_gguf(stored: Checkpoint) -> Checkpoint:
    """Return a model in GGUF with every tensor of its file, those that no weight is made of, too.

    Raises:
        UnsupportedError: it is several files.
        RegraftError: it cannot be opened.
    """
    if len(stored.shards) > 1:
        raise UnsupportedError(
            "a GGUF model in several files is not merged into one", where=stored.source,
            expected="one file", found=f"{len(stored.shards)} parts",
            hint="Join them first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )  # fmt: skip
    file = open_gguf(stored.shards[0].path)
    tensors = {name: tensor.stored for name, tensor in file.tensors.items()}
    return replace(
        stored, tensors=tensors, shards=(replace(stored.shards[0], tensors=tuple(tensors)),)
    )


def open_base_headers(base: str | Path, token: str | None) -> Checkpoint:
    """Open a base for a plan; of one on the Hub, headers alone."""
    if is_there(base):
        return open_base(locate(base, kind="base", token=token))
    return open_headers(base, token=token)


def see(stored: Checkpoint, dtype: str | None = None) -> tuple[Checkpoint, Quantization | None]:
    """Return a base as plain weights, and how it is quantized; None if it is not.

    Args:
        stored: the base as it is on disk.
        dtype: safetensors dtype that is wanted of the weights. The quantized weights of a GGUF
            model, which compute in no dtype of their own, are decoded to it; None for bfloat16.

    Raises:
        UnsupportedError: it is quantized in a way that is not known.
        FormatError: parts of its weights are missing or do not fit; lists all of them.
    """
    if stored.container != GGUF:
        return see_through(stored)
    from regraft.merging.inputs.gguf import DECODED, open_gguf_base

    base = open_gguf_base(stored.shards[0].path, dtype or DECODED)
    weights: dict[str, QuantizedWeight] = base.weights
    owners = {spec.name: w.name for w in weights.values() for spec in w.parts.values()}
    quantization = Quantization(GGUF, stored, weights, owners, frozenset(), base.warnings)
    return logical_checkpoint(quantization), quantization


def decoded_like(stored: Checkpoint, merged: Checkpoint) -> str | None:
    """Return the dtype that a GGUF base's quantized weights were decoded to for a merged model.

    That is the one that most of them have in it; None where it does not tell, and for other bases.

    Raises:
        RegraftError: what :func:`see` raises of the base.
    """
    if stored.container != GGUF:
        return None
    quantization = see(stored)[1]
    coded = quantization.weights.items() if quantization is not None else ()
    names = [name for name, weight in coded if weight.codec.name not in UNQUANTIZED]
    found = [merged.tensors[name].dtype for name in names if name in merged.tensors]
    known = [dtype for dtype in found if dtype in WORKING_DTYPES]
    return max(sorted(set(known)), key=known.count) if known else None
