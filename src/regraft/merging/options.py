"""The options of a merge: one object, whoever asked for it and however."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regraft.errors import UsageError
from regraft.merging.inputs.expert_stacks import check_version
from regraft.quant.weight import FORMATS, ROUNDINGS
from regraft.tensors import BY_CONFIG_NAME, DTYPE_ALIASES, DTYPES, WORKING_DTYPES, parse_size

KEEP = "keep"
"""The format of the base, with its scales."""

QUANTIZE = (KEEP, *FORMATS)
"""What ``quantize`` may be."""

BLOCK_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types of blocks that ``dtype`` may be where the output is a GGUF file."""

_OR_BLOCKS = f", or in a GGUF file {', '.join(BLOCK_TYPES).lower()}"

REFLINK = ("auto", "never", "always")
"""What ``reflink`` may be: ``always`` refuses where blocks cannot be shared."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The options of a merge, checked.

    :func:`regraft.merge` and the other verbs have a parameter of the same name for each that they
    take, and so has the command line.

    Attributes:
        dtype: safetensors dtype of every floating-point tensor of the output, or of
            :data:`BLOCK_TYPES`; None keeps each.
        shard_size: largest output file in bytes; None keeps the base's files.
        max_memory: cap on resident memory in bytes.
        threads: worker threads; None chooses.
        quantize: a format, or ``keep`` for the base's own; None for plain values.
        rounding: how values become codes, of :data:`regraft.quant.weight.ROUNDINGS`; None
            chooses.
        seed: which random bits rounding takes.
        double_quant: whether the scales of a 4-bit format are quantized too.
        peft_version: the release of PEFT that trained adapters whose config does not say it.
        undo: whether the output keeps what an undo needs; None chooses, by
            :func:`regraft.merging.planning.planner.settled`.
        keep_adapter: whether a copy of each adapter is kept for it.
        reflink: whether untouched tensors share blocks of the disk with the input's file, of
            :data:`REFLINK`; it changes no byte.
        digest_cache: whether digests of files that are as they were are taken from earlier work,
            and kept for later work.
    """

    dtype: str | None = None
    shard_size: int | None = None
    max_memory: int = 512 * 2**20
    threads: int | None = None
    quantize: str | None = None
    rounding: str | None = None
    seed: int = 0
    double_quant: bool = False
    peft_version: str | None = None
    undo: bool | None = False
    keep_adapter: bool = False
    reflink: str = "auto"
    digest_cache: bool = False

    @classmethod
    def of(
        cls,
        *,
        dtype: str | None = None,
        shard_size: str | int | None = None,
        max_memory: str | int = "512MiB",
        undo: bool | None = False,
        keep_adapter: bool = False,
        **others: Any,
    ) -> MergeOptions:
        """Return the options as a call gives them: sizes such as ``"5GB"``, dtypes by any name.

        Raises:
            UsageError: one is none, or two contradict each other.
        """
        options = cls(
            shard_size=_size("shard_size", shard_size),
            max_memory=_size("max_memory", max_memory) or 0,
            dtype=parse_dtype(dtype, blocks=others.get("quantize") == KEEP),
            undo=undo,
            keep_adapter=keep_adapter and undo is not False,
            **others,
        )
        if options.threads is not None and options.threads < 1:
            found = str(options.threads)
            raise UsageError("threads has to be at least 1", where="--threads", found=found)
        if options.reflink not in REFLINK:
            raise UsageError(
                f"cannot do {options.reflink!r}", where="--reflink", expected=", ".join(REFLINK)
            )
        check_version(options.peft_version)
        _check_quantization(options)
        return options


def _size(name: str, value: str | int | None) -> int | None:
    try:
        return parse_size(value) if value is not None else None
    except ValueError as error:
        raise UsageError(str(error), where=f"--{name.replace('_', '-')}") from None


def parse_dtype(name: str | None, *, blocks: bool = False) -> str | None:
    """Return the safetensors dtype for ``"bfloat16"``, ``"bf16"``, ``"torch.half"``, ...

    Args:
        name: a dtype's name; None for none.
        blocks: whether it may be one of :data:`BLOCK_TYPES`, which is returned as ggml spells it.

    Raises:
        UsageError: it is none that regraft can write.
    """
    if name is None:
        return None
    short = str(name).removeprefix("torch.")
    short = DTYPE_ALIASES.get(short.lower(), short)
    if blocks and short.upper() in BLOCK_TYPES:
        return short.upper()
    found = BY_CONFIG_NAME.get(short) or DTYPES.get(short.upper())
    if found is None or found.name not in WORKING_DTYPES:
        raise UsageError(
            f"cannot write dtype {name!r}", where="--dtype",
            expected="float32, bfloat16 or float16" + _OR_BLOCKS * blocks,
        )  # fmt: skip
    return found.name


def dtype_name(dtype: str) -> str:
    """Return the name by which receipts have a dtype: that of a config, or ggml's of blocks."""
    return DTYPES[dtype].config_name if dtype in DTYPES else dtype.lower()


def _check_quantization(options: MergeOptions) -> None:
    """Refuse options of how values become codes.

    Raises:
        UsageError: there is no such format or rounding, or nothing that it could be of.
    """
    for name, values in (("quantize", QUANTIZE), ("rounding", ROUNDINGS)):
        value = getattr(options, name)
        if value is not None and value not in values:
            raise UsageError(f"cannot do {value!r}", where=f"--{name}", expected=", ".join(values))
    given = "--rounding" if options.rounding else "--seed" if options.seed else ""
    if options.quantize is None and given:
        raise UsageError(
            "rounding to codes needs codes", where=given, expected="--quantize too",
            hint="A merge into plain values rounds to nearest; see --dtype",
        )  # fmt: skip
    if not 0 <= options.seed < 2**63:
        raise UsageError("seed has to be a whole number from 0 to 2^63 - 1", where="--seed")
    if options.double_quant and options.quantize not in ("nf4", "fp4"):
        raise UsageError(
            "only scales of 4-bit formats are quantized", where="--double-quant",
            expected="nf4 or fp4", found=str(options.quantize),
        )  # fmt: skip
