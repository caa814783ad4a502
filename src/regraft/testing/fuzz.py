"""Hostile files by the million: what regraft says of each, beside what the reference parser says.

A run fails if anything but a :class:`~regraft.errors.RegraftError` comes out, if an error does not
say what it has to, if a header is accepted that the reference parser refuses, or if the two read a
header in different ways. No torch is needed.
"""

from __future__ import annotations

import gc
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import category

from safetensors import deserialize, safe_open

from regraft.adapters import patterns
from regraft.adapters.dialects.peft import read_adapter
from regraft.errors import RegraftError
from regraft.formats.checkpoint import Checkpoint, open_adapter, open_checkpoint
from regraft.formats.hub import Located
from regraft.formats.safetensors import Header, build_header, read_header
from regraft.inspection import inspect
from regraft.merging.planning import Choices, make_plan
from regraft.tensors import nbytes_of
from regraft.testing import mutation
from regraft.testing.mutation import (
    Kind,
    TensorShape,
    mutated_headers,
    mutated_json,
    mutated_tensors,
)

__all__ = [
    "Failure",
    "FuzzReport",
    "mutated_headers",
    "mutated_json",
    "mutated_tensors",
    "run_headers",
    "run_json",
    "run_tensors",
]

INDEX = "model.safetensors.index.json"
FAILURES_KEPT = 20
LONGEST_PART = 8_000
"""Characters that one part of a problem may have: a few names of 1,024 characters, or a number of
4,300 digits, are the most that is meant to be in it."""

_SAFE_OPEN_SHARE = 0.02
_MATCHING_SECONDS = 0.05
_CHOICES = Choices(None, None, 512 * 2**20, 1)
_SHAPE_FILE_LIMIT = 2**43
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
        differing: accepted by both, and read in different ways.
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

    def fail(self, what: str, content: str) -> None:
        """Keep a case that went wrong."""
        if len(self.failures) < FAILURES_KEPT:
            self.failures.append(Failure(self.count, what, content[:4000]))


def run_headers(count: int, seed: int | str = 0, folder: Path | None = None) -> FuzzReport:
    """Read mutated safetensors files with regraft and with the reference parser.

    Args:
        count: how many.
        seed: of :func:`mutated_headers`.
        folder: where a scratch file may lie; a temporary one by default.
    """
    report = FuzzReport("headers")
    rng = random.Random(f"share {seed}")
    with _scratch(folder) as place, _file(place / "x.safetensors") as write:
        path = place / "x.safetensors"

        def one(content: bytes) -> None:
            write(content)
            ours = _attempt(report, lambda: read_header(path), content)
            theirs = _reference(content)
            if rng.random() < _SAFE_OPEN_SHARE and (trouble := _other_entry(path, ours, theirs)):
                report.differing += 1
                report.fail(trouble, content.hex())
            _compare(report, content, ours, theirs)

        _run(report, mutated_headers(seed, count), count, one)
    return report


def _compare(
    report: FuzzReport,
    content: bytes,
    ours: Header | RegraftError | None,
    theirs: list[tuple[str, dict[str, Any]]] | None,
) -> None:
    if isinstance(ours, RegraftError):
        report.reasons[reason(ours)] += 1
        if theirs is None:
            report.refused += 1
        else:
            report.stricter[reason(ours)] += 1
    elif ours is not None and theirs is None:
        report.lenient += 1
        report.fail("accepted, but the reference parser refuses it", content.hex())
    elif ours is not None and theirs is not None:
        report.accepted += 1
        if trouble := _difference(ours, theirs, content):
            report.differing += 1
            report.fail(trouble, content.hex())


def _reference(content: bytes) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the tensors as the reference parser reads them, None where it refuses."""
    read: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = deserialize
    try:
        tensors = read(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of Rust code is no Exception
        return None
    return tensors


def _other_entry(path: Path, ours: Any, theirs: Any) -> str | None:
    """Return where the reference parser's other entry, which opens files, says otherwise."""
    try:
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return None if theirs is None else "the reference parser opens it by one entry only"
    if theirs is None:
        return "the reference parser opens it by one entry only"
    return "other metadata" if isinstance(ours, Header) and ours.metadata != metadata else None


def _difference(
    header: Header, theirs: Iterable[tuple[str, dict[str, Any]]], content: bytes
) -> str | None:
    """Return what the two disagree on: names, dtypes, shapes, or which bytes are a tensor's."""
    reference = dict(theirs)
    if reference.keys() != header.tensors.keys():
        return "other names"
    for name, found in reference.items():
        spec = header.tensors[name]
        if (spec.dtype, list(spec.shape)) != (found["dtype"], found["shape"]):
            return f"another dtype or shape of {name!r}"
        if content[spec.start : spec.start + spec.nbytes] != found["data"]:
            return f"other bytes of {name!r}"
    return None


