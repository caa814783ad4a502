"""Kill merge, unmerge, swap and the rest wherever they call the system; see what is left.

    python -m torture.kills --every-call           kill, ENOSPC and EIO at every call
    python -m torture.kills --signals 50           Ctrl-C and SIGTERM at random moments
    python -m torture.kills --power-loss 200       killed, then blocks of its files lost
    python -m torture.kills --random 50 --size 1GB kills at random moments of a large merge
    python -m torture.kills --memory               peak memory, tensors of ten times the cap

Calls are counted and made to fail by strace, in a process of their own for each case. After each,
the output has to be absent or whole (with ``--overwrite``: the old or the new one), the inputs have
to be as they were, and the same command has to succeed and give the bytes of a run that nobody
disturbed: of the whole folder, but for time, seconds, memory and digest in the receipt. Then
nothing may be left beside the output that ``regraft clean`` does not remove. The exit code is 1 if
any of this does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regraft.tensors import parse_size
from torture.kills.calls import every_call, power_loss
from torture.kills.inputs import write_json
from torture.kills.large import large
from torture.kills.moments import signals
from torture.kills.peaks import memory
from torture.kills.running import COMMANDS
from torture.kills.sharing import Share, in_shares, report, say


@contextlib.contextmanager
def workspace(given: str | None) -> Iterator[Path]:
    """Give an empty folder, removed at the end if all went well."""
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=given))
    yield folder
    shutil.rmtree(folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every-call", action="store_true", help="faults at every call")
    parser.add_argument("--signals", type=int, default=0, metavar="N", help="of each, per command")
    parser.add_argument("--power-loss", type=int, default=0, metavar="N", help="per command")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="kills of a large merge")
    parser.add_argument("--size", default="1GB", help="of that merge (%(default)s)")
    parser.add_argument("--memory", action="store_true", help="peaks under a cap")
    parser.add_argument("--cap", default="320MiB", help="that cap (%(default)s)")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument("--work", metavar="DIR", help="where to work; a temporary folder there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    if set(options.commands.split(",")) - set(COMMANDS):
        parser.error(f"--commands takes {', '.join(COMMANDS)}")
    if (options.every_call or options.power_loss) and not shutil.which("strace"):
        parser.error("strace is needed to have calls fail: install it (apt install strace)")
    return options


def of_small(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do what was asked of the small inputs; return the figures."""
    commands, signalled, losses = options.commands.split(","), options.signals, options.power_loss
    wanted: dict[str, tuple[bool, Share]] = {
        "every call": (options.every_call, lambda b, i, n: every_call(b, i, n, commands)),
        "signals": (signalled > 0, lambda b, i, n: signals(b, i, n, commands, signalled)),
        "power loss": (losses > 0, lambda b, i, n: power_loss(b, i, n, commands, losses)),
    }
    return {
        title: report(title, in_shares(folder / title, work, options.jobs))
        for title, (asked, work) in wanted.items()
        if asked
    }


def of_large(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do what was asked of large inputs; return the figures."""
    figures: dict[str, Any] = {}
    if options.random:
        (folder / "large").mkdir()
        found = large(folder / "large", parse_size(options.size), options.random)
        good = ("torn", "left over", "inputs changed")
        found["wrong"] = sum(found[name] for name in good) + found["kills"] - found["identical"]
        figures["random"] = found
    if options.memory:
        cap = parse_size(options.cap)
        found = memory(folder / "memory", cap)
        peaks = [found[kind] for kind in ("zeros", "random numbers")]
        found["wrong"] = sum(not value or value > cap for each in peaks for value in each.values())
        figures["memory"] = found
    for title, found in figures.items():
        say(f"\n{title}: {json.dumps(found)}")
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; return the exit code."""
    options = parse(arguments)
    os.environ["REGRAFT_CACHE"] = ""  # one run makes the calls that another makes
    with workspace(options.work) as folder:
        figures = of_small(options, folder) | of_large(options, folder)
        if options.json:
            write_json(Path(options.json), figures)
        failed = sum(found["wrong"] for found in figures.values())
        if failed:
            sys.exit(f"{failed} failures; what is left of them lies in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
