"""The options of a merge: one object, whoever asked for it and however."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.deltas.methods.names import METHOD_NAMES
from regraft.errors import Problem, UsageError
from regraft.merging.inputs.expert_stacks import check_version
from regraft.quant.weight import FORMATS, ROUNDINGS
from regraft.tensors import BY_CONFIG_NAME, DTYPE_ALIASES, DTYPES, WORKING_DTYPES, parse_size

if TYPE_CHECKING:  # numpy; most merges choose no method
    from regraft.deltas.methods.form import MethodOptions
    from regraft.deltas.methods.registry import Method

KEEP = "keep"
"""The format of the base, with its scales."""

QUANTIZE = (KEEP, *FORMATS)
"""What ``quantize`` may be."""

BLOCK_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types of blocks that ``dtype`` may be where the output is a GGUF file."""

_OR_BLOCKS = f", or in a GGUF file {', '.join(BLOCK_TYPES).lower()}"

SUM = "sum"
"""The method of a merge by default: each delta is added, exactly."""

REFLINK = ("auto", "never", "always")
"""What ``reflink`` may be: ``always`` refuses where blocks cannot be shared."""


@dataclass(frozen=True)
class ElementMethod:
    """A method on the elements of deltas, with what it is told.

    Attributes:
        name: of :data:`regraft.deltas.methods.registry.METHODS`.
        density: the share of elements that it keeps.
        seed: which random bits it takes, where it draws.
    """

    name: str
    density: float
    seed: int


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
        seed: which random bits rounding takes, and a method that draws.
        double_quant: whether the scales of a 4-bit format are quantized too.
        method: how several deltas become one, of :data:`regraft.deltas.methods.names.METHOD_NAMES`.
        density: the share of elements that the method keeps; None where it takes none out.
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
    method: str = SUM
    density: float | None = None
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
        method: str = SUM,
        density: float | None = None,
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
            method=SUM if method == "cat" else method,
            density=_density(method, density),
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

    @property
    def element_method(self) -> ElementMethod | None:
        """How deltas become one; None for their sum."""
        if self.method == SUM:
            return None
        return ElementMethod(self.method, 1.0 if self.density is None else self.density, self.seed)


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


def density_problems(name: str, density: float | None) -> list[Problem]:
    """Return what is wrong with the density that a method is told."""
    from regraft.deltas.methods.registry import METHODS

    problems = []
    if density is not None and not 0 < density <= 1:
        problems.append(Problem("the density has to be a share", "--density", "above 0, up to 1",
                                f"{density:g}"))  # fmt: skip
    if density is not None and METHODS[name].density is None:
        problems.append(Problem(f"the method {name} takes no elements out", "--density",
                                "no density", f"{density:g}"))  # fmt: skip
    return problems


def combining_options(
    name: str, *, rank: int | None, energy: float | None, density: float | None, seed: int
) -> tuple[Method, MethodOptions]:
    """Return a method by which adapters become one, and what it is told; checked.

    Raises:
        UsageError: there is no such method, or options are out of range, mean nothing to it, or
            contradict each other; all of these at once.
    """
    from regraft.deltas.methods.form import MethodOptions
    from regraft.deltas.methods.registry import METHODS

    method = METHODS.get(name)
    if method is None:
        raise UsageError(
            "there is no such method", where="method", expected=", ".join(METHODS), found=name
        )
    problems = [*_rank_problems(name, method, rank, energy), *density_problems(name, density)]
    if problems:
        raise UsageError(problems)
    kept = density if density is not None else (method.density or 1.0)
    return method, MethodOptions(density=kept, seed=seed, rank=rank)


def _rank_problems(
    name: str, method: Method, rank: int | None, energy: float | None
) -> Iterator[Problem]:
    if rank is not None and energy is not None:
        yield Problem("rank and energy are two ways to say the same", "--energy", "one of them",
                      "both")  # fmt: skip
    if rank is not None and rank < 1:
        yield Problem("the rank has to be at least 1", "--rank", found=str(rank))
    if energy is not None and not 0 < energy <= 1:
        yield Problem("the energy has to be a share", "--energy", "above 0, up to 1",
                      f"{energy:g}")  # fmt: skip
    if (rank is not None or energy is not None) and not method.has_rank:
        yield Problem(f"the method {name} has the rank of its factors",
                      "--rank" if rank is not None else "--energy", "none",
                      hint="Choose --method svd, or shrink the outcome")  # fmt: skip


def _density(name: str, density: float | None) -> float | None:
    """Return the density of a method, checked; its own where none is given.

    Raises:
        UsageError: there is no such method, a merge cannot do it by itself, or it has no density.
    """
    if name not in METHOD_NAMES:
        raise UsageError(
            "there is no such method", where="--method", expected=", ".join(METHOD_NAMES),
            found=name,
        )  # fmt: skip
    if name in (SUM, "cat") and density is None:
        return None
    from regraft.deltas.methods.registry import METHODS

    if name not in (SUM, "cat") and METHODS[name].on_elements is None:
        straight = [SUM, *(each for each, method in METHODS.items() if method.on_elements)]
        raise UsageError(
            f"the method {name} makes one adapter of several, which a merge takes as one",
            where="--method", expected=", ".join(straight), found=name,
            hint=f"Make it first: regraft combine ADAPTERS -o ONE --method {name}; then merge ONE",
        )  # fmt: skip
    if problems := density_problems(name, density):
        raise UsageError(problems)
    return density if density is not None else METHODS[name].density


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
    seeded = options.seed and options.method == SUM
    given = "--rounding" if options.rounding else "--seed" if seeded else ""
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
