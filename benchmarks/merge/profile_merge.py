"""Say where the time of a merge goes.

    python -m benchmarks.merge.profile_merge BASE ADAPTER OUT [--threads N] [--quantize FORMAT]
        [--digest-cache] [--no-undo] [--disk] [--json]

Wraps the functions of each phase and adds up, over all threads, the wall time spent in them and
the CPU time; of phases inside each other, each counts only what is its own. A phase with much wall
time and little CPU time waits: for the disk, for a lock, or for a core that another thread has.
``--disk`` also writes as many bytes straight to the disk and through the page cache, which no merge
that shares no blocks can beat. OUT must not exist, and is left behind.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shared.raw_write import write

PROBES = (
    ("open", "regraft.api:open_named"),
    ("plan", "regraft.api:_plan"),
    ("make room", "regraft.merging.building:make_room"),
    ("begin work", "regraft.merging.files.staging:Workplace.begin"),
    ("create files", "regraft.merging.execution.outputs:Outputs._create"),
    ("begin tensors", "regraft.merging.execution.scheduler:_StepJob.__init__"),
    ("account for tiles", "regraft.merging.execution.scheduler:_JobRun.account"),
    ("end tensors", "regraft.merging.execution.scheduler:_StepJob.finish"),
    ("wait for a turn", "threading:Condition.wait_for"),
    ("read", "regraft.formats.files.reading:FilePool._fill"),
    ("adapter tensors", "regraft.merging.compute.factors:FactorStore._read"),
    ("pack factors", "regraft.merging.compute.factors:SegmentFactors.of"),
    ("compute", "regraft.merging.compute.step_math:StepMath.run"),
    ("hash", "regraft.merging.execution.step_run:StepRun._hash"),
    ("write, direct", "regraft.merging.files.direct_io:OutputFile._write_direct"),
    ("write, edges", "regraft.merging.files.direct_io:OutputFile.write"),
    ("journal", "regraft.merging.execution.commit_log:Ledger.note"),
    ("flush", "regraft.merging.files.direct_io:OutputFile.close"),
    ("finalize", "regraft.merging.building:write_rest"),
    ("publish", "regraft.merging.files.staging:Workplace.publish"),
    ("execute, the rest", "regraft.merging.building:execute"),
    ("tile, the rest", "regraft.merging.execution.step_run:StepRun.work"),
)
"""Phase and function; several functions may be one phase."""


@dataclass
class Phase:
    """What one phase took, over all threads."""

    calls: int = 0
    wall: float = 0.0
    cpu: float = 0.0


@dataclass
class _Frame:
    """A call under way: when it began, and what the phases inside it took."""

    wall: float
    cpu: float
    inner_wall: float = 0.0
    inner_cpu: float = 0.0


@dataclass
class Clock:
    """Adds up the time of phases, thread by thread, without counting anything twice."""

    main: dict[str, Phase] = field(default_factory=lambda: defaultdict(Phase))
    workers: dict[str, Phase] = field(default_factory=lambda: defaultdict(Phase))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time until the block ends, less that of the phases inside it."""
        stack: list[_Frame] = self._local.__dict__.setdefault("stack", [])
        frame = _Frame(time.perf_counter(), time.thread_time())
        stack.append(frame)
        try:
            yield
        finally:
            stack.pop()
            self._add(name, frame, stack[-1] if stack else None)

    def _add(self, name: str, frame: _Frame, outer: _Frame | None) -> None:
        wall, cpu = time.perf_counter() - frame.wall, time.thread_time() - frame.cpu
        if outer is not None:
            outer.inner_wall += wall
            outer.inner_cpu += cpu
        is_main = threading.current_thread() is threading.main_thread()
        with self._lock:
            phase = (self.main if is_main else self.workers)[name]
            phase.calls += 1
            phase.wall += wall - frame.inner_wall
            phase.cpu += cpu - frame.inner_cpu

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


def resolve(place: str) -> tuple[Any, str]:
    """Return what has a probed function, and the function's name in it.

    Raises:
        ImportError, AttributeError: it is not there (any more).
    """
    module_name, _, path = place.partition(":")
    owner = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    getattr(owner, name)
    return owner, name


def install(clock: Clock) -> list[str]:
    """Wrap every probed function; return those that are not there (any more)."""
    missing = []
    for phase, place in PROBES:
        try:
            owner, name = resolve(place)
            setattr(owner, name, clock.wrap(phase, getattr(owner, name)))
        except (ImportError, AttributeError):
            missing.append(place)
    return missing


