"""Which quantized weights a checkpoint holds: the finders of all formats, by the config's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from regraft.errors import FormatError, Problem, UnsupportedError
from regraft.quant.weight import FoundWeights, QuantizedWeight, Stored

if TYPE_CHECKING:
    from regraft.quant.making import Maker

METHODS: dict[str, tuple[str, ...]] = {
    "awq": ("regraft.quant.formats.awq",),
    "bitsandbytes": ("regraft.quant.formats.bitsandbytes", "regraft.quant.formats.int8"),
    "compressed-tensors": ("regraft.quant.formats.compressed_tensors",),
    "fbgemm_fp8": ("regraft.quant.formats.fp8",),
    "fp8": ("regraft.quant.formats.fp8",),
    "gptq": ("regraft.quant.formats.gptq",),
    "mxfp4": ("regraft.quant.formats.mxfp4",),
}
"""Modules whose ``find`` looks for the weights of a ``quant_method``."""

_MAKERS: dict[str, tuple[str, str]] = {
    "nf4": ("regraft.quant.formats.bitsandbytes", "FourBitMaker"),
    "fp4": ("regraft.quant.formats.bitsandbytes", "FourBitMaker"),
    "int8": ("regraft.quant.formats.int8", "Int8Maker"),
    "fp8": ("regraft.quant.formats.fp8", "Fp8Maker"),
}
"""Every format that weights can be put into: its module and its maker's class."""

_MARKS = {
    "bitsandbytes": (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".SCB"),
    "compressed-tensors": (".weight_packed",),
    "fp8": (".weight_scale_inv",),
    "gptq": (".g_idx",),
    "mxfp4": ("_proj_blocks",),
}
"""How the tensors of a method end, which tells it where there is no config."""

_MOST_PROBLEMS = 50


def maker_of(name: str, **settings: Any) -> Maker:
    """Return the maker of a format, such as ``nf4``.

    Args:
        name: of :data:`regraft.quant.weight.FORMATS`.
        settings: ``dtype`` (safetensors dtype of the model) for all; ``nested`` and ``blocksize``
            for 4 bits; ``block`` and ``ragged`` for fp8.
    """
    module, made_by = _MAKERS[name]
    maker: Maker = getattr(import_module(module), made_by)(name=name, **settings)
    return maker


def method_of(stored: Stored) -> str | None:
    """Return how a checkpoint is quantized; None if it is not.

    Raises:
        UnsupportedError: in a way that is not known.
    """
    said = stored.config.get("quant_method")
    if said is None and (stored.config.get("load_in_4bit") or stored.config.get("load_in_8bit")):
        said = "bitsandbytes"
    if said is None:
        return _by_names(stored)
    method = str(said).removeprefix("QuantizationMethod.").lower()
    if method in METHODS:
        return method
    raise UnsupportedError(
        "the base is quantized in a way that is not supported: its packed bytes are not weights",
        where=stored.where,
        expected=", ".join(sorted(METHODS)),
        found=f"quantization {method[:80]!r}",
        hint="Dequantize it with its own library, or name the 16-bit base that it was made from",
    )


def _by_names(stored: Stored) -> str | None:
    for method, endings in _MARKS.items():
        if any(name.endswith(endings) for name in stored.tensors):
            return method
    packed = [name for name in stored.tensors if name.endswith((".qweight", ".qzeros"))]
    if stored.config or packed:
        raise UnsupportedError(
            "the base is quantized by an unnamed method",
            where=stored.where,
            expected=f"a quant_method: {', '.join(sorted(METHODS))}",
            found=repr(packed[0][:80]) if packed else "",
            hint="Name the 16-bit base the quantized one was made from",
        )
    return None


def find_weights(stored: Stored) -> tuple[str | None, FoundWeights]:
    """Return how a checkpoint is quantized, and its quantized weights.

    Raises:
        UnsupportedError: in a way that is not known.
        FormatError: parts are missing or do not fit; lists all of them.
    """
    method = method_of(stored)
    if method is None:
        return None, FoundWeights()
    finds = [_finder(module)(stored) for module in METHODS[method]]
    problems = [problem for found in finds for problem in found.problems]
    weights = tuple(weight for found in finds for weight in found.weights)
    if not problems and not weights:
        problems = [_nothing_found(stored, method)]
    problems = problems or _shared(stored, weights)
    _raise(problems)
    return method, FoundWeights(
        weights, (), tuple(name for found in finds for name in found.skipped)
    )


def _finder(module: str) -> Callable[[Stored], FoundWeights]:
    find: Callable[[Stored], FoundWeights] = import_module(module).find
    return find


def _shared(stored: Stored, weights: Iterable[QuantizedWeight]) -> list[Problem]:
    """Return stored tensors that are a part of two weights."""
    owners: dict[str, str] = {}
    problems = []
    for weight in weights:
        for spec in weight.parts.values():
            other = owners.setdefault(spec.name, weight.name)
            if other != weight.name:
                problems.append(
                    Problem("a tensor is a part of two quantized weights",
                            f"{stored.where}, tensor {spec.name!r}", "one weight",
                            f"{other} and {weight.name}", "Download the model again")
                )  # fmt: skip
    return problems


def _nothing_found(stored: Stored, method: str) -> Problem:
    return Problem(
        "the config says that the model is quantized, and no tensor is", stored.where,
        f"weights as {method} stores them", "none",
        "Remove quantization_config from config.json if the weights are plain",
    )  # fmt: skip


def check_contents(weights: Iterable[QuantizedWeight], stored: Stored) -> None:
    """Refuse weights whose scales are no numbers.

    Raises:
        FormatError: some are; lists them.
    """
    read: Any = stored.read
    _raise([problem for weight in weights for problem in weight.codec.trouble(weight, read)])


def _raise(problems: list[Problem]) -> None:
    if not problems:
        return
    shown, rest = problems[:_MOST_PROBLEMS], len(problems) - _MOST_PROBLEMS
    if rest > 0:
        shown.append(Problem(f"{rest} more problems of this kind are not shown"))
    raise FormatError(shown)
