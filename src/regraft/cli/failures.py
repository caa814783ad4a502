"""The one map from an exception to what the user reads and the exit code the shell gets."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from regraft.errors import (
    AccessError,
    DiskSpaceError,
    EnvironmentShortfall,
    InputError,
    MemoryCapError,
    Problem,
    RegraftError,
    UsageError,
    redacted,
)
from regraft.numerics.listeners import CompilerSettingsError

DEBUG_VARIABLE = "REGRAFT_DEBUG"
"""Environment variable that shows the traceback of any error."""

REPORT_TO = "https://github.com/regraft/regraft/issues"

INTERRUPTED = 130
INTERNAL = 70


class UserInterruptError(Exception):
    """The user pressed Ctrl-C."""


@dataclass(frozen=True)
class Failure:
    """An error, ready to be shown.

    Attributes:
        kind: name of the error's class, the ``type`` in JSON.
        exit_code: what the process returns.
        problems: everything that is wrong.
        label: the word the first line starts with.
        usage: the command's usage line, for errors of usage.
        notes: what else to know, such as what became of the work so far.
    """

    kind: str
    exit_code: int
    problems: tuple[Problem, ...]
    label: str = "error"
    usage: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object printed on stdout with ``--json``."""
        problems = [problem.to_json() for problem in self.problems]
        told = {"type": self.kind, "exit_code": self.exit_code, "problems": problems}
        return {"error": told | ({"notes": list(self.notes)} if self.notes else {})}


def explain(error: Exception) -> Failure:
    """Return what to show for ``error``; what nobody foresaw becomes an apology."""
    if isinstance(error, (UserInterruptError, click.Abort)):
        return _interrupted(error)
    explanations = (explanation for kind, explanation in _EXPLANATIONS if isinstance(error, kind))
    failure = next(explanations, _unexpected)(error)
    return replace(failure, notes=tuple(_notes(error)))


def _notes(error: BaseException) -> Iterator[str]:
    """Yield the notes of an error and of those that it came from, each once."""
    told: set[str] = set()
    chain: BaseException | None = error
    while chain is not None:
        notes = map(redacted, getattr(chain, "__notes__", ()))
        new = [note for note in notes if note not in told]
        yield from new
        told.update(new)
        chain = chain.__cause__ or chain.__context__


def _regraft(error: RegraftError) -> Failure:
    return Failure(type(error).__name__, error.exit_code, error.problems)


def _click(error: click.ClickException) -> Failure:
    context = getattr(error, "ctx", None)
    hint = f"See '{context.command_path} --help'" if context else ""
    message = " ".join(error.format_message().split())  # some choices come one a line
    problem = Problem(message.rstrip("."), hint=hint)
    usage = context.get_usage() if context else ""
    return Failure(UsageError.__name__, UsageError.exit_code, (problem,), usage=usage)


def _interrupted(error: Exception) -> Failure:
    hint = "; ".join(_notes(error))
    problem = Problem("interrupted", hint=hint[:1].upper() + hint[1:])
    return Failure("Interrupted", INTERRUPTED, (problem,), label="regraft")


def _memory(error: MemoryError) -> Failure:
    hint = "Give --max-memory a smaller size, or close other programs"
    what = f"the system has no memory left ({error})" if str(error) else "no memory left"
    return _regraft(MemoryCapError(what, hint=hint))


_BY_ERRNO: dict[int, type[RegraftError]] = {
    errno.ENOSPC: DiskSpaceError,
    errno.EDQUOT: DiskSpaceError,
    errno.EACCES: AccessError,
    errno.EPERM: AccessError,
    errno.EROFS: AccessError,
    errno.ENOENT: InputError,
    errno.ENOTDIR: InputError,
    errno.EISDIR: InputError,
}


def _compiler(error: CompilerSettingsError) -> Failure:
    return _regraft(EnvironmentShortfall(str(error)))


def _system(error: OSError) -> Failure:
    if error.errno == errno.ENOENT and not error.filename and _is_nowhere():
        return _regraft(
            InputError("the current folder was removed", hint="Go to one that is there")
        )
    kind = _BY_ERRNO.get(error.errno or 0, EnvironmentShortfall)
    where = str(error.filename) if error.filename else ""
    return _regraft(kind(error.strerror or str(error) or type(error).__name__, where=where))


def _is_nowhere() -> bool:
    """Whether the current folder is gone."""
    try:
        Path.cwd()
    except OSError:
        return True
    return False


def _unexpected(error: Exception) -> Failure:
    summary = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")
    problem = Problem(
        f"sorry, this is a bug in regraft ({summary})",
        hint=f"Please report it at {REPORT_TO}; {DEBUG_VARIABLE}=1 shows the traceback to send",
    )
    return Failure(type(error).__name__, INTERNAL, (problem,))


_EXPLANATIONS: tuple[tuple[type[Exception], Callable[[Any], Failure]], ...] = (
    (RegraftError, _regraft),
    (click.ClickException, _click),
    (MemoryError, _memory),
    (CompilerSettingsError, _compiler),
    (OSError, _system),
)
