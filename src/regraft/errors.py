"""Every error regraft raises on purpose, as one tree.

    RegraftError
    ├── UsageError             exit 2    the call contradicts itself
    ├── InputError             exit 3    a file is bad, or is refused
    │   ├── FormatError                  a container is malformed (safetensors, index, config)
    │   ├── AdapterError                 an adapter is inconsistent with itself
    │   ├── UnsupportedError             sound, but it cannot be merged: refused by name
    │   ├── MismatchError                adapter and base do not fit; lists every misfit
    │   ├── ChangedError                 an input was changed while it was being read
    │   ├── NumericError                 a result would be NaN or infinite where the base was not
    │   └── OutputExistsError            OUT is there already
    └── EnvironmentShortfall   exit 4    the machine falls short
        ├── MissingExtraError            an optional package is needed
        ├── DiskSpaceError               not enough room, found before anything is written
        ├── MemoryCapError               one step cannot fit under --max-memory
        ├── BusyError                    another process is writing the same output
        └── AccessError                  the system refused to read or write

An error carries one or more :class:`Problem`: what is wrong, where, what was expected, what was
found, and what to do next. All problems of one stage are raised together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the five parts a reader needs.

    Attributes:
        what: what is wrong, without a trailing full stop.
        where: file and tensor (or option) it was seen at.
        expected: what should have been there.
        found: what was there.
        hint: what to do next.
    """

    what: str
    where: str = ""
    expected: str = ""
    found: str = ""
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected:
            line += f"; expected {self.expected}"
        if self.found:
            line += f"; found {self.found}"
        if self.hint:
            line += f". {self.hint}"
        return line

    def to_json(self) -> dict[str, str]:
        """Return the non-empty parts as a JSON object."""
        return {key: value for key, value in asdict(self).items() if value}


class RegraftError(Exception):
    """Base of every error regraft raises on purpose; ``exit_code`` is the CLI's."""

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem] | str, **parts: str) -> None:
        """Take a message with optional parts, one :class:`Problem`, or several.

        ``SomeError("what", where=..., expected=..., found=..., hint=...)`` is the short form.
        """
        if isinstance(problems, str):
            problems = Problem(problems, **parts)
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UsageError(RegraftError):
    """The call contradicts itself or names something that cannot be."""

    exit_code = 2


class InputError(RegraftError):
    """A file is bad, or sound but refused."""

    exit_code = 3


class FormatError(InputError):
    """A container (safetensors file, index, config) is malformed."""


class AdapterError(InputError):
    """An adapter is inconsistent with itself: a missing pair, a NaN, a wrong rank."""


class UnsupportedError(InputError):
    """The input is sound, but it cannot be merged; the message names the feature."""


class MismatchError(InputError):
    """Adapter and base do not fit; every misfit is listed."""


class ChangedError(InputError):
    """A file of an input was changed while it was being read; every such file is listed."""


class NumericError(InputError):
    """A merged tensor would hold NaN or infinity where the base held a number."""


class OutputExistsError(InputError):
    """OUT exists and ``--overwrite`` was not given."""


class EnvironmentShortfall(RegraftError):  # noqa: N818
    """The machine falls short: a package, disk space, memory, or a permission."""

    exit_code = 4


class MissingExtraError(EnvironmentShortfall):
    """An optional dependency is needed for this input; the message names the extra."""


class DiskSpaceError(EnvironmentShortfall):
    """There is not enough room on the output's disk; found before anything is written."""


class MemoryCapError(EnvironmentShortfall):
    """A step needs more memory than ``--max-memory`` allows."""


class BusyError(EnvironmentShortfall):
    """Another process is writing the same output."""


class AccessError(EnvironmentShortfall):
    """The system refused to read or write a path."""


class BaseMismatchWarning(UserWarning):
    """An adapter was put on another base than the one whose fingerprint it carries."""
