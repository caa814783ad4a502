"""The fast tests: which they are, and what is said of the rooms they call."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SOURCE = """
import pytest

@pytest.mark.parametrize("x", [1, 2, 3])
def test_many(x): pass

def test_one(): pass

@pytest.mark.slow
def test_slow(): pass
"""


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("tiers.rooms")


@pytest.mark.slow
def test_the_fast_tests_are_the_first_case_of_each_that_is_not_slow(tmp_path: Path) -> None:
    (chosen,) = set(re.findall(r'-m "(.*?)"', (ROOT / "Makefile").read_text()))
    (tmp_path / "test_some.py").write_text(SOURCE)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    command = ["-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    command += ["-o", f"pythonpath={ROOT / 'tests'}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *command, "--collect-only", "-m", chosen, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"::(\S+)", done.stdout)
    assert found == ["test_many[1]", "test_one"], done.stdout + done.stderr


def test_a_room_that_no_test_calls_is_seen(tiers: Any, tmp_path: Path) -> None:
    for name in ("top.py", "a/one.py", "a/two.py", "a/__init__.py", "a/b/deep.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    calls = {"t": (0.1, ["top.py:f", "a/one.py:C.m", "a/b/deep.py:<module>"])}
    found = tiers.shares(tiers.rooms_of(tmp_path), tiers.files_called(calls))
    assert found == {".": (1, 1), "a": (1, 2), "a/b": (0, 1)}
    assert tiers.table(found).splitlines()[-1] == "a/b  0 of 1"
