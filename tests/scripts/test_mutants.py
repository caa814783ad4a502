"""What ``make mutants`` does to the code, and which tests it runs for it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SOURCE = '''\
"""A module."""


class Room:
    """A room."""

    def widths(self, sizes: list[int], least: int = 2) -> list[int]:
        """Return sizes."""
        if not sizes or least > 3:
            raise ValueError(f"{least + 1} is too much")
        total = sum(sizes[1:])
        return [min(size, total) for size in sizes if size != 0]

    def empty(self) -> None:
        """Empty it."""
        self.full = False
        self.put(self.full, 1)
'''

CHANGED = {
    "if sizes or least > 3:" : "not left out",
    "if not sizes and least > 3:": "or",
    "if not sizes or least >= 3:": ">",
    "if not sizes or least > 4:": "one more",
    "if not (not sizes or least > 3):": "the condition turned",
    "pass": "the raise",
    "total = sum(sizes[2:])": "a place",
    "return [max(size, total) for size in sizes if size != 0]": "min",
    "self.put(1, self.full)": "swapped",
    "return [min(size, total) for size in sizes if True]": "the filter",
    "return [min(size, total) for size in sizes if size == 0]": "!=",
    "return [min(size, total) for size in sizes if size != 1]": "zero",
    "return; self.full = False": "returned early",
    "self.full = True": "False",
}  # fmt: skip
"""Some of the lines that a change makes, and what is changed there."""


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from mutants import changes, running

    return changes, running


def found_in(changes: Any, folder: Path) -> list[Any]:
    """Return the changes that can be made to the module."""
    path = folder / "room.py"
    path.write_text(SOURCE)
    return [each for each in changes.changes_of(path, folder) if changes.is_one(each, SOURCE)]


def test_each_change_makes_one_line_wrong(mutants: Any, tmp_path: Path) -> None:
    changes, _ = mutants
    seen = set()
    for change in found_in(changes, tmp_path):
        text = change.apply(SOURCE)
        ast.parse(text)
        new = [line.strip() for line in text.splitlines() if line not in SOURCE.splitlines()]
        assert len(new) == 1
        seen.add(new[0].replace("(sizes)", "sizes"))
        assert change.function in ("Room.widths", "Room.empty")
        assert "too much" not in new[0]  # what is only shown stays
    assert seen >= CHANGED.keys()


def test_the_same_seed_draws_the_same_lines_and_each_line_once(
    mutants: Any, tmp_path: Path
) -> None:
    changes, _ = mutants
    found = found_in(changes, tmp_path)
    drawn = changes.chosen(found, 5, 3)
    assert drawn == changes.chosen(found, 5, 3)
    assert drawn != changes.chosen(found, 5, 4)
    assert len({change.place[0] for change in drawn}) == 5


def test_tests_that_call_the_changed_function_come_first_and_within_the_time(mutants: Any) -> None:
    changes, running = mutants
    change = changes.Change("merging/room.py", "Room.widths", (1, 0, 1, 1), "")
    calls, other = frozenset({"merging/room.py:Room.widths"}), frozenset({"merging/room.py:other"})
    tests = [
        running.Test("tests/merging/test_a.py::slow", 30.0, calls),
        running.Test("tests/merging/test_a.py::quick", 1.0, calls),
        running.Test("tests/verifying/test_b.py::quick", 0.5, calls),
        running.Test("tests/merging/test_a.py::else", 0.1, other),
    ]
    assert running.fitting(change, tests, 10) == [tests[1], tests[2]]
    unseen = changes.Change("merging/room.py", "kernel", (1, 0, 1, 1), "")
    assert len(running.fitting(unseen, tests, 100)) == 4
    inner = changes.Change("merging/files/x.py", "f", (1, 0, 1, 1), "")
    near = running.Test(
        "tests/merging/files/test_x.py::f", 5.0, frozenset({"merging/files/x.py:f"})
    )
    far = running.Test("tests/merging/test_y.py::f", 0.1, frozenset({"merging/files/x.py:f"}))
    assert running.fitting(inner, [far, near], 100) == [near, far]
    kernel = changes.Change("merging/kernels.py", "add", (1, 0, 1, 1), "")
    assert running.fitting(kernel, tests, 100) == [tests[3], tests[1], tests[0]]
