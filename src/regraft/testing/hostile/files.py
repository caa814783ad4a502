"""Hostile files by the million: what regraft says of each, beside what the reference parser says.

A run fails if anything but a :class:`~regraft.errors.RegraftError` comes out, if an error does not
say what it has to, if a header is accepted that the reference parser refuses, or if the two read a
header in different ways. No torch is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import deserialize, safe_open

from regraft.adapters import patterns
from regraft.adapters.dialects.peft import read_adapter
from regraft.errors import RegraftError
from regraft.formats.adapter_files import open_adapter
from regraft.formats.checkpoint import Checkpoint, open_checkpoint
from regraft.formats.hub import Located
from regraft.formats.safetensors import Header, build_header, read_header
from regraft.inspection import inspect
from regraft.merging.options import MergeOptions
from regraft.merging.planning.planner import make_plan
from regraft.tensors import nbytes_of
from regraft.testing.hostile import tiny
from regraft.testing.hostile.headers import mutated_headers
from regraft.testing.hostile.mutation import Kind, mutated_json, mutated_tensors
from regraft.testing.hostile.odd import to_json
from regraft.testing.hostile.report import (
    FuzzReport,
    attempt_case,
    count_outcome,
    reason,
    rewritable,
    run_cases,
    scratch,
)
from regraft.testing.hostile.tiny import TensorShape

INDEX = "model.safetensors.index.json"
_SAFE_OPEN_SHARE = 0.02
_MATCHING_SECONDS = 0.05
_OPTIONS = MergeOptions(threads=1)
_SHAPE_FILE_LIMIT = 2**43


def run_headers(count: int, seed: int | str = 0, folder: Path | None = None) -> FuzzReport:
    """Read mutated safetensors files with regraft and with the reference parser.

    Args:
        count: how many.
        seed: of :func:`mutated_headers`.
        folder: where a scratch file may lie; a temporary one by default.
    """
    report = FuzzReport("headers")
    rng = random.Random(f"share {seed}")
    with scratch(folder) as place, rewritable(place / "x.safetensors") as write:
        path = place / "x.safetensors"

        def one(content: bytes) -> None:
            write(content)
            ours = attempt_case(report, lambda: read_header(path), content)
            theirs = _reference(content)
            if rng.random() < _SAFE_OPEN_SHARE and (trouble := _other_entry(path, ours, theirs)):
                report.differ(trouble, content.hex())
            _compare(report, content, ours, theirs)

        run_cases(report, mutated_headers(seed, count), count, one)
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
            report.differ(trouble, content.hex())


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
    with scratch(folder) as place, _little_time():
        base, adapter = write_model(place, sharded=kind == "index", head=kind == "config")
        names = {"adapter": "adapter_config.json", "config": "config.json"}
        path = (adapter if kind == "adapter" else base) / names.get(kind, INDEX)
        known = open_checkpoint(_located(base)) if kind == "adapter" else None

        with rewritable(path) as write:

            def one(content: bytes) -> None:
                write(content)
                if report.count % 10 == 0:
                    attempt_case(report, lambda: inspect(path.parent).to_json(), content)
                count_outcome(
                    report, attempt_case(report, lambda: _plan(base, adapter, known), content)
                )

            run_cases(report, mutated_json(seed, count, kind), count, one)
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
    with scratch(folder) as place, _little_time():
        base, adapter = write_model(place)
        files = base / "model.safetensors", adapter / "adapter_model.safetensors"

        def one(pair: tuple[list[TensorShape], list[TensorShape]]) -> None:
            for path, tensors in zip(files, pair, strict=True):
                _write_hollow(path, tensors)
            count_outcome(report, attempt_case(report, lambda: _plan(base, adapter, None), pair))

        run_cases(report, islice(_writable(mutated_tensors(seed, 2 * count)), count), count, one)
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
    return make_plan(checkpoint, [read_adapter(open_adapter(_located(adapter)))], _OPTIONS, None)


def _located(path: Path) -> Located:
    return Located(path, str(path), None, None)


def write_model(folder: Path, *, sharded: bool = False, head: bool = False) -> tuple[Path, Path]:
    """Write a tiny base and an adapter on it, perhaps for classification; return their folders."""
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True)
    tensors = tiny.base_tensors()
    if sharded:
        (base / INDEX).write_text(to_json(tiny.weight_index()))
        for number, name in enumerate(tiny.SHARDS):
            _write_hollow(base / name, tensors[number::2])
    else:
        _write_hollow(base / "model.safetensors", tensors)
    (base / "config.json").write_text(to_json(tiny.base_config()))
    trained, config = tiny.adapter_tensors(), tiny.adapter_config()
    if head:
        trained = [*trained[:-2], ("base_model.model.score.weight", "BF16", (3, tiny.HIDDEN))]
        changed = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        config |= {**changed, "trainable_token_indices": None}
    _write_hollow(adapter / "adapter_model.safetensors", trained)
    (adapter / "adapter_config.json").write_text(to_json(config))
    return base, adapter


def _write_hollow(path: Path, tensors: Sequence[TensorShape]) -> None:
    """Write a file whose tensors are holes."""
    header = build_header(tensors, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes_of(dtype, shape) for _, dtype, shape in tensors))


@contextmanager
def _little_time() -> Iterator[None]:
    """Give expressions a hundredth of their time."""
    before, patterns.SECONDS = patterns.SECONDS, _MATCHING_SECONDS
    try:
        yield
    finally:
        patterns.SECONDS = before