def run_json(
    count: int, seed: int | str = 0, kind: Kind = "adapter", folder: Path | None = None
) -> FuzzReport:
    """Open a tiny model or adapter with a mutated JSON file, and plan a merge where it opens.

    One in ten is inspected too.

    Expressions get less time than in earnest, so that a run of many is not spent on the slow ones.

    Args:
        count: how many.
        seed: of :func:`mutated_json`.
        kind: which file is mutated.
        folder: where scratch files may lie; a temporary one by default.
    """
    report = FuzzReport(kind)
    with _scratch(folder) as place, _little_time():
        base, adapter = write_model(place, sharded=kind == "index", head=kind == "config")
        names = {"adapter": "adapter_config.json", "config": "config.json"}
        path = (adapter if kind == "adapter" else base) / names.get(kind, INDEX)
        known = open_checkpoint(_located(base)) if kind == "adapter" else None

        with _file(path) as write:

            def one(content: bytes) -> None:
                write(content)
                if report.count % 10 == 0:
                    _attempt(report, lambda: inspect(path.parent).to_json(), content)
                _count(report, _attempt(report, lambda: _plan(base, adapter, known), content))

            _run(report, mutated_json(seed, count, kind), count, one)
    return report


def run_tensors(count: int, seed: int | str = 0, folder: Path | None = None) -> FuzzReport:
    """Plan merges of bases and adapters whose tensors have odd names, dtypes and shapes.

    The files are as long as their headers say, but hold nothing.

    Args:
        count: how many.
        seed: of :func:`mutated_tensors`.
        folder: where scratch files may lie; a temporary one by default.
    """
    report = FuzzReport("tensors")
    with _scratch(folder) as place, _little_time():
        base, adapter = write_model(place)
        files = base / "model.safetensors", adapter / "adapter_model.safetensors"

        def one(pair: tuple[list[TensorShape], list[TensorShape]]) -> None:
            for path, tensors in zip(files, pair, strict=True):
                _write_hollow(path, tensors)
            _count(report, _attempt(report, lambda: _plan(base, adapter, None), pair))

        _run(report, islice(_writable(mutated_tensors(seed, 2 * count)), count), count, one)
    return report


def _writable(
    pairs: Iterable[tuple[list[TensorShape], list[TensorShape]]],
) -> Iterator[tuple[list[TensorShape], list[TensorShape]]]:
    """Leave out what makes no sound header, or a longer file than there can be."""
    for pair in pairs:
        try:
            for tensors in pair:
                build_header(tensors, {})
        except RegraftError:
            continue
        sizes = [sum(nbytes_of(dtype, shape) for _, dtype, shape in t) for t in pair]
        if max(sizes) < _SHAPE_FILE_LIMIT:
            yield pair


def _plan(base: Path, adapter: Path, known: Checkpoint | None) -> Any:
    """Do what ``regraft.check`` does."""
    checkpoint = known or open_checkpoint(_located(base))
    return make_plan(checkpoint, [read_adapter(open_adapter(_located(adapter)))], _CHOICES, None)


def _located(path: Path) -> Located:
    return Located(path, str(path), None, None)


def write_model(folder: Path, *, sharded: bool = False, head: bool = False) -> tuple[Path, Path]:
    """Write a tiny base and an adapter on it, perhaps for classification; return their folders."""
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True)
    tensors = mutation.base_tensors()
    if sharded:
        (base / INDEX).write_text(mutation.to_json(mutation.weight_index()))
        for number, name in enumerate(mutation.SHARDS):
            _write_hollow(base / name, tensors[number::2])
    else:
        _write_hollow(base / "model.safetensors", tensors)
    (base / "config.json").write_text(mutation.to_json(mutation.base_config()))
    trained, config = mutation.adapter_tensors(), mutation.adapter_config()
    if head:
        trained = [*trained[:-2], ("base_model.model.score.weight", "BF16", (3, mutation.HIDDEN))]
        changed = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        config |= {**changed, "trainable_token_indices": None}
    _write_hollow(adapter / "adapter_model.safetensors", trained)
    (adapter / "adapter_config.json").write_text(mutation.to_json(config))
    return base, adapter


def _write_hollow(path: Path, tensors: Sequence[TensorShape]) -> None:
    """Write a file whose tensors are holes."""
    header = build_header(tensors, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes_of(dtype, shape) for _, dtype, shape in tensors))


def _attempt(report: FuzzReport, attempt: Callable[[], Any], content: Any) -> Any:
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


def _count(report: FuzzReport, outcome: Any) -> None:
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
    """Return what an error lacks, or has that it must not have; None where it is as it should be.

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


def _run(report: FuzzReport, cases: Iterable[Any], count: int, one: Callable[[Any], None]) -> None:
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
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """Lend a folder: in memory where there is one, so that a disk is not worn."""
    memory = Path("/dev/shm")
    where = folder or (memory if os.access(memory, os.W_OK) else None)
    with tempfile.TemporaryDirectory(prefix="regraft-fuzz-", dir=where) as place:
        yield Path(place)


@contextmanager
def _file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Lend a function that gives a file, which stays open, another content."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def write(content: bytes) -> None:
        os.pwrite(fd, content, 0)
        os.ftruncate(fd, len(content))

    try:
        yield write
    finally:
        os.close(fd)


@contextmanager
def _little_time() -> Iterator[None]:
    """Give expressions a hundredth of their time."""
    before, patterns.SECONDS = patterns.SECONDS, _MATCHING_SECONDS
    try:
        yield
    finally:
        patterns.SECONDS = before
