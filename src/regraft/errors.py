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

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

_HIDDEN = "***"
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_SECRET = 8
_SECRETS: set[str] = set()
_CREDENTIALS = (
    re.compile(r"(?i)\b((?:https?|git|ssh|ftp|s3|socks5h?)://)[^\s/?#'\"]+(?=@)"),
    re.compile(
        r"(?i)(?<=[?&;])((?:[\w.-]*(?:token|secret|signature|credential|password|passwd|api_?key)"
        r"[\w.-]*|sig|key|auth|policy|key-pair-id|awsaccesskeyid)=)[^\s&;#'\"<>]+"
    ),
    re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[\w.~+/=-]{8,}"),
    re.compile(r"(?i)\b(bearer\s+)(?=[a-z.~+/_=-]*\d)[\w.~+/=-]{8,}"),
    re.compile(
        r"(?i)\b((?:x-)?(?:auth|access|api)[_-]?(?:token|key)['\"]?\s*[:=]\s*['\"]?)[^\s,;'\"]{8,}"
    ),
    re.compile(r"\b(?:hf|api_org)_(?:[A-Za-z0-9]{20,}|(?=[A-Za-z]*\d)[A-Za-z0-9]{8,})"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    re.compile(r"\b(?:gh[opsur]_|github_pat_|glpat-|xox[abprs]-)[\w-]{16,}"),
)
"""Credentials as they stand in web addresses, headers and what servers answer; what a group holds
stays."""

_MARKS = (
    "://", "bearer", "authorization", "token", "key", "hf_", "api_org_", "eyj", "gho_", "ghp_",
    "ghs_", "ghu_", "ghr_", "github_pat_", "glpat-", "xox",
)  # fmt: skip
"""What one of them has in it in small letters, unless it stands in the query of an address."""


def keep_secret(secret: str | None) -> None:
    """Have a token hidden wherever regraft says something, also where a server repeats it."""
    if secret and len(secret) >= _SHORTEST_SECRET:
        _SECRETS.add(secret)


def redacted(text: str) -> str:
    """Return a text with tokens and credentials hidden, for messages, receipts and cards."""
    for secret in (*_SECRETS, *(os.environ.get(name, "") for name in _TOKEN_VARIABLES)):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _HIDDEN)
    for pattern in _CREDENTIALS if _may_hold_one(text) else ():
        text = pattern.sub(lambda found: (found[1] if found.re.groups else "") + _HIDDEN, text)
    return text


def _may_hold_one(text: str) -> bool:
    """Whether a credential may be in a text: a quick look, as most texts hold none."""
    if not text.isascii():  # other letters than ASCII's have small ones that are ASCII's
        return True
    small = text.lower()
    return any(mark in small for mark in _MARKS) or (
        "=" in small and any(mark in small for mark in "?&;")
    )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the five parts that a reader needs; secrets in it are hidden.

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
        return redacted(self._line())

    def _line(self) -> str:
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
        return {key: redacted(value) for key, value in asdict(self).items() if value}

    def without_secrets(self) -> Problem:
        """Return the same with tokens and credentials hidden in every part."""
        parts = {k: v for k, v in vars(self).items() if v and isinstance(v, str)}
        hidden = {k: redacted(v) for k, v in parts.items()}
        return self if hidden == parts else replace(self, **hidden)


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
        self.problems: tuple[Problem, ...] = tuple(p.without_secrets() for p in problems)
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
