"""Make small wrong changes to the code, one at a time, and see whether a test fails.

    PYTHONPATH=scripts python -m mutants [--count N] [--seed N] [--only TEXT] [--json FILE]

Each is made in a copy of the sources, and only tests that call the changed function are run. What
each test calls is looked at once and kept in .mutants. As many changes are tried beside each other
as there are processors: a machine that does other work makes tests fail that would not. It ends
with 1 if fewer changes than 95 of 100 are noticed; changes that change nothing, as equivalent.toml
explains, do not count.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mutants.changes import Change, changes_of, chosen, is_one
from mutants.running import (
    PACKAGE,
    ROOMS,
    ROOT,
    Result,
    calls_of_tests,
    copy_tree,
    fitting,
    tried,
)

_ENOUGH = 0.95
_EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def main() -> int:
    """Run the command line; return its exit code."""
    arguments = _arguments()
    arguments.work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        found = list(_results(arguments, Path(work)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return _told(found)


def _drawn(arguments: argparse.Namespace, package: Path) -> Iterator[Change]:
    """Yield the changes to make, room by room."""
    files = [path for room in arguments.rooms for path in sorted((package / room).rglob("*.py"))]
    changes = [change for path in files for change in changes_of(path, package)]
    named = [each for each in changes if arguments.only in f"{each.file}:{each.function}"]
    drawn = chosen(named, arguments.count, arguments.seed)
    if arguments.again:
        earlier = json.loads(arguments.again.read_text())
        left = {_key(each) for each in earlier if each["outcome"] == "not noticed"}
        drawn = [change for change in drawn if _key(asdict(change)) in left]
    for change in sorted(drawn, key=lambda change: arguments.rooms.index(_room(change))):
        if is_one(change, (package / change.file).read_text(encoding="utf-8")):
            yield change


def _key(change: dict[str, Any]) -> str:
    """Return what tells a change from others, in a report and as it is drawn."""
    return json.dumps([change[field.name] for field in fields(Change)])


def _room(change: Change) -> str:
    return change.file.partition("/")[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="lines to change, one at a time")
    parser.add_argument("--seed", type=int, default=0, help="draws the lines and the changes")
    parser.add_argument(
        "--rooms", nargs="+", default=list(ROOMS), choices=ROOMS, help="packages to change"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="of FILE:FUNCTION with the text")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of tests for one change (default 60)"
    )
    parser.add_argument(
        "--tests", nargs="+", default=list(ROOMS), metavar="FOLDER",
        help="folders and files of tests to choose from (default: those of the four packages)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="changes tried beside each other"
    )
    parser.add_argument(
        "--again", type=Path, metavar="FILE",
        help="of the changes drawn those that an earlier report says were not noticed: give them "
        "more --seconds and more --tests",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every change there")
    parser.add_argument("--work", type=Path, default=ROOT / ".mutants", metavar="FOLDER")
    return parser.parse_args()


def _results(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    tree = copy_tree(work / "tree")
    changes = list(_drawn(arguments, tree / PACKAGE))
    trial = Trial(arguments, tree, work)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for number, found in enumerate(pool.map(trial.of, changes), 1):
            place = f"{found['file']}:{found['place'][0]}"
            print(f"{number}/{len(changes)} {found['outcome']}: {place} {found['by']}")
            told = found["outcome"] == "not noticed"
            print(f"{found['diff']}\n" if told else "", end="", flush=True)
            yield found


class Trial:
    """Tries changes, each in a folder of its own.

    Args:
        arguments: of the command line.
        tree: the copy of the project that the tests are run from.
        work: a folder for the changed copies of the sources.
    """

    def __init__(self, arguments: argparse.Namespace, tree: Path, work: Path) -> None:
        self._tree, self._work, self._seconds = tree, work, arguments.seconds
        self._known = _explanations()
        self._tests = calls_of_tests(
            tree, arguments.work / "calls.json", arguments.tests, arguments.jobs
        )

    def of(self, change: Change) -> dict[str, Any]:
        """Return what came of one change."""
        text = (self._tree / PACKAGE / change.file).read_text(encoding="utf-8")
        changed = change.apply(text)
        why = self._known.get((change.file, *_changed_lines(text, changed)), "")
        result = Result(False, "", 0, 0.0)
        if not why:
            fit = fitting(change, self._tests, self._seconds)
            with tempfile.TemporaryDirectory(dir=self._work) as folder:
                result = tried(change, self._tree, Path(folder), fit)
        outcome = "noticed" if result.noticed else "equivalent" if why else "not noticed"
        diff = _diff(change.file, text, changed)
        return {**asdict(change), "outcome": outcome, "why": why, **asdict(result), "diff": diff}


def _explanations() -> dict[tuple[str, str, str], str]:
    """Return why changes change nothing, by file, the line that was, and the line it became."""
    listed = tomllib.loads(_EQUIVALENT.read_text(encoding="utf-8")).get("change", [])
    return {(each["file"], each["was"], each["now"]): each["why"] for each in listed}


def _changed_lines(text: str, changed: str) -> tuple[str, str]:
    """Return the lines that a change replaced and those it put there, without their indents."""
    pairs = difflib.ndiff(text.splitlines(), changed.splitlines())
    both: dict[str, list[str]] = {"-": [], "+": []}
    for line in pairs:
        if line[0] in both:
            both[line[0]].append(line[2:].strip())
    return " ".join(both["-"]), " ".join(both["+"])


def _diff(file: str, text: str, changed: str) -> str:
    both = text.splitlines(), changed.splitlines()
    return "\n".join(difflib.unified_diff(*both, f"a/{file}", f"b/{file}", lineterm="", n=3))


def _told(found: Sequence[dict[str, Any]]) -> int:
    counted = [each for each in found if each["outcome"] != "equivalent"]
    noticed = sum(each["outcome"] == "noticed" for each in counted)
    share = noticed / max(len(counted), 1)
    print(
        f"{len(found)} changes: {len(found) - len(counted)} change nothing; of the others "
        f"{noticed} of {len(counted)} are noticed ({share:.0%})"
    )
    return int(share < _ENOUGH)


if __name__ == "__main__":
    raise SystemExit(main())
