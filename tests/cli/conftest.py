"""Fixtures of the command line's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import regraft
from cli.kinds import FakeApi, Launch, Run
from cli.tiny import make_adapter, make_base
from regraft.cli.app import app


@pytest.fixture
def run() -> Run:
    """Run the command line in this process."""

    def call(*arguments: str | Path) -> Result:
        return CliRunner(catch_exceptions=False).invoke(app, list(map(str, arguments)))

    return call


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run Python in a process of its own, with a folder of its own, offline."""
    source = str(Path(regraft.__file__).parents[1])

    def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", **environment}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=os.environ | settings,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return call


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny base in a folder of its own."""
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that fits :func:`base`."""
    return make_adapter(tmp_path / "adapter")


@pytest.fixture
def fake_api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """Put functions in the place of those of :mod:`regraft.api`."""

    def put(**functions: Any) -> None:
        module = SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, "regraft.api", module)
        monkeypatch.setattr(regraft, "api", module, raising=False)

    return put
