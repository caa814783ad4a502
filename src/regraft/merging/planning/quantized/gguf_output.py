"""Planning an output that is one GGUF file: what cannot be in it, and its head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.errors import Problem, UnsupportedError, UsageError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.gguf import read_head
from regraft.formats.gguf_header import BuiltHead, build_head
from regraft.merging.files.single_file import SUFFIX
from regraft.merging.inputs.base import whole_gguf
from regraft.merging.inputs.dequantized_view import GGUF, Quantization
from regraft.merging.inputs.gguf_types import target_type
from regraft.merging.options import KEEP, MergeOptions, parse_dtype
from regraft.merging.planning.match import Work
from regraft.merging.planning.plan import Plan, Step
from regraft.quant.formats.gguf import keeps

_FOLDER = "Give a folder as -o: weights are then written as plain values, in safetensors"
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
}
"""``general.file_type`` of a model whose matrices have a type; llama.h's ``llama_ftype``."""


def is_gguf_output(out: object) -> bool:
    """Whether an output, as a call names it, is one GGUF file."""
    return isinstance(out, str | Path) and Path(out).suffix == SUFFIX


def format_of(out: object, quantize: str | None) -> str | None:
    """Return the format that a call asks for: by default a GGUF file keeps its base's types."""
    return KEEP if quantize is None and is_gguf_output(out) else quantize


def decoded_to(base: Checkpoint, options: MergeOptions) -> str | None:
    """Return the dtype that a base's weights are decoded to, as ``see`` takes it.

    Codes are rounded to from values that were not rounded before.
    """
    in_gguf = base.container == GGUF and options.quantize == KEEP
    return "F32" if in_gguf else options.dtype


def check_container(out: Path, base: Checkpoint, options: MergeOptions) -> None:
    """Refuse an output that is no GGUF file where it would have to be one, and the other way.

    Raises:
        UnsupportedError, UsageError: it is, see :func:`check_gguf_output`.
    """
    if is_gguf_output(out):
        check_gguf_output(out, base, options)
    elif base.container == GGUF and options.quantize == KEEP:
        raise UnsupportedError(
            "this format is read, but not written to a folder", where=base.source,
            expected="an output whose name ends in .gguf", found="--quantize keep",
            hint="Give -o OUT.gguf, or merge without --quantize keep",
        )  # fmt: skip


def check_gguf_output(out: Path, base: Checkpoint, options: MergeOptions) -> None:
    """Refuse what cannot be one GGUF file, before any more is read.

    Raises:
        UnsupportedError: the base is no GGUF model.
        UsageError: another format is asked for, or several files.
    """
    where = str(out)
    if base.container != GGUF:
        raise UnsupportedError(
            "a GGUF file is made from a base in GGUF", where=where, expected="BASE.gguf",
            found=base.source, hint="Give a folder as -o, and convert that with llama.cpp",
        )  # fmt: skip
    if options.quantize != KEEP:
        raise UsageError(
            "GGUF does not hold this format", where="--quantize", expected="keep, or --dtype",
            found=str(options.quantize), hint="See --dtype for the types that can be written",
        )  # fmt: skip
    if options.shard_size is not None:
        raise UsageError(
            "a GGUF model is written as one file", where="--shard-size",
            hint="Leave it out; llama-gguf-split splits the file",
        )  # fmt: skip


def whole(quantization: Quantization) -> Quantization:
    """Return how a base in GGUF is stored, with the tensors that no weight is made of.

    Raises:
        UnsupportedError: it is several files.
    """
    stored = whole_gguf(quantization.stored)
    unused = stored.tensors.keys() - quantization.owners.keys()
    return replace(quantization, stored=stored, skipped=frozenset(unused), warnings=())


def unfit_for_gguf(
    works: Iterable[Work], quantization: Quantization, dtype: str | None
) -> list[Problem]:
    """Return what an adapter asks for that cannot be done to the tensors of a GGUF file."""
    problems = []
    for work in works:
        weight = quantization.weights.get(work.name)
        if weight is None:  # also the head of tied embeddings that the adapter parts
            problems.append(
                Problem("the base has no such tensor, and a GGUF file gets no new ones", work.name,
                        hint=_FOLDER)
            )  # fmt: skip
            continue
        type_ = target_type(weight, dtype)
        if not keeps(type_):
            problems.append(
                Problem("the values of this type lie on no grid that merged ones could be kept on",
                        f"{work.name} ({weight.codes.name})", found=type_,
                        hint=f"Write another type: --dtype q8_0. {_FOLDER}")
            )  # fmt: skip
    return problems


# -- the file --------------------------------------------------------------------------------------


def gguf_head(plan: Plan, digest: str) -> BuiltHead:
    """Return the head of the file that a plan makes; ``digest`` is the plan's.

    Raises:
        RegraftError: the base's file cannot be read.
    """
    kept = plan.quantization
    assert kept is not None
    dtype = parse_dtype(plan.options["dtype"], blocks=True)
    head = read_head(kept.stored.shards[0].path)
    return build_head(head, _types(plan.steps), digest, _FILE_TYPES.get(dtype or ""))


def _types(steps: Iterable[Step]) -> Mapping[str, Any]:
    """Return the ggml types of the tensors that are written, by their name in the file."""
    return {step.name: step.coded.codec.name for step in steps if step.coded is not None}


def gguf_name(base: Checkpoint, out: Path | None) -> str:
    """Return the name of the file: the output's, or where there is none the base's."""
    return out.name if out is not None else base.shards[0].name
