"""The verbs that change how a model is stored, and nothing else: dequantize."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.api import call_of
from regraft.errors import UnsupportedError
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.hub import locate
from regraft.memory import peak_memory
from regraft.merging.events import Progress, tell
from regraft.merging.output import SLACK_BYTES, check_output, check_space, free_bytes
from regraft.merging.plan import Plan
from regraft.merging.planning import Choices, make_plan
from regraft.merging.quantized import check_scales, see_through
from regraft.merging.recipe import choices_of

if TYPE_CHECKING:
    from regraft.merging.receipt import Receipt


def dequantize(
    base: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt:
    """Write a quantized model as a plain one.

    The values are those that the format's own library computes, byte for byte.

    Args:
        base: a folder, a single ``.safetensors`` file, or a Hub id ``org/name[@revision]``.
        out: the folder to make; it appears whole or not at all.
        dtype: dtype of all floating-point tensors; by default a quantized weight gets the one that
            its format computes in, and the others keep theirs.
        shard_size: largest weight file, such as ``"5GB"``; by default the base's files are kept.
        max_memory: cap on resident memory, whatever the size of the model.
        threads: worker threads; by default three more than there are cores at hand.
        overwrite: replace ``out``, once the new one is complete, if it holds a model already.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.
        command: how the receipt and the card say it was made.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``.

    Raises:
        UnsupportedError: the model is not quantized, or in a way that is not known.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    choices = choices_of(dtype, shard_size, max_memory, threads)
    return _convert(
        base, Path(out), choices, "dequantize", overwrite=overwrite, token=token,
        progress=progress, command=command,
    )  # fmt: skip


def _convert(
    base: str | Path, out: Path, choices: Choices, verb: str, *, overwrite: bool,
    token: str | None, progress: Progress | None, command: str | None,
) -> Receipt:  # fmt: skip
    """Write a model in another form: a merge without adapters, which keeps no undo."""
    started = time.perf_counter()
    check_output(out, [], overwrite=overwrite)
    tell(progress, "read", 0)
    stored = open_checkpoint(locate(base, kind="base", token=token))
    plain, quantization = see_through(stored)
    if quantization is None:
        raise UnsupportedError(
            "the model is not quantized", where=stored.source,
            hint="There is nothing to do; to change its dtype, merge with --dtype",
        )  # fmt: skip
    check_scales(quantization)
    made = make_plan(plain, [], choices, out, quantization=quantization)
    inputs = [shard.path for shard in stored.shards] if stored.single_file else [stored.root]
    check_output(out, inputs, overwrite=overwrite)
    check_space(out, made.disk_bytes)
    made = replace(made, disk={"needed": made.disk_bytes + SLACK_BYTES, "free": free_bytes(out)})
    return _build(made, out, command or call_of(verb, stored.source, made), started, progress,
                  overwrite=overwrite)  # fmt: skip


def _build(
    made: Plan, out: Path, called: str, started: float, progress: Progress | None, *,
    overwrite: bool,
) -> Receipt:  # fmt: skip
    from regraft.merging.building import build
    from regraft.merging.workplace import workplace

    files = [shard.path for shard in made.stored.shards]
    if not made.stored.single_file:
        files += [path for path in made.stored.root.iterdir() if path.is_file()]
    with workplace(out, overwrite=overwrite) as work:
        return build(
            made, work, files, called,
            lambda: (time.perf_counter() - started, peak_memory(), made.threads),
            keeping=None, progress=progress,
        )  # fmt: skip
