"""Kill merge, unmerge, swap and the rest wherever they call the system; see what is left.

    python scripts/torture_kills.py --every-call           kill, ENOSPC and EIO at every call
    python scripts/torture_kills.py --signals 50           Ctrl-C and SIGTERM at random moments
    python scripts/torture_kills.py --power-loss 200       killed, then blocks of its files lost
    python scripts/torture_kills.py --random 50 --size 1GB kills at random moments of a large merge
    python scripts/torture_kills.py --memory               peak memory, tensors of ten times the cap

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
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3
from safetensors.numpy import save_file

import regraft
from regraft import concurrency
from regraft.errors import EnvironmentShortfall, OutputExistsError
from regraft.merging.execution import commit_log as ledger
from regraft.tensors import parse_size

PREFIX = "base_model.model."
INPUTS = "../../inputs"
COMMANDS = (
    "merge", "overwrite", "unmerge", "swap", "merge-out", "merge-keep", "merge-nf4", "quantize",
    "dequantize", "unmerge-keep", "swap-keep",
)  # fmt: skip
"""What is interrupted; from the fifth on, quantized weights are read, kept or made."""
WRITES = (
    "pwrite64", "write", "fsync", "fallocate", "ftruncate", "mkdir", "rename", "renameat2",
    "unlink", "unlinkat", "rmdir",
)  # fmt: skip
READS = ("preadv", "pread64", "read")
FAULTS = {"kill": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
"""What strace does at a call."""

SHORTFALL, EXISTS, INTERRUPTED, UNTYPED = 4, 3, 130, 99
"""How a child exits: with an error of the machine, of what is there, by Ctrl-C, by a defect."""


# -- inputs ----------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value))


def write_base(folder: Path, weights: dict[str, np.ndarray], shards: int) -> None:
    """Write a base in several files, with a tokenizer."""
    folder.mkdir(parents=True)
    names, weight_map = list(weights), dict[str, str]()
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: weights[name] for name in names[number::shards]}
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {"model_type": "llama", "dtype": "bfloat16"})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1})


def write_adapter(folder: Path, weights: dict[str, np.ndarray], saved: str | None, seed: int,
                  rank: int = 4) -> None:  # fmt: skip
    """Write LoRA for all but every fifth of a base's tensors, and one tensor as a whole."""
    draw = np.random.default_rng(seed)
    factors, modules = {}, []
    for number, (name, weight) in enumerate(weights.items()):
        if number % 5 == 4 or name == saved:
            continue
        modules.append(name.removesuffix(".weight"))
        for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
            value = draw.normal(size=shape).astype(np.float32) / 8
            factors[f"{PREFIX}{modules[-1]}.lora_{side}.weight"] = value
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    if saved is not None:
        factors[PREFIX + saved] = draw.normal(size=weights[saved].shape).astype(np.float32)
        config["modules_to_save"] = [saved.removesuffix(".weight")]
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config)


def small_weights() -> dict[str, np.ndarray]:
    """Return a few tensors, some in bfloat16 and some in float32, of odd sizes."""
    draw = np.random.default_rng(7)
    kinds = [ml_dtypes.bfloat16, np.float32]
    shapes = [(37, 53), (64, 64), (9, 700), (128, 33), (50, 31), (3, 4096), (45, 60), (80, 24)]
    return {
        f"layers.{number}.weight": draw.normal(size=shape).astype(kinds[number % 3 == 2])
        for number, shape in enumerate(shapes)
    }


def write_small_inputs(folder: Path) -> None:
    """Write a base, two adapters, a merged model and an older one."""
    weights = small_weights()
    write_base(folder / "base", weights, 3)
    write_adapter(folder / "adapter", weights, "layers.6.weight", 1)
    write_adapter(folder / "other", weights, "layers.1.weight", 2)
    write_adapter(folder / "lora", weights, None, 3)
    regraft.merge(folder / "base", folder / "adapter", folder / "merged")
    regraft.merge(folder / "base", folder / "other", folder / "old", undo=False)
    (folder / "old" / "notes.txt").write_text("of the old one")
    regraft.quantize(folder / "base", folder / "nf4", "nf4", double_quant=True)
    shutil.rmtree(folder / "nf4" / "regraft")
    regraft.merge(folder / "nf4", folder / "lora", folder / "kept", quantize="keep")


# -- looking ---------------------------------------------------------------------------------------


