"""Whether the parts of a quantized weight fit each other and the config: words for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from regraft.errors import Problem
from regraft.quant.weight import Stored
from regraft.tensors import TensorSpec

DAMAGED = "Download the model again, or quantize it again"
OTHER_BASE = "Name the 16-bit base the quantized one was made from"


class Unfit(Exception):  # noqa: N818  (collected, and raised as a typed error)
    """Why one weight cannot be read."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        super().__init__()
        self.problems = list(problems)


def misfits(
    stored: Stored, wanted: Iterable[tuple[TensorSpec, Iterable[str], tuple[int, ...], str]]
) -> list[Problem]:
    """Return a problem for each part that has another dtype or shape than it should have.

    Args:
        stored: the checkpoint.
        wanted: parts, their possible dtypes, their shape, and what that shape comes from.
    """
    problems = list[Problem]()
    for spec, dtypes, shape, reason in wanted:
        dtypes = tuple(dtypes)
        if spec.dtype not in dtypes or spec.shape != shape:
            problems.append(
                Problem(
                    "a part of a quantized weight has another dtype or shape",
                    f"{stored.where}, tensor {spec.name!r}",
                    f"{' or '.join(dtypes)} {shape}" + (f" ({reason})" if reason else ""),
                    f"{spec.dtype} {spec.shape}", DAMAGED,
                )
            )  # fmt: skip
    return problems


def config_where(stored: Stored) -> str:
    """Return what messages call the quantization part of the config."""
    return f"{stored.where}, config.json: quantization_config"


def unsupported(stored: Stored, what: str, expected: str, found: object) -> Problem:
    """Return a problem with something in the config that cannot be read."""
    return Problem(what, config_where(stored), expected, repr(found)[:80], OTHER_BASE)


def is_count(value: Any) -> bool:
    """Return whether a value of a config is a whole number above zero."""
    return type(value) is int and 0 < value < 2**48
