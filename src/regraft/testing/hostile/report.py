"""What came of a run of hostile cases, and the loop that counts it."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import category

from regraft.errors import RegraftError
from regraft.system.memory import resident_memory
from regraft.system.opening import open_to_write
from regraft.system.positioned import write_all

FAILURES_KEPT = 20
LONGEST_PART = 8_000
"""Characters that one part of a problem may have: a few names of 1,024 characters, or a number of
4,300 digits, are the most that is meant to be in it."""
_QUOTED = re.compile(r"(?<![a-z])'(?:[^'\\\\]|\\\\.)*'|\"[^\"]*\"|\d{2,}")
_FORBIDDEN = ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Failure:
    """One case that went wrong.

    Attributes:
        number: the case's number in its run.
        what: what went wrong.
        content: the file, in hexadecimal digits, or what it was made from; its beginning at least.
    """

    number: int
    what: str
    content: str


@dataclass
class FuzzReport:
    """What came of a run.

    Attributes:
        kind: of files.
        count: how many there were.
        accepted: by regraft and, for headers, the reference parser.
        refused: by both; for other files, by regraft.
        stricter: refused by regraft alone, counted by reason.
        reasons: why regraft refused, whatever the reference parser says.
        lenient: accepted by regraft alone.
        differing: accepted by both, and read in different ways; or a wrong outcome.
        untyped: cases in which something other than a ``RegraftError`` came out.
        unsound: errors that leave out what is wrong, or could steer a terminal.
        failures: the first of those that went wrong.
        seconds: how long it took.
        slowest: seconds of the slowest case.
        growth: bytes by which resident memory grew from a tenth of the run to its end.
    """

    kind: str
    count: int = 0
    accepted: int = 0
    refused: int = 0
    stricter: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lenient: int = 0
    differing: int = 0
    untyped: int = 0
    unsound: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    growth: int = 0

    @property
    def failed(self) -> int:
        """How many cases went wrong."""
        return self.lenient + self.differing + self.untyped + self.unsound

    def add(self, other: FuzzReport) -> None:
        """Add a run that was done at the same time, of other cases."""
        for name in ("count", "accepted", "refused", "lenient", "differing", "untyped", "unsound"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.stricter += other.stricter
        self.reasons += other.reasons
        self.failures = (self.failures + other.failures)[:FAILURES_KEPT]
        for name in ("seconds", "slowest", "growth"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    def to_json(self) -> dict[str, Any]:
        """Return all of it as a JSON object, with the most frequent reasons first."""
        fields = asdict(self)
        for name in ("stricter", "reasons"):
            fields[name] = dict(getattr(self, name).most_common())
        return fields

    def differ(self, what: str, content: str) -> None:
        """Count and keep a case that came out otherwise than it has to."""
        self.differing += 1
        self.fail(what, content)

    def fail(self, what: str, content: str) -> None:
        """Keep a case that went wrong."""
        if len(self.failures) < FAILURES_KEPT:
            self.failures.append(Failure(self.count, what, content[:4000]))


def attempt_case(report: FuzzReport, attempt: Callable[[], Any], content: Any) -> Any:
    """Return what an attempt returns, or the error that it rightly raised; None after a bug."""
    shown = content.hex() if isinstance(content, bytes) else repr(content)
    try:
        return attempt()
    except RegraftError as error:
        if trouble := unsound(error):
            report.unsound += 1
            report.fail(f"{trouble}: {str(error)[:500]!r}", shown)
        return error
    except Exception as error:
        report.untyped += 1
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        line = f" at {at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else ""
        report.fail(f"{type(error).__name__}: {str(error)[:300]}{line}", shown)
        return None


def count_outcome(report: FuzzReport, outcome: Any) -> None:
    if isinstance(outcome, RegraftError):
        report.refused += 1
        report.reasons[reason(outcome)] += 1
    elif outcome is not None:
        report.accepted += 1


def reason(error: RegraftError) -> str:
    """Return what is wrong first, without what it is wrong with."""
    what = error.problems[0].what if error.problems else ""
    return _QUOTED.sub("...", what)


def unsound(error: RegraftError) -> str | None:
    """Return what is wrong with the form of an error (a part that lacks, a secret in it), or None.

    Every problem says what is wrong and where, at no great length, and without a character that
    could steer a terminal.
    """
    if not error.problems:
        return "no problem"
    for problem in error.problems:
        parts = (problem.what, problem.where, problem.expected, problem.found, problem.hint)
        if not problem.what or not problem.where:
            return "a problem without what or where"
        if not all(isinstance(part, str) and len(part) <= LONGEST_PART for part in parts):
            return "a part that is too long"
        text = "".join(parts)
        if not text.isascii() or not text.isprintable():
            steering = [c for c in text if category(c) in _FORBIDDEN or c in "\u202e\u2066"]
            if steering:
                return f"a character that could steer a terminal: {steering[0]!r}"
    return None


def run_cases(
    report: FuzzReport, cases: Iterable[Any], count: int, one: Callable[[Any], None]
) -> None:
    """Give each case to ``one``, and measure."""
    begin, warm = time.perf_counter(), None
    for case in cases:
        started = time.perf_counter()
        one(case)
        report.slowest = max(report.slowest, time.perf_counter() - started)
        report.count += 1
        if report.count == max(1, count // 10):
            warm = _resident()
    report.seconds = time.perf_counter() - begin
    report.growth = max(0, _resident() - (warm or _resident()))


def _resident() -> int:
    """Return this process's resident bytes."""
    gc.collect()
    return resident_memory()


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """Lend a temporary folder, in memory where the system has such a file system."""
    memory = Path("/dev/shm")
    where = folder or (memory if os.access(memory, os.W_OK) else None)
    with tempfile.TemporaryDirectory(prefix="regraft-fuzz-", dir=where) as place:
        yield Path(place)


@contextmanager
def rewritable(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Lend a function that gives a file, which stays open, another content."""
    fd = open_to_write(path, mode=0o600)

    def write(content: bytes) -> None:
        write_all(fd, memoryview(content), 0)
        os.ftruncate(fd, len(content))

    try:
        yield write
    finally:
        os.close(fd)