def digest_file(path: Path) -> str:
    """Return the blake3 (hex) of a file, read piece by piece."""
    digest = blake3()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder; of a receipt, of what may not differ."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == "regraft/receipt.json":
            found[name] = digest_receipt(path)
        else:
            found[name] = digest_file(path) if path.is_file() else "a folder"
    return found


def digest_receipt(path: Path) -> str:
    """Return a digest of a receipt less what two runs may differ in."""
    receipt = json.loads(path.read_text())
    for name in ("created", "digest"):
        del receipt[name]
    for name in ("seconds", "peak_memory"):
        del receipt["totals"][name]
    return blake3(json.dumps(receipt).encode()).hexdigest()


def state(folder: Path) -> dict[str, Any]:
    """Return content and times of every file below a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, digest_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- running a command in a child ------------------------------------------------------------------


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


# -- one case --------------------------------------------------------------------------------------


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


# -- at every call ---------------------------------------------------------------------------------


def every_call(bench: Bench, share: int, shares: int, commands: Sequence[str]) -> dict[str, Tally]:
    """Have every call fail, in every way; one of several shares of all cases."""
    tallies: dict[str, Tally] = {}
    number = 0
    for setting in (Setting(c, inline) for inline in (True, False) for c in commands):
        counts = bench.counts(setting)
        for fault, kind in FAULTS.items():
            calls = WRITES if fault != "EIO" else WRITES + READS
            tally = tallies.setdefault(f"{setting.name}, {fault}", Tally())
            for name in calls:
                for k in range(1, counts.get(name, 0) + 1):
                    number += 1
                    if number % shares == share:
                        tally.add(one_call(bench, setting, f"{name}:{kind}:when={k}", number))
    return tallies


def one_call(bench: Bench, setting: Setting, fault: str, number: int) -> Tally:
    """Run one case; one whose call never came does not count."""
    case = bench.fresh(f"{number}", setting.command)
    log = case.with_suffix(".trace")
    name = fault.partition(":")[0]
    code = run(setting, case, "-e", f"trace={name}", "-e", f"inject={fault}", "-o", str(log))
    happened = code == -signal.SIGKILL or "(INJECTED)" in log.read_text()
    log.unlink()
    if not happened:
        shutil.rmtree(case)
        return Tally()
    return conclude(bench, setting, case, code, f"{setting.name} {fault}")


# -- at random moments -----------------------------------------------------------------------------


SIGNALS = {"SIGINT": 1, "SIGTERM": 1, "SIGKILL": 3}
"""What is sent, and how many times, each time to the command run again."""


def signals(bench: Bench, share: int, shares: int, commands: Sequence[str], count: int,
            ) -> dict[str, Tally]:  # fmt: skip
    """Interrupt at random moments: by Ctrl-C, by SIGTERM, and several times in a row by SIGKILL."""
    tallies: dict[str, Tally] = {}
    draw = random.Random(share)
    for command in commands:
        setting = Setting(command, inline=False)
        seconds = min(timed(bench, setting, f"timed-{share}") for _ in range(3))
        for name, times in SIGNALS.items():
            tally = tallies.setdefault(f"{command}, {name} {times}x", Tally())
            for number in range(share, count, shares):
                case = bench.fresh(f"{command}-{name}-{number}", command)
                code = send(bench, setting, case, signal.Signals[name], seconds, draw)
                for _ in range(times - 1):
                    moment = draw.uniform(0, seconds)
                    code = run_and_send(setting, case, signal.Signals[name], moment)
                tally.add(conclude(bench, setting, case, code, f"{command} {name} {number}"))
    return tallies


def send(bench: Bench, setting: Setting, case: Path, sent: signal.Signals, seconds: float,
         draw: random.Random) -> int:  # fmt: skip
    """Run a command and send it a signal, over again if it was done before that came."""
    while not (code := run_and_send(setting, case, sent, draw.uniform(0, seconds))):
        shutil.rmtree(case)
        bench.fresh(case.name, setting.command)
    return code


def timed(bench: Bench, setting: Setting, name: str) -> float:
    """Return how long a run takes."""
    case = bench.fresh(name, setting.command)
    began = time.perf_counter()
    run(setting, case)
    seconds = time.perf_counter() - began
    shutil.rmtree(case)
    return seconds


def run_and_send(setting: Setting, case: Path, sent: signal.Signals, after: float) -> int:
    """Run a command and send it a signal after some seconds; return its exit code."""
    pid = start(setting, case)
    os.kill(pid, signal.SIGUSR1)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sent)
    return wait_for(pid)


def power_loss(bench: Bench, share: int, shares: int, commands: Sequence[str], count: int,
               ) -> dict[str, Tally]:  # fmt: skip
    """Kill at random calls, then lose blocks of what was written but not flushed."""
    tallies: dict[str, Tally] = {}
    draw = random.Random(1000 + share)
    number = 0
    for command in commands:
        setting = Setting(command, inline=True)
        counts = bench.counts(setting)
        tally = tallies.setdefault(command, Tally())
        for _ in range(count):
            number += 1
            if number % shares != share:
                continue
            case = bench.fresh(f"p{number}", command)
            name = draw.choice([name for name in ("pwrite64", "write", "fsync") if name in counts])
            fault = f"{name}:signal=KILL:when={draw.randint(1, counts[name])}"
            code = run(setting, case, "-e", f"trace={name}", "-e", f"inject={fault}", "-o",
                       "/dev/null")  # fmt: skip
            lose(case / ".out.regraft", draw)
            tally.add(conclude(bench, setting, case, code, f"power loss {command} {fault}"))
    return tallies


def lose(folder: Path, draw: random.Random) -> None:
    """Zero, cut off or garble files below a folder, as a disk may that lost power."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        what = draw.choice(["nothing", "nothing", "zeros", "cut", "garbage", "gone"])
        block = draw.randrange(size // 512 + 1) * 512
        with path.open("r+b") as file:
            if what == "cut":
                file.truncate(block)
            elif what in ("zeros", "garbage") and block < size:
                file.seek(block)
                length = min(512 * draw.randint(1, 16), size - block)
                file.write(bytes(length) if what == "zeros" else draw.randbytes(length))
        if what == "gone":
            path.unlink()


# -- a large merge ---------------------------------------------------------------------------------


def large(work: Path, size: int, count: int) -> dict[str, Any]:
    """Kill the command line at random moments of a large merge, each time from the start.

    Of every five kills one is followed by a second, before the merge is let finish.
    """
    write_large_inputs(work, size)
    inputs = state(work)
    seconds = min(timed_large(work) for _ in range(2))
    reference = tree(work / "out")
    shutil.rmtree(work / "out")
    draw, found, again = random.Random(5), Counter[str](), list[float]()
    while found["kills"] < count:
        if not kill_large(work, draw.uniform(0.4, seconds)):
            seconds *= 0.95  # it was done already: that is no kill
            found["too late"] += 1
            shutil.rmtree(work / "out")
            continue
        found["kills"] += 1
        found["torn"] += (work / "out").exists() and tree(work / "out") != reference
        found["tensors kept"] += kept_tensors(work)
        if found["kills"] % 5 == 0 and kill_large(work, draw.uniform(0.4, seconds)):
            found["killed twice"] += 1
        if not (work / "out").exists():
            again.append(timed_large(work))
        found["identical"] += tree(work / "out") == reference
        shutil.rmtree(work / "out")
        regraft.clean(work)
        found["left over"] += len(list(work.glob(".*")))
        say(f"{found['kills']} of {count} kills at random moments")
    found["inputs changed"] += state(work) != inputs
    found["bytes"] = sum(path.stat().st_size for path in (work / "base").iterdir())
    names = ("torn", "left over", "inputs changed", "too late", "killed twice")
    found.update(dict.fromkeys(names, 0))
    return {**found, "seconds_undisturbed": seconds, "seconds_to_go_on": again}


def write_large_inputs(work: Path, size: int) -> None:
    """Write a base of a size and an adapter for it."""
    rows, columns = 2048, 4096
    block = np.random.default_rng(3).normal(size=(rows, columns)).astype(ml_dtypes.bfloat16)
    tensors = max(size // block.nbytes, 4)
    weights = {f"layers.{n}.weight": np.roll(block, n, axis=1) for n in range(tensors)}
    write_base(work / "base", weights, 4)
    write_adapter(work / "adapter", weights, "layers.3.weight", 1, rank=16)


def timed_large(work: Path) -> float:
    """Run the large merge to its end, from the start if it was at its end; return the seconds."""
    if (work / "out").exists():
        shutil.rmtree(work / "out")
    began = time.perf_counter()
    subprocess.run(LARGE, check=True, cwd=work)
    return round(time.perf_counter() - began, 2)


def kill_large(work: Path, after: float) -> bool:
    """Start the large merge and kill it after some seconds; return False if it was done by then."""
    process = subprocess.Popen(LARGE, cwd=work)
    time.sleep(after)
    process.kill()
    return process.wait() == -signal.SIGKILL


LARGE = [sys.executable, "-m", "regraft", "merge", "base", "adapter", "-o", "out", "-q"]


# -- memory ----------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import regraft
from regraft.system.memory import peak_memory
name, arguments, cap = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
getattr(regraft, name)(*arguments, max_memory=cap)
print(peak_memory())
"""


def memory(work: Path, cap: int) -> dict[str, Any]:
    """Return the peak memory of each command on tensors of ten times the cap."""
    rows, columns = 10 * cap // (2 * 4096) + 1, 4096
    found: dict[str, Any] = {"cap": cap, "tensor": 2 * rows * columns}
    for kind in ("zeros", "random numbers"):
        place = work / kind.split()[0]
        write_huge(place / "base", rows, columns, random_numbers=kind != "zeros")
        shape = {"huge.weight": np.empty((rows, columns), np.uint8)}
        for number, name in enumerate(("adapter", "other")):
            write_adapter(place / name, shape, None, number, rank=16)
        calls = {
            "merge": [place / "base", place / "adapter", place / "merged"],
            "unmerge": [place / "merged", place / "unmerged"],
            "swap": [place / "merged", place / "other", place / "swapped"],
        }
        peaks = {name: measured(name, arguments, cap) for name, arguments in calls.items()}
        same = digest_file(place / "base" / "model.safetensors") == digest_file(
            place / "unmerged" / "model.safetensors"
        )
        found[kind] = {**peaks, "unmerged is the base": same}
        say(f"memory: {kind}: {found[kind]}")
        shutil.rmtree(place)
    return found


def write_huge(folder: Path, rows: int, columns: int, *, random_numbers: bool) -> None:
    """Write a base of one bfloat16 tensor, all zeros (and no room on the disk) or random."""
    folder.mkdir(parents=True)
    size = 2 * rows * columns
    header = {"huge.weight": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, rows if random_numbers else 0, 4096):
            shape = (min(4096, rows - begin), columns)
            values = draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            file.write(values.tobytes())
        file.truncate(8 + len(text) + size)


def measured(name: str, arguments: Iterable[Path], cap: int) -> int:
    """Return the peak resident memory of a call in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, json.dumps([str(a) for a in arguments]), str(cap)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


# -- all of it -------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Tell how far it has come."""
    print(line, file=sys.stderr, flush=True)


Share = Callable[[Bench, int, int], dict[str, Tally]]


def in_shares(folder: Path, work: Share, jobs: int) -> dict[str, Tally]:
    """Do cases in several processes that each have inputs of their own; return all tallies."""
    pids, totals = [], dict[str, Tally]()
    for share in range(jobs):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                place = folder / f"share-{share}"
                place.mkdir(parents=True)
                found = {k: vars(t) for k, t in work(Bench(place), share, jobs).items()}
                write_json(folder / f"share-{share}.json", found)
                status = 0
            finally:
                traceback.print_exc() if status else None
                os._exit(status)
        pids.append(pid)
    codes = [wait_for(pid) for pid in pids]
    if any(codes):
        sys.exit("a share of the cases could not be done")
    for share in range(jobs):
        for name, numbers in json.loads((folder / f"share-{share}.json").read_text()).items():
            totals.setdefault(name, Tally()).add(Tally(**numbers))
    return totals


def report(title: str, tallies: dict[str, Tally]) -> dict[str, Any]:
    """Print tallies and return them as JSON."""
    say(f"\n{title}")
    for name, tally in tallies.items():
        wrong = tally.wrong or []
        say(
            f"  {name:38} {tally.points:5} points, {len(wrong)} wrong; whole already {tally.whole},"
            f" tensors kept {tally.kept}"
        )
        for line in wrong[:20]:
            say(f"    {line}")
    total = sum(tally.points for tally in tallies.values())
    failed = sum(len(tally.wrong or []) for tally in tallies.values())
    say(f"  in all {total} points, {failed} wrong")
    return {"points": total, "wrong": failed, "cases": {n: vars(t) for n, t in tallies.items()}}


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
