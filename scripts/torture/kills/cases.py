"""One case: a command that something happened to, looked at, and run again."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import regraft
from torture.kills.digests import state, tree
from torture.kills.inputs import write_small_inputs
from torture.kills.running import COMMANDS, EXISTS, UNTYPED, Setting, run

WRITES = (
    "pwrite64", "write", "fsync", "fallocate", "ftruncate", "mkdir", "rename", "renameat2",
    "unlink", "unlinkat", "rmdir",
)  # fmt: skip

READS = ("preadv", "pread64", "read")


class Bench:
    """A folder with inputs, references, and cases."""

    def __init__(self, work: Path) -> None:
        """Make inputs and references; this also has the kernels compiled."""
        self.work = work
        write_small_inputs(work / "inputs")
        self.references = {}
        for setting in (Setting(c, inline) for c in COMMANDS for inline in (False, True)):
            case = self.fresh(f"reference-{setting.name}", setting.command)
            if code := run(setting, case):
                sys.exit(f"{setting.name} fails with {code}: see {work / 'untyped.txt'}")
            self.references[setting] = tree(case / "out")
        self.old = tree(work / "inputs" / "old")
        self.inputs = state(work / "inputs")

    def fresh(self, name: str, command: str) -> Path:
        """Return a folder for a case: empty, or with the model that is to be replaced."""
        case = self.work / "cases" / name
        case.mkdir(parents=True)
        if command == "overwrite":
            shutil.copytree(self.work / "inputs" / "old", case / "out")
        return case

    def counts(self, setting: Setting) -> dict[str, int]:
        """Return how often a thread calls what, at most, when nothing happens."""
        case = self.fresh("counted", setting.command)
        log = self.work / "trace"
        run(setting, case, "-e", "trace=" + ",".join(WRITES + READS), "-o", str(log))
        shutil.rmtree(case)
        calls = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
        most: dict[str, int] = {}
        for (_, name), count in calls.items():
            most[name] = max(most.get(name, 0), count)
        return most

    def look(self, setting: Setting, case: Path, code: int) -> list[str]:
        """Return what is wrong after a run that something happened to."""
        wrong = []
        if code == UNTYPED:
            wrong.append("an error of no type of ours")
        out = case / "out"
        whole = [self.references[setting]]
        whole += [self.old] if setting.command == "overwrite" else []
        if out.exists() and tree(out) not in whole:
            wrong.append("torn")
        elif setting.command == "overwrite" and not out.exists():
            wrong.append("the old model is gone")
        return wrong

    def go_on(self, setting: Setting, case: Path) -> list[str]:
        """Run the command again and return what is wrong then."""
        there = (case / "out").exists() and setting.command != "overwrite"
        code = run(setting, case)
        wrong = []
        if code != (EXISTS if there else 0):
            wrong.append(f"the same command ends with {code}")
        if not (case / "out").exists() or tree(case / "out") != self.references[setting]:
            wrong.append("other bytes")
        if state(self.work / "inputs") != self.inputs:
            wrong.append("an input has changed")
        left = [path for path in case.iterdir() if path.name != "out"]
        if left and there:  # it was whole already: only the work folder was still there
            regraft.clean(case)
            left = [path for path in case.iterdir() if path.name != "out"]
        if left:
            wrong.append("left over: " + ", ".join(path.name for path in left))
        return wrong


@dataclass
class Tally:
    """What came of cases.

    Attributes:
        points: cases in which something happened to the run.
        whole: in how many of them the output was there already, and whole.
        kept: in how many of them tensors were kept for the second run.
        wrong: what was wrong, by case.
    """

    points: int = 0
    whole: int = 0
    kept: int = 0
    wrong: list[str] | None = None

    def add(self, other: Tally) -> None:
        """Add another's numbers."""
        self.points += other.points
        self.whole += other.whole
        self.kept += other.kept
        self.wrong = [*(self.wrong or []), *(other.wrong or [])]


def kept_tensors(case: Path) -> bool:
    """Whether a journal has entries besides its first."""
    journal = case / ".out.regraft" / "journal"
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1


def conclude(bench: Bench, setting: Setting, case: Path, code: int, name: str) -> Tally:
    """Look at a case, have it go on, look again, and remove it."""
    before = tree(case / "out") if (case / "out").exists() else None
    tally = Tally(1, int(before == bench.references[setting]), int(kept_tensors(case)))
    wrong = bench.look(setting, case, code) + bench.go_on(setting, case)
    tally.wrong = [f"{name}: {'; '.join(wrong)}"] if wrong else []
    if not wrong:
        shutil.rmtree(case)
    return tally
