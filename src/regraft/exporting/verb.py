"""The verb that writes a model for another program."""

from __future__ import annotations

import time
from pathlib import Path

from regraft.errors import UnsupportedError, UsageError
from regraft.exporting.gguf import GgufExport, plan_gguf, write_gguf
from regraft.exporting.output_file import OutputFile
from regraft.exporting.report import ExportReport
from regraft.exporting.tensors import parse_type
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import expanded
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.merging.inputs.base import open_base
from regraft.merging.options import MergeOptions
from regraft.progress import Progress, tell

ENGINES = ("gguf",)
"""What a model can be written for."""


@watched()
def export(
    model: str | Path,
    out: str | Path,
    *,
    engine: str = "gguf",
    type: str | None = None,
    like: str | Path | None = None,
    max_memory: str | int = "512MiB",
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model as a GGUF file, as llama.cpp reads it.

    Args:
        model: a folder in the layout of transformers, or a Hub id ``org/name[@revision]``. Of a
            quantized model, what its codes stand for is exported.
        out: the file to make, with the suffix ``.gguf``; it appears whole or not at all.
        engine: what it is written for, of :data:`ENGINES`.
        type: type of the matrices: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``, ``q5_0``,
            ``q4_1`` or ``q4_0``; by default the dtype that most values have.
        like: a GGUF file of the same model, whose tokenizer is taken instead of the folder's.
        max_memory: cap on resident memory, whatever the size of the model.
        overwrite: replace ``out``, once the new one is complete, if it is a GGUF file.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Raises:
        UnsupportedError: a kind of model or tokenizer that cannot be said in GGUF.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    started = time.perf_counter()
    if engine not in ENGINES:
        raise UsageError(f"cannot export for {engine!r}", where="--for",
                         expected=", ".join(ENGINES))  # fmt: skip
    kind, options = parse_type(type), MergeOptions.of(max_memory=max_memory)
    file = OutputFile.asked_for(out, model, like, overwrite=overwrite)
    tell(progress, "read", 0)
    stored = _opened(model, token)
    made = plan_gguf(stored, kind, None if like is None else expanded(like))
    file.check_inputs([shard.path for shard in stored.shards])
    file.check_space(made.nbytes)
    with file.work() as path:
        digest = write_gguf(made, path, options.max_memory, progress)
        tell(progress, "finish", made.nbytes)
    return _report(stored, file.path, made, digest, started)


def _opened(model: str | Path, token: str | None) -> Checkpoint:
    stored = open_base(locate(model, kind="base", token=token))
    if stored.container == "gguf":
        raise UnsupportedError(
            "the model is in GGUF already", where=stored.source,
            hint="To have another type of it: llama.cpp's llama-quantize",
        )  # fmt: skip
    return stored


def _report(
    stored: Checkpoint, out: Path, made: GgufExport, digest: str, started: float
) -> ExportReport:
    return ExportReport(
        stored.source, str(out), "gguf", (out.name,), made.nbytes, made.architecture, made.types,
        made.tokenizer, digest, notes=made.notes, seconds=time.perf_counter() - started,
    )  # fmt: skip
