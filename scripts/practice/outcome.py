"""What became of one case of a list."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import regraft

RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "wrong", "crashed"
KINDS = (RIGHT, REFUSED, WRONG, CRASHED)

TOLERANCE = 5e-5
"""How far answers may be from PEFT's, as a share of the range of PEFT's."""


class WrongError(Exception):
    """An answer that is not PEFT's, without an error that says so."""


@dataclass(frozen=True)
class Case:
    """One situation: its name, and what tries it and raises if it is not right."""

    name: str
    attempt: Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """How one case of a list ended."""

    group: str
    name: str
    kind: str
    message: str = ""


def outcome_of(group: str, case: Case) -> Outcome:
    """Return how a case ends: right, refused by a typed error, wrong, or crashed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.attempt()
    except regraft.RegraftError as error:
        return Outcome(group, case.name, REFUSED, _first_line(error))
    except WrongError as error:
        return Outcome(group, case.name, WRONG, _first_line(error))
    except Exception as error:
        return Outcome(group, case.name, CRASHED, f"{type(error).__name__}: {_first_line(error)}")
    return Outcome(group, case.name, RIGHT)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def require(true: bool, what: str) -> None:
    """Raise `WrongError` unless it is true."""
    if not true:
        raise WrongError(what)


def require_close(found: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise `WrongError` unless two float tensors of one shape agree to a share of the range."""
    require(found.shape == expected.shape, f"{what}: shape {found.shape}, not {expected.shape}")
    found, expected = found.detach().float(), expected.detach().float()
    extent = (expected.max() - expected.min()).item() or 1.0
    off = (found - expected).abs().max().item() / extent
    require(off <= tolerance, f"{what}: off by {off:.2g} of the range")


def moves(found: Any, plain: Any) -> None:
    """Raise `AssertionError` if an adapter hardly changes an answer: then nothing would be told."""
    extent = (plain.max() - plain.min()).item()
    assert (found - plain).abs().max().item() > 1e-3 * extent, "the adapter changes nothing"
