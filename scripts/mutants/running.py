"""Runs tests in copies of the tree, in processes that can be stopped with all they started."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from mutants.changes import Change

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src", "regraft")
ROOMS = ("deltas", "merging", "verifying", "runtime")
"""What is changed, and the folders of tests that mirror it, room by room."""

_COPIED = ("src", "tests", "scripts", "docs", "examples", "benchmarks", "pyproject.toml")
_NO_TESTS = 5
"""What pytest ends with where no test is to be run: all of a file are skipped here."""

_STARTING = 60.0
"""Seconds that a run may take beside its tests: imports, and kernels to compile."""


@dataclass(frozen=True)
class Test:
    """A test, as pytest names it, with its seconds and the functions it calls."""

    name: str
    seconds: float
    functions: frozenset[str]


@dataclass(frozen=True)
class Result:
    """What came of the tests of one change.

    Attributes:
        noticed: by a test that failed, or by one that did not end.
        by: the test, or what else happened.
        tests: how many were to run.
        seconds: what it took.
    """

    noticed: bool
    by: str
    tests: int
    seconds: float


def copy_tree(folder: Path) -> Path:
    """Copy what the tests need; compiled kernels come along, and are as old as they were."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns(".*")
            shutil.copytree(source, folder / name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(source, folder / name)
    return folder


def calls_of_tests(tree: Path, kept: Path, folders: Sequence[str], jobs: int) -> list[Test]:
    """Return what each test calls: of test files that changed since by running them.

    Args:
        tree: a copy of the project.
        kept: a file in which this is kept from one run to the next.
        folders: folders and files of tests.
        jobs: test files that are run beside each other.

    Raises:
        SystemExit: a test fails as it is.
    """
    known = json.loads(kept.read_text()) if kept.exists() else {}
    files = sorted({path for name in folders for path in _test_files(tree, name)})
    digests = {file: hashlib.blake2b((tree / file).read_bytes()).hexdigest() for file in files}
    changed = [file for file in files if known.get(file, {}).get("digest") != digests[file]]
    with ThreadPoolExecutor(jobs) as pool:
        asked = {pool.submit(_calls, tree, file): file for file in changed}
        try:
            for done in as_completed(asked):
                file = asked[done]
                known[file] = {"digest": digests[file], "tests": done.result()}
                kept.write_text(json.dumps(known))
                print(f"looked at what {file} calls", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [
        Test(name, seconds, frozenset(functions))
        for file in files
        for name, (seconds, functions) in known[file]["tests"].items()
    ]


def _test_files(tree: Path, name: str) -> list[str]:
    place = tree / "tests" / name
    found = place.rglob("test_*.py") if place.is_dir() else [place]
    return [path.relative_to(tree).as_posix() for path in found]


def _calls(tree: Path, file: str) -> dict[str, tuple[float, list[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder, "calls.json")
        options = ["-p", "mutants.tracing", file]
        code, text = _pytest(tree, tree, options, 1800, MUTANTS_CALLS=calls)
        if code not in (0, _NO_TESTS):
            raise SystemExit(f"{file} fails as it is:\n{text}")
        found: dict[str, tuple[float, list[str]]] = json.loads(calls.read_text())
        return found


def fitting(change: Change, tests: Sequence[Test], seconds: float) -> list[Test]:
    """Return the tests to run for a change, those first that are likeliest to fail, and quick ones.

    They are those that call its function. Of what no test is seen to call (compiled kernels, what
    runs at the import) they are those that call something of its file, then all of the folder that
    mirrors its room. Of each test with several parameters some come before the many.

    Args:
        change: the change.
        tests: all tests.
        seconds: what they may take together; at least one runs.
    """
    called = [test for test in tests if f"{change.file}:{change.function}" in test.functions]
    near = [test for test in tests if _calls_file(test, change.file)]
    mirrored = [test for test in tests if _shared_folders(test, change.file)]
    ranks = [called] if called else [near, [test for test in mirrored if test not in near]]
    taken, found = 0.0, list[Test]()
    for test in (test for rank in ranks for test in _in_order(rank, change.file)):
        if not found or taken + test.seconds <= seconds:
            taken += test.seconds
            found.append(test)
    return found


def _calls_file(test: Test, file: str) -> bool:
    return any(name.startswith(f"{file}:") for name in test.functions)


def _shared_folders(test: Test, file: str) -> int:
    """Return how many folders of a test, below ``tests``, are those of a file of the package."""
    theirs, ours = Path(test.name.partition("::")[0]).parent.parts[1:], Path(file).parent.parts
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False))
    )


def _in_order(tests: Sequence[Test], file: str) -> list[Test]:
    """Return tests with those of the mirrored folders and quick ones first, each name a few times
    before any comes often."""
    seen: dict[str, int] = {}
    order = []
    for test in sorted(tests, key=lambda test: test.seconds):
        name = test.name.partition("[")[0]
        seen[name] = seen.get(name, 0) + 1
        shared = _shared_folders(test, file)
        order.append((min(seen[name], 4), -shared, test.seconds, test))
    return [test for *_, test in sorted(order, key=lambda each: each[:3])]


def tried(change: Change, tree: Path, folder: Path, tests: Sequence[Test]) -> Result:
    """Make a change in a copy of the sources, and run tests until one fails.

    Args:
        change: the change.
        tree: the copy of the project that the tests are run from.
        folder: an empty one, where the changed copy goes.
        tests: the tests to run.
    """
    started = time.perf_counter()
    shutil.copytree(tree / "src", folder / "src")
    path = folder / PACKAGE / change.file
    path.write_text(change.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
    limit = _STARTING + 10 * sum(test.seconds for test in tests)
    code, text = _pytest(tree, folder, ["-x", *(test.name for test in tests)], limit)
    return Result(code != 0, _noticed_by(code, text), len(tests), time.perf_counter() - started)


def _noticed_by(code: int | None, text: str) -> str:
    if code is None:
        return "a test that did not end"
    if code == 0:
        return ""
    failed = [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"pytest ended with {code}"


def _pytest(
    tree: Path, sources: Path, arguments: Sequence[str], seconds: float, **more: object
) -> tuple[int | None, str]:
    """Run pytest in a group of processes of its own; return None for a code if it did not end."""
    paths = os.pathsep.join([str(sources / "src"), str(tree / "scripts")])
    given = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in more.items()}}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], cwd=tree,
            env=os.environ | given, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read()
