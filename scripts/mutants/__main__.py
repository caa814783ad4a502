"""Make small wrong changes to the code, one at a time, and see whether a test fails.

    PYTHONPATH=scripts python -m mutants [--count N] [--seed N] [--only TEXT] [--json FILE]

Each is made in a copy of the sources, and only tests that call the changed function are run. What
each test calls is looked at once and kept in .mutants. It ends with 1 if fewer changes than 95 of
100 are noticed; changes that change nothing, as equivalent.toml explains, do not count.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mutants.changes import Change, changes_of, chosen, is_one
from mutants.running import (
    PACKAGE,
    ROOMS,
    ROOT,
    Result,
    Test,
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
    kept = arguments.work / "calls.json"
    arguments.work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        tree = copy_tree(Path(work, "tree"))
        tests = calls_of_tests(tree, kept, [*ROOMS, *arguments.tests])
        package = tree / PACKAGE
        files = [path for room in ROOMS for path in sorted((package / room).rglob("*.py"))]
        changes = [change for path in files for change in changes_of(path, package)]
        changes = [change for change in changes if arguments.only in f"{change.file}:{change.function}"]
        drawn = chosen(changes, arguments.count, arguments.seed)
        found = list(_results(drawn, tree, Path(work, "changed"), tests, arguments.seconds))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return _told(found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="lines to change, one at a time")
    parser.add_argument("--seed", type=int, default=0, help="draws the lines and the changes")
    parser.add_argument("--only", default="", metavar="TEXT", help="of FILE:FUNCTION with the text")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of tests for one change (default 60)"
    )
    parser.add_argument(
        "--tests", nargs="*", default=[], metavar="FOLDER",
        help="folders or files of tests besides the mirrored ones",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every change there")
    parser.add_argument("--work", type=Path, default=ROOT / ".mutants", metavar="FOLDER")
    return parser.parse_args()


def _results(
    changes: Sequence[Change], tree: Path, folder: Path, tests: Sequence[Test], seconds: float
) -> Iterator[dict[str, Any]]:
    known = _explanations()
    for number, change in enumerate(changes, 1):
        text = (tree / PACKAGE / change.file).read_text(encoding="utf-8")
        if not is_one(change, text):
            continue
        lines = _changed_lines(text, change.apply(text))
        why = known.get((change.file, *lines), "")
        fit = fitting(change, tests, seconds)
        result = Result(False, "", 0, 0.0) if why else tried(change, tree, folder, fit)
        outcome = "noticed" if result.noticed else "equivalent" if why else "not noticed"
        print(f"{number}/{len(changes)} {outcome}: {change.file}:{change.place[0]} {result.by}")
        yield {
            **asdict(change), "outcome": outcome, "why": why, **asdict(result),
            "diff": _diff(change.file, text, change.apply(text)),
        }  # fmt: skip
        if not result.noticed and not why:
            print(_diff(change.file, text, change.apply(text)), flush=True)


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
    return share < _ENOUGH


if __name__ == "__main__":
    raise SystemExit(main())
