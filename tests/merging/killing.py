"""Commands that are killed at a call of the system, each in a child of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging.processes import environment

Command = tuple[str, list[str], dict[str, Any]]
"""A function of regraft, its arguments, and its options."""

SERVER = """
import json, os, signal, sys
from pathlib import Path
import regraft
from regraft.merging.execution import commit_log as ledger
from regraft.merging.undo import patch
from regraft.system import renaming

ledger.SECONDS_BETWEEN_NOTES = -1
calls = published = 0

def counted(real, kill, publishes=False):
    def call(*arguments, **named):
        global calls, published
        calls += 1
        if publishes and not published:
            published = calls
        if calls == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call

def run(folder, kill, old_kernel, command, arguments, options):
    os.chdir(folder)
    for name in ("pwrite", "write", "fsync", "ftruncate", "posix_fallocate", "mkdir", "rename",
                 "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name), kill))
    real = (lambda *_: 38) if old_kernel else renaming.kernel_rename
    renaming.kernel_rename = counted(real, kill, publishes=True)
    for name in ("append", "flush", "close"):
        setattr(patch.PatchWriter, name, counted(getattr(patch.PatchWriter, name), kill))
    getattr(regraft, command)(*arguments, **options)

def fork(wish):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 99
        try:
            run(**wish)
            status = 0
        except regraft.RegraftError as error:
            status = error.exit_code
        finally:
            os.set_blocking(writer, False)
            real_write(writer, f"{calls} {published}".encode())
            os._exit(status)
    os.close(writer)
    with open(reader) as file:
        counted = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *map(int, (counted or "-1 -1").split())

real_write = os.write
os.chdir(sys.argv[1])
for command, arguments in json.loads(sys.argv[2]):  # has the kernels compiled, once for all
    getattr(regraft, command)(*arguments)
for line in sys.stdin:
    print(json.dumps(fork(json.loads(line))), flush=True)
"""
"""Runs each command in a child that is killed at a call of the system."""


class Server:
    """Runs commands in children of a process that has imported everything."""

    def __init__(self, folder: Path, warm: Sequence[tuple[str, list[str]]]) -> None:
        """Begin in a folder, with commands that have everything compiled."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), json.dumps(warm)],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.published = 0
        """Which call of the last command was the first to put its folder into place."""

    def run(
        self, folder: Path, command: Command, kill: int = 0, *, threads: int = 1,
        old_kernel: bool = False,
    ) -> tuple[int, int]:  # fmt: skip
        """Run a command, killed at a call; return its exit code and how many calls there were."""
        name, arguments, options = command
        wish = {
            "folder": str(folder), "kill": kill, "old_kernel": old_kernel, "command": name,
            "arguments": arguments, "options": {**options, "threads": threads},
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        code, calls, self.published = json.loads(self._process.stdout.readline())
        return code, calls

    def close(self) -> None:
        """End it."""
        self._process.communicate()