def seconds_since_start() -> float:
    """Return the age of this process, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def profile(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Merge with the probes in place; return times, phases and what could not be probed."""
    clock = Clock()
    interpreter = seconds_since_start()
    began = time.perf_counter()
    from regraft import api

    imported = time.perf_counter()
    missing = install(clock)  # imports numba and the kernels
    ready = time.perf_counter()
    compile_times = watch_compiler()
    receipt = api.merge(base, [adapter], out, **options)
    ended = time.perf_counter()
    return {
        "start": {
            "interpreter": interpreter,
            "import regraft.api": imported - began,
            "import the kernels": ready - imported,
            "merge": ended - ready,
        },
        "threads": receipt.totals.threads,
        "written": receipt.totals.bytes_written,
        "compiled": sorted(compile_times, key=lambda item: -item[1]),
        "main": {name: vars(phase) for name, phase in clock.main.items()},
        "workers": {name: vars(phase) for name, phase in clock.workers.items()},
        "missing": missing,
    }


def watch_compiler() -> list[tuple[str, float]]:
    """Return a list to which numba adds each function it compiles and the seconds that took."""
    from numba.core import event

    times: list[tuple[str, float]] = []

    class Listener(event.Listener):  # type: ignore[misc]
        began: dict[int, float] = {}  # noqa: RUF012

        def on_start(self, found: Any) -> None:
            self.began[id(found.data["dispatcher"])] = time.perf_counter()

        def on_end(self, found: Any) -> None:
            dispatcher = found.data["dispatcher"]
            seconds = time.perf_counter() - self.began[id(dispatcher)]
            times.append((dispatcher.py_func.__name__, seconds))

    event.register("numba:compile", Listener())
    return times


def disk_floor(folder: Path, nbytes: int) -> dict[str, float]:
    """Return the seconds to write and flush ``nbytes``, past the page cache and through it."""
    path = folder / "floor.tmp"
    return {
        name: _seconds_to_write(path, nbytes, name == "cached") for name in ("direct", "cached")
    }


def _seconds_to_write(path: Path, nbytes: int, cached: bool) -> float:
    os.sync()
    started = time.perf_counter()
    write(str(path), nbytes, cached=cached)
    seconds = time.perf_counter() - started
    path.unlink()
    os.sync()
    return seconds


def render(found: dict[str, Any]) -> str:
    """Return the profile as text."""
    lines = [f"{name:<22}{seconds:8.2f} s" for name, seconds in found["start"].items()]
    for group, title in (("main", "main thread"), ("workers", f"{found['threads']} workers, sum")):
        lines += ["", f"{title:<22}{'wall s':>10}{'CPU s':>10}{'calls':>8}"]
        phases = sorted(found[group].items(), key=lambda item: -item[1]["wall"])
        lines += [f"{n:<22}{p['wall']:10.2f}{p['cpu']:10.2f}{p['calls']:8}" for n, p in phases]
    lines += _compiled(found["compiled"]) + _floor(found)
    if found["missing"]:
        lines += ["", f"no such function: {', '.join(found['missing'])}"]
    return "\n".join(lines)


def _compiled(times: Sequence[tuple[str, float]]) -> list[str]:
    if not times:
        return []
    lines = [f"{name:<22}{seconds:8.2f} s" for name, seconds in times]
    return ["", "compiled (a function includes those it calls)", *lines]


def _floor(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, seconds in found.get("disk", {}).items():
        rate = found["written"] / seconds / 1e6
        lines.append(f"{f'disk alone, {name}':<22}{seconds:8.2f} s, {rate:.0f} MB/s")
    return ["", *lines] if lines else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Say where the time of a merge goes.")
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, help="worker threads")
    parser.add_argument("--quantize", help="as for regraft merge")
    parser.add_argument("--digest-cache", action="store_true", help="as for regraft merge")
    parser.add_argument("--no-undo", action="store_true", help="as for regraft merge")
    parser.add_argument("--disk", action="store_true", help="also measure the disk alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found = profile(
        options.base, options.adapter, options.out, threads=options.threads,
        quantize=options.quantize, digest_cache=options.digest_cache,
        undo=False if options.no_undo else None,
    )  # fmt: skip
    if options.disk:
        found["disk"] = disk_floor(options.out.absolute().parent, found["written"])
    print(json.dumps(found, indent=2) if options.json else render(found))


if __name__ == "__main__":
    main()
