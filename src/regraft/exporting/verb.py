"""The verb that writes a model for another program."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import UnsupportedError, UsageError
from regraft.exporting.gguf import plan_gguf, write_gguf
from regraft.exporting.mlx import (
    check_for_mlx,
    mlx_config,
    nbytes_for_mlx,
    window_note,
    write_mlx,
)
from regraft.exporting.ollama import GGUF_NAME, MODELFILE, modelfile_of
from regraft.exporting.output_file import OutputFile
from regraft.exporting.report import ExportReport
from regraft.exporting.tensors import parse_type
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import expanded
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import write_file
from regraft.merging.inputs.base import open_base
from regraft.merging.options import MergeOptions
from regraft.progress import Progress, tell


@dataclass(frozen=True)
class _Call:
    """What was asked for; the attributes are the parameters of :func:`export`."""

    model: str | Path
    out: str | Path
    type: str | None
    like: Path | None
    max_memory: int
    reflink: str
    overwrite: bool
    token: str | None
    progress: Progress | None

    def opened(self) -> Checkpoint:
        """Return the model as it is on disk.

        Raises:
            UnsupportedError: it is in GGUF already.
        """
        tell(self.progress, "read", 0)
        stored = open_base(locate(self.model, kind="base", token=self.token))
        if stored.container == "gguf":
            raise UnsupportedError(
                "the model is in GGUF already", where=stored.source,
                hint="To have another type of it: llama.cpp's llama-quantize",
            )  # fmt: skip
        return stored


@watched()
def export(
    model: str | Path,
    out: str | Path,
    *,
    engine: str = "gguf",
    type: str | None = None,
    like: str | Path | None = None,
    max_memory: str | int = "512MiB",
    reflink: str = "auto",
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model as another program reads it.

    Args:
        model: a folder in the layout of transformers, or a Hub id ``org/name[@revision]``. Of a
            quantized model, what its codes stand for is exported to GGUF.
        out: what to make; it appears whole or not at all. For ``gguf`` a file with the suffix
            ``.gguf``, else a folder.
        engine: ``"gguf"`` or ``"llama.cpp"`` for llama.cpp and what is made of it; ``"ollama"`` for
            a folder with such a file and a Modelfile; ``"mlx"`` for mlx-lm: the same weights with
            the keys that it looks for in the config.
        type: type of the matrices in GGUF: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``,
            ``q5_0``, ``q4_1`` or ``q4_0``; by default the dtype that most values have.
        like: a GGUF file of the same model, whose tokenizer is taken instead of the folder's.
        max_memory: cap on resident memory, whatever the size of the model.
        reflink: whether weights share blocks of the disk with the model's files, for ``mlx``; as in
            :func:`regraft.merge`.
        overwrite: replace ``out``, once the new one is complete, if it holds the like.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Raises:
        UnsupportedError: a kind of model or tokenizer that the program does not follow.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    engine = OTHER_NAMES.get(engine.lower(), engine)
    if engine not in ENGINES:
        raise UsageError(f"cannot export for {engine!r}", where="--for",
                         expected=", ".join(ENGINES))  # fmt: skip
    options = MergeOptions.of(max_memory=max_memory, reflink=reflink)
    call = _Call(
        model, out, parse_type(type), None if like is None else expanded(like),
        options.max_memory, options.reflink, overwrite, token, progress,
    )  # fmt: skip
    return ENGINES[engine](call, time.perf_counter())


def _for_gguf(call: _Call, started: float) -> ExportReport:
    file = OutputFile.asked_for(call.out, call.model, call.like, overwrite=call.overwrite)
    stored = call.opened()
    made = plan_gguf(stored, call.type, call.like)
    file.check_inputs([shard.path for shard in stored.shards])
    file.check_space(made.nbytes)
    with file.work() as path:
        digest = write_gguf(made, path, call.max_memory, call.progress)
        tell(call.progress, "finish", made.nbytes)
    return ExportReport(
        stored.source, str(file.path), "gguf", (file.path.name,), made.nbytes, made.architecture,
        made.types, made.tokenizer, digest, notes=made.notes,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _for_ollama(call: _Call, started: float) -> ExportReport:
    folder = OutputFolder.asked_for(
        call.out, call.model, call.like, overwrite=call.overwrite, kind="ollama"
    )
    stored = call.opened()
    made = plan_gguf(stored, call.type, call.like)
    generation = stored.root / "generation_config.json"
    said = read_json_object(generation) if generation.is_file() else {}
    modelfile = modelfile_of(made.metadata, said)
    folder.check_inputs([stored.root, *([call.like] if call.like else [])])
    folder.check_space(made.nbytes)
    with folder.work() as work:
        work.begin("export")
        work.keep_only(())
        digest = write_gguf(made, work.out / GGUF_NAME, call.max_memory, call.progress)
        write_file(work.out / MODELFILE, modelfile.text.encode())
        tell(call.progress, "finish", made.nbytes)
    return ExportReport(
        stored.source, str(folder.path), "ollama", (MODELFILE, GGUF_NAME), made.nbytes,
        made.architecture, made.types, made.tokenizer, digest,
        notes=(*made.notes, *modelfile.notes), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _for_mlx(call: _Call, started: float) -> ExportReport:
    if call.type is not None or call.like is not None:
        raise UsageError("weights and tokenizer stay as they are for MLX",
                         where="--like" if call.type is None else "--type",
                         hint="mlx_lm.convert -q quantizes OUT")  # fmt: skip
    folder = OutputFolder.asked_for(call.out, call.model, overwrite=call.overwrite)
    stored = call.opened()
    check_for_mlx(stored)
    own = stored.config or {}
    config = mlx_config(own, has_head="lm_head.weight" in stored.tensors)
    note = window_note(own)
    folder.check_inputs([stored.root])
    nbytes = nbytes_for_mlx(stored)
    share = folder.shares([shard.path for shard in stored.shards], call.reflink)
    folder.check_space(0 if share else nbytes)
    with folder.work() as work:
        work.begin("export")
        work.keep_only(())
        files = write_mlx(stored, config, work, share=share, progress=call.progress)
        tell(call.progress, "finish", nbytes)
    return ExportReport(
        stored.source, str(folder.path), "mlx", files, nbytes, str(own.get("model_type")),
        changes=_changes(own, config), notes=(note,) if note else (),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _changes(old: dict[str, object], new: dict[str, object]) -> tuple[str, ...]:
    """Return the keys that were added, those of an inner config behind its name."""
    found = tuple(key for key in new if new[key] is not None and old.get(key) is None)
    for key, inner in old.items():
        below = new[key]
        if isinstance(inner, dict) and isinstance(below, dict):
            found += tuple(f"{key}.{each}" for each in below if each not in inner)
    return found


OTHER_NAMES = {"llama.cpp": "gguf", "mlx-lm": "mlx"}
"""What engines are called elsewhere, and what is written for them."""

ENGINES: dict[str, Callable[[_Call, float], ExportReport]] = {
    "gguf": _for_gguf, "ollama": _for_ollama, "mlx": _for_mlx,
}  # fmt: skip
"""What a model can be written for."""
