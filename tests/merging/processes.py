"""Running regraft as a user does: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import regraft
from regraft.cli.app import app

SOURCE = str(Path(regraft.__file__).parents[1])
COMMAND = (sys.executable, "-m", "regraft")

BLOCKED = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that works offline and finds this regraft."""
    return os.environ | {"PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1"} | more


def regraft_command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, **options
    )


def command_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, which has everything imported: in a tenth of a second.

    Its way out of the process is in it; what a process of its own alone can show is not.
    """
    done = CliRunner(catch_exceptions=False).invoke(app, list(map(str, arguments)))
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def python(
    code: str, *arguments: str | Path, without: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python code, with the packages named in ``without`` not there."""
    text = BLOCKED.format(blocked=tuple(without)) + code
    return subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        env=environment(), capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


def errors(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the error that a command run with ``--json`` printed."""
    answer: dict[str, Any] = json.loads(done.stdout)["error"]
    assert answer["exit_code"] == done.returncode
    return answer
