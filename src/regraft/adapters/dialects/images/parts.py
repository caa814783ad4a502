"""Parts of a pipeline: one adapter's file may be for several models; a base is one of them.

A pipeline of diffusers is a folder with a folder for each part (``unet``, ``text_encoder``). The
base of a command is the folder of one part, and its name says which part that is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from regraft.adapters.dialects.form import Moved, PlainAdapter
from regraft.errors import MismatchError, Problem, UnsupportedError, UsageError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.problems import capped, quoted
from regraft.tensors import TensorSpec

PARTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
)  # fmt: skip
"""Parts of a pipeline that adapters are for, by the names of their folders."""

_BY_CLASS = (
    ("UNet", "unet"), ("Transformer", "transformer"), ("CLIPTextModelWithProjection",
     "text_encoder_2"), ("CLIPTextModel", "text_encoder"),
)  # fmt: skip
"""What a class's name has in it, and the part that it then is, where the folder does not say."""

PART = "regraft_part"
"""The key of an adapter's metadata that keeps which part it is for."""

MERGE = "Merge it (`regraft merge`), and load the merged model in the pipeline"


def part_of(base: Checkpoint) -> str | None:
    """Return which part of a pipeline a model is, None where neither folder nor class tells."""
    if base.root.name in PARTS:
        return base.root.name
    config = base.config or {}
    listed = config.get("architectures")
    classes = [config.get("_class_name"), *(listed if isinstance(listed, list) else [])]
    named = " ".join(str(each) for each in classes if each)
    return next((part for word, part in _BY_CLASS if word in named), None)


def chosen(
    there: Sequence[str], base: Checkpoint | None, where: Path
) -> tuple[str | None, tuple[str, ...]]:
    """Return which of an adapter's parts is meant, and what to say of the others.

    Args:
        there: the parts in the adapter.
        base: the model, where it is known.
        where: the adapter.

    Returns:
        The part, None where it has several and there is no base.

    Raises:
        MismatchError: the adapter has no part for that model.
        UsageError: it has several, and the model does not show which part it is.
    """
    part = None if base is None else part_of(base)
    if base is not None and part is not None and part not in there:
        raise MismatchError(
            "the adapter has nothing for this part of a pipeline", where=str(where),
            expected=f"modules of {part} ({base.source})", found=", ".join(there),
            hint=f"Name the folder of another part as the base, such as {there[0]}",
        )  # fmt: skip
    if part is None and len(there) == 1:
        part = there[0]
    if part is None and base is not None:
        raise UsageError(
            "which part of the pipeline is this model?", where=base.source,
            expected=f"a folder called {' or '.join(there)}", found=quoted(base.root.name),
            hint="Give the part's own folder in the pipeline as the base",
        )  # fmt: skip
    others = [each for each in there if each != part]
    said = f"{where}: {', '.join(others)} of it is for other parts of the pipeline, left aside here"
    return part, (said,) if part and others else ()


def several(there: Sequence[str]) -> str:
    """Return why an adapter of several parts takes the base."""
    return f"it holds modules of {', '.join(there)}, and the base says which part is meant"


def part_to_write(adapter: PlainAdapter, base: Checkpoint | None) -> str:
    """Return the part that an adapter is for: that of the base, else the one it was read from.

    Raises:
        UsageError: neither tells.
    """
    part = None if base is None else part_of(base)
    part = part or adapter.metadata.get(PART)
    if part is None:
        raise UsageError(
            "it is not known which part of a pipeline the adapter is for", where="base",
            expected=f"a folder called {' or '.join(PARTS)}",
            found="none" if base is None else base.source,
            hint="Name the part's own folder with --base, such as PIPELINE/unet",
        )  # fmt: skip
    return part


def refuse_unsayable(
    adapter: PlainAdapter, kinds: Sequence[str], file: str, *, biases: bool
) -> None:
    """Refuse what files of image adapters have no place for, all at once.

    Args:
        adapter: the adapter.
        kinds: kinds of modules that the dialect has.
        file: the file, for messages.
        biases: whether it has biases of B.

    Raises:
        UnsupportedError: there is some.
    """
    problems = [
        Problem(f"the dialect has no such layers ({module.kind})", module.name, hint=MERGE)
        for module in adapter.modules
        if module.kind not in kinds
    ]
    problems += [
        Problem("the dialect has no bias of B", module.name, hint=MERGE)
        for module in adapter.modules
        if module.bias is not None and not biases
    ]
    problems += [
        Problem("the dialect adds deltas, and replaces no tensor", name, hint=MERGE)
        for name in (*adapter.whole, *adapter.token_rows)
    ]
    if problems:
        raise UnsupportedError(capped(problems, Path(file)))


_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}


def number_in(files: FilePool, spec: TensorSpec) -> float | None:
    """Return the finite number that a tensor holds, None where it holds none, or several."""
    number = _number(files, spec)
    return number if number is not None and math.isfinite(number) else None


def _number(files: FilePool, spec: TensorSpec) -> float | None:
    raw = np.empty(spec.nbytes, np.uint8)
    files.read_into(spec, 0, raw.data)
    if spec.dtype == "BF16" and raw.size == 2:
        return float((raw.view("<u2").astype("<u4") << 16).view("<f4")[0])
    kind = _NUMBERS.get(spec.dtype)
    if kind is None or raw.size != np.dtype(kind).itemsize:
        return None
    return float(raw.view(kind)[0])


def constant(value: float) -> Moved:
    """Return a tensor of one number without dimensions; float64 where float32 does not hold it."""
    narrow = float(np.float32(value)) == value
    dtype, kind, unsigned = ("F32", "<f4", "<u4") if narrow else ("F64", "<f8", "<u8")
    bits = np.array([value], kind).view(unsigned).reshape(())
    return Moved(dtype, (), (), lambda: bits)


def shapes_of(base: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of the weight of every module that has a matrix or more, by its name."""
    return {
        name.removesuffix(".weight"): spec.shape
        for name, spec in base.tensors.items()
        if name.endswith(".weight") and len(spec.shape) > 1
    }
