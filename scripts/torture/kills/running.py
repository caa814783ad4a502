"""Commands run in a child that strace may make calls fail in."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import regraft
from regraft import concurrency
from regraft.errors import EnvironmentShortfall, OutputExistsError
from regraft.merging.execution import commit_log as ledger

INPUTS = "../../inputs"

COMMANDS = (
    "merge", "overwrite", "unmerge", "swap", "merge-out", "merge-keep", "merge-nf4", "quantize",
    "dequantize", "unmerge-keep", "swap-keep",
)  # fmt: skip
"""What is interrupted; from the fifth on, quantized weights are read, kept or made."""

SHORTFALL, EXISTS, INTERRUPTED, UNTYPED = 4, 3, 130, 99
"""How a child exits: with an error of the machine, of what is there, by Ctrl-C, by a defect."""


@dataclass(frozen=True)
class Setting:
    """How a command is run.

    Attributes:
        command: one of :data:`COMMANDS`.
        inline: all in the main thread, and with a note in the journal for every tensor, so that
            calls can be counted; else with threads, as usual.
    """

    command: str
    inline: bool

    @property
    def name(self) -> str:
        """A name for reports."""
        return f"{self.command} ({'one thread' if self.inline else 'threads'})"


class Inline:
    """Stands in for a thread: does the work when it is started."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        """Take what a thread takes."""
        del name
        self._target = target

    def start(self) -> None:
        """Do the work."""
        self._target()

    def is_alive(self) -> bool:
        """It is not: all is done."""
        return False


def call(setting: Setting) -> None:
    """Run a command on the small inputs, in the current folder."""
    threads = 1 if setting.inline else None
    at = {name: f"{INPUTS}/{name}" for name in ("base", "adapter", "merged", "other", "nf4",
                                                 "lora", "kept")}  # fmt: skip
    calls: dict[str, Callable[..., object]] = {
        "merge": partial(regraft.merge, at["base"], at["adapter"]),
        "overwrite": partial(regraft.merge, at["base"], at["adapter"], overwrite=True),
        "unmerge": partial(regraft.unmerge, at["merged"]),
        "swap": partial(regraft.swap, at["merged"], at["other"]),
        "merge-out": partial(regraft.merge, at["nf4"], at["adapter"]),
        "merge-keep": partial(regraft.merge, at["nf4"], at["lora"], quantize="keep", seed=7),
        "merge-nf4": partial(regraft.merge, at["base"], at["adapter"], quantize="nf4", undo=True),
        "quantize": partial(regraft.quantize, at["base"], to="int8"),
        "dequantize": partial(regraft.dequantize, at["nf4"]),
        "unmerge-keep": partial(regraft.unmerge, at["kept"]),
        "swap-keep": partial(regraft.swap, at["kept"], at["lora"], quantize="keep", seed=8),
    }
    calls[setting.command](out="out", threads=threads)


def child(setting: Setting, case: Path) -> int:
    """Run a command; return the exit code."""
    os.chdir(case)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ledger.SECONDS_BETWEEN_NOTES = -1
    if setting.inline:
        vars(concurrency)["Thread"] = Inline
    try:
        call(setting)
    except EnvironmentShortfall:
        return SHORTFALL
    except OutputExistsError:
        return EXISTS
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException:
        Path("../../untyped.txt").write_text(f"{setting} {case}\n{traceback.format_exc()}")
        return UNTYPED
    return 0


def start(setting: Setting, case: Path) -> int:
    """Fork a child that runs a command once it gets SIGUSR1; return its number."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    pid = os.fork()
    if pid:
        return pid
    status = UNTYPED
    try:
        ctypes.CDLL(None).prctl(0x59616D61, -1)  # anyone may trace this process
        signal.sigwait([signal.SIGUSR1])
        status = child(setting, case)
    except KeyboardInterrupt:  # before the command was called, or after it returned
        status = INTERRUPTED
    finally:
        os._exit(status)


def wait_for(pid: int) -> int:
    """Return a child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(setting: Setting, case: Path, *options: str) -> int:
    """Run a command in a child, under strace if options for it are given; return its exit code."""
    pid = start(setting, case)
    if not options:
        os.kill(pid, signal.SIGUSR1)
        return wait_for(pid)
    tracer = subprocess.Popen(
        ["strace", "-f", *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if "attached" not in line:
        os.kill(pid, signal.SIGKILL)
        wait_for(pid)
        sys.exit(f"strace cannot attach to a process: {line}{tracer.communicate()[1]}")
    os.kill(pid, signal.SIGUSR1)
    code = wait_for(pid)
    tracer.communicate()
    return code
