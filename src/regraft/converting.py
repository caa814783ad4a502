"""The verbs that change how a model is stored, and nothing else: convert, dequantize, quantize."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.merging.files.publish import (
    SLACK_BYTES,
    check_output,
    check_space,
    free_bytes,
    out_path,
    replaced_inputs,
)
from regraft.merging.inputs.base import open_base, see
from regraft.merging.inputs.dequantized_view import Quantization, check_scales
from regraft.merging.planning.options import Coding, choices_of
from regraft.merging.planning.plan import Plan
from regraft.merging.planning.planner import Choices, make_plan
from regraft.merging.planning.quantized_output import KEEP, resolved
from regraft.progress import Progress, tell
from regraft.system.memory import peak_memory

if TYPE_CHECKING:
    from regraft.merging.files.receipt import Receipt


def convert(
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
    """Write a model in another dtype, in other files, or as safetensors instead of ``.bin``.

    Tensors whose dtype stays keep their bytes; others are rounded to the nearest value.

    Args:
        base: a folder, a single weights file, or a Hub id ``org/name[@revision]``.
        out: the folder to make; it appears whole or not at all.
        dtype: dtype of all floating-point tensors, in the config too; by default each keeps its
            own.
        shard_size: largest weight file, such as ``"5GB"``; by default the base's files are kept.
        max_memory, threads, overwrite: as in :func:`dequantize`.
        token, progress, command: as in :func:`dequantize`.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``.

    Raises:
        UnsupportedError: the model is quantized, or would be written as it is.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    choices = choices_of(dtype, shard_size, max_memory, threads)
    return _convert(
        base, out_path(out), choices, "convert", overwrite=overwrite, token=token,
        progress=progress, command=command,
    )  # fmt: skip


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
        base: a folder, a single ``.safetensors`` or ``.gguf`` file, or a Hub id
            ``org/name[@revision]``.
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
        base, out_path(out), choices, "dequantize", overwrite=overwrite, token=token,
        progress=progress, command=command,
    )  # fmt: skip


def quantize(
    base: str | Path,
    out: str | Path,
    to: str,
    *,
    double_quant: bool = False,
    rounding: str | None = None,
    seed: int = 0,
    shard_size: str | int | None = None,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt:
    """Write a model with its linear layers quantized, as transformers does when it loads one.

    Embeddings and the output head stay as they are. Rounded to nearest, codes and scales of
    ``nf4`` and ``fp4`` are those that bitsandbytes makes on a CPU, byte for byte.

    Args:
        base: a folder, a single ``.safetensors`` file, or a Hub id ``org/name[@revision]``. Of a
            quantized model, what its codes stand for is quantized.
        out: the folder to make; it appears whole or not at all.
        to: ``"nf4"``, ``"fp4"``, ``"int8"`` (LLM.int8) or ``"fp8"`` (E4M3 in blocks of 128x128).
        double_quant: quantize the scales of ``nf4`` or ``fp4`` too.
        rounding: ``"nearest"`` (default) or ``"stochastic"``.
        seed: which random bits stochastic rounding takes.
        shard_size, max_memory, threads, overwrite: as in :func:`dequantize`.
        token, progress, command: as in :func:`dequantize`.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``.

    Raises:
        UnsupportedError: the model is in this format already, or has no linear layer for it.
        NumericError: a weight holds NaN or infinity.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    coding = Coding(to, rounding, seed, double_quant)
    choices = choices_of(None, shard_size, max_memory, threads, coding=coding)
    return _convert(
        base, out_path(out), choices, "quantize", overwrite=overwrite, token=token,
        progress=progress, command=command,
    )  # fmt: skip


@watched()
def _convert(
    base: str | Path, out: Path, choices: Choices, verb: str, *, overwrite: bool,
    token: str | None, progress: Progress | None, command: str | None,
) -> Receipt:  # fmt: skip
    """Write a model in another form: a merge without adapters, which keeps no undo."""
    started = time.perf_counter()
    check_output(out, replaced_inputs(out, base), overwrite=overwrite)
    tell(progress, "read", 0)
    stored = open_base(locate(base, kind="base", token=token))
    plain, quantization = see(stored, choices.dtype)
    check = _check_convertible if verb == "convert" else _check_wanted
    check(stored, quantization, choices)
    if quantization is not None:
        check_scales(quantization)
    made = make_plan(plain, [], choices, out, quantization=quantization)
    inputs = [shard.path for shard in stored.shards] if stored.single_file else [stored.root]
    check_output(out, inputs, overwrite=overwrite)
    check_space(out, made.disk_bytes)
    made = replace(made, disk={"needed": made.disk_bytes + SLACK_BYTES, "free": free_bytes(out)})
    called = command or _call_of(verb, stored.source, made)
    return _build(made, out, called, started, progress,
                  overwrite=overwrite)  # fmt: skip


def _call_of(verb: str, base: str, made: Plan) -> str:
    """Return the Python call that converts a model so, for its receipt."""
    options = dict(made.options)
    first = [repr(base), repr(made.out)]
    if format := options.pop("quantize", None):
        first.append(repr(format))
    usual = {"dtype": None, "shard_size": None, "undo": False, "rounding": "nearest", "seed": 0}
    usual |= {"double_quant": False}
    chosen = [f"{n}={v!r}" for n, v in options.items() if v != usual.get(n)]
    return f"regraft.{verb}({', '.join([*first, *chosen])})"


def _check_convertible(
    stored: Checkpoint, quantization: Quantization | None, choices: Choices
) -> None:
    """Refuse a model in codes, and to write a model as it is.

    Raises:
        UnsupportedError: it is one of these.
    """
    if quantization is not None:
        raise UnsupportedError(
            f"the model is quantized ({', '.join(quantization.formats)})", where=stored.source,
            expected="a model with plain weights",
            hint="`regraft dequantize` writes it as a plain one, with --dtype and --shard-size",
        )  # fmt: skip
    in_safetensors = all(shard.path.suffix == ".safetensors" for shard in stored.shards)
    if choices.dtype is None and choices.shard_size is None and in_safetensors:
        raise UnsupportedError(
            "there is nothing to convert: the weights are safetensors files already",
            where=stored.source, hint="Give --dtype or --shard-size",
        )  # fmt: skip


def _check_wanted(stored: Checkpoint, quantization: Quantization | None, choices: Choices) -> None:
    """Refuse to do nothing.

    Raises:
        UnsupportedError: the model is as it is wanted already.
    """
    if choices.quantize is None and quantization is None:
        raise UnsupportedError(
            "the model is not quantized", where=stored.source,
            hint="There is nothing to do; to change its dtype: regraft convert",
        )  # fmt: skip
    if resolved(choices.quantize, quantization, double_quant=choices.double_quant) == KEEP:
        raise UnsupportedError(
            "the model is in this format already", where=stored.source,
            found=str(choices.quantize), hint="There is nothing to do",
        )  # fmt: skip


def _build(
    made: Plan, out: Path, called: str, started: float, progress: Progress | None, *,
    overwrite: bool,
) -> Receipt:  # fmt: skip
    from regraft.merging.building import build
    from regraft.merging.files.staging import workplace

    files = [shard.path for shard in made.stored.shards]
    if not made.stored.single_file:
        files += [path for path in made.stored.root.iterdir() if path.is_file()]
    with workplace(out, overwrite=overwrite) as work:
        return build(
            made, work, files, called,
            lambda: (time.perf_counter() - started, peak_memory(), made.threads),
            keeping=None, progress=progress,
        )  # fmt: skip
