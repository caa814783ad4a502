"""A plugin of pytest: which functions of the package does each test call, and how long is it?

Given with ``-p mutants.tracing``; writes JSON where ``MUTANTS_CALLS`` says: by test, its seconds
and the functions, as ``file:qualified name``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import regraft

_PACKAGE = str(Path(regraft.__file__).parent) + os.sep


class Calls:
    """What was called since the test began; what a module's fixtures call counts for its tests."""

    def __init__(self) -> None:
        self._now: set[CodeType] = set()
        self._shared: set[CodeType] = set()
        self._module = ""
        self.by_test: dict[str, tuple[float, list[str]]] = {}

    def trace(self, frame: FrameType, _event: str, _argument: Any) -> None:
        """Note a call; no line of it is traced."""
        self._now.add(frame.f_code)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run one test, and note what was called."""
        if str(item.path) != self._module:
            self._module, self._shared = str(item.path), set()
        self._now = set()
        started = time.process_time()
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        yield
        sys.settrace(None)
        threading.settrace(None)
        seconds = time.process_time() - started
        self.by_test[item.nodeid] = (seconds, sorted(_names(self._now | self._shared)))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        """Keep apart what fixtures call that are made for several tests."""
        before, self._now = self._now, set()
        result = yield
        if fixturedef.scope != "function":
            self._shared |= self._now
        self._now |= before
        return result

    def pytest_sessionfinish(self) -> None:
        """Write it down."""
        Path(os.environ["MUTANTS_CALLS"]).write_text(json.dumps(self.by_test))


def _names(codes: set[CodeType]) -> Iterator[str]:
    for code in codes:
        if code.co_filename.startswith(_PACKAGE):
            yield f"{code.co_filename.removeprefix(_PACKAGE)}:{code.co_qualname}"


def pytest_configure(config: pytest.Config) -> None:
    """Begin."""
    config.pluginmanager.register(Calls())
