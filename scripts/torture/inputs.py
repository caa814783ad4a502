"""Change an input while a verb reads it: at every read, in every way, each file by itself.

    python -m torture.inputs [--every N] [--processes N] [--json]

Each verb is first run undisturbed, and its reads of input files are counted. Then, for each of
these reads, each file that was read, and each way, it runs on fresh copies, and just before that
read the file gets what the same file of other inputs holds: written in place, put in its place by a
rename, or written in place with its old times set again; or it is cut short, made longer, or only
touched. After it, OUT has to be absent, or what the old inputs give or the new ones, byte for byte;
an error has to be a typed one; nothing may be left beside OUT; and the same command, run again, has
to give what the changed inputs give, or a typed error where they are none. The exit code is 1 if
any of it does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from blake3 import blake3
from safetensors.numpy import save_file

import regraft

IN, OUT = Path("in"), Path("out")
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
HIDDEN, RANK = 32, 4
Tree = dict[str, str]


# -- inputs ----------------------------------------------------------------------------------------


def write_inputs(folder: Path, seed: int) -> None:
    """Write a base, adapters and a merged model; files are named alike, whatever the seed."""
    draw = np.random.default_rng(seed)

    def values(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return draw.normal(size=shape).astype(dtype)

    weights = {f"{m}.weight": values(HIDDEN, HIDDEN, dtype=ml_dtypes.bfloat16) for m in MODULES}
    weights["model.norm.weight"] = values(HIDDEN, dtype=ml_dtypes.bfloat16)
    base = folder / "base"
    base.mkdir(parents=True)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "dtype": "bfloat16", "bos_token_id": seed}
    _write_json(base / "config.json", config)
    _write_json(base / "tokenizer.json", {"version": str(seed)})
    _write_json(base / "tokenizer_config.json", {"model_max_length": seed})
    (base / "README.md").write_text(f"---\nlicense: mit\n---\n# Base {seed}\n")
    for name in ("adapter", "other"):
        factors = {}
        for module in MODULES:
            for side, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK))):
                factors[f"base_model.model.{module}.lora_{side}.weight"] = values(*shape)
        (folder / name).mkdir()
        save_file(factors, folder / name / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": RANK, "lora_alpha": seed, "target_modules": [*MODULES]}
        _write_json(folder / name / "adapter_config.json", told)
    regraft.merge(base, folder / "adapter", folder / "merged", threads=1)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


class Verb(NamedTuple):
    """What is disturbed: a call that makes OUT of inputs, and what it reads of them."""

    call: Callable[[], object]
    inputs: tuple[str, ...]


VERBS = {
    "merge": Verb(
        lambda: regraft.merge(IN / "base", IN / "adapter", OUT, threads=1), ("base", "adapter")
    ),
    "merge in two threads": Verb(
        lambda: regraft.merge(IN / "base", IN / "adapter", OUT, threads=2, dtype="float32"),
        ("base", "adapter"),
    ),
    "swap": Verb(
        lambda: regraft.swap(IN / "merged", IN / "other", OUT, threads=1), ("merged", "other")
    ),
    "unmerge": Verb(lambda: regraft.unmerge(IN / "merged", OUT, threads=1), ("merged",)),
    "convert": Verb(
        lambda: regraft.convert(IN / "base", OUT, dtype="float32", threads=1), ("base",)
    ),
    "quantize": Verb(lambda: regraft.quantize(IN / "base", OUT, "nf4", threads=1), ("base",)),
    "shrink": Verb(lambda: regraft.shrink(IN / "adapter", OUT, rank=2), ("adapter",)),
}  # fmt: skip


# -- ways ------------------------------------------------------------------------------------------


def in_place(path: Path, new: bytes) -> None:
    """Write a file anew, as it lies there."""
    with path.open("r+b") as file:
        file.write(new)
        file.truncate()


def replaced(path: Path, new: bytes) -> None:
    """Put another file in its place."""
    beside = path.with_name("beside")
    beside.write_bytes(new)
    beside.rename(path)


def cut_short(path: Path, new: bytes) -> None:
    """Leave half of it."""
    del new
    os.truncate(path, path.stat().st_size // 2)


def made_longer(path: Path, new: bytes) -> None:
    """Add bytes to its end."""
    del new
    with path.open("ab") as file:
        file.write(b" ")


def touched(path: Path, new: bytes) -> None:
    """Only date it anew."""
    del new
    os.utime(path)


def with_old_times(path: Path, new: bytes) -> None:
    """Write it anew and set the time of its last change back."""
    found = path.stat()
    in_place(path, new)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


WAYS = (in_place, replaced, cut_short, made_longer, touched, with_old_times)
Way = Callable[[Path, bytes], None]


# -- reading ---------------------------------------------------------------------------------------


class Reads:
    """Counts reads of files below :data:`IN`, and does something just before one of them."""

    def __init__(self, at: int = -1, then: Callable[[], None] = lambda: None) -> None:
        """Take which read, from 0, and what to do."""
        self.count, self.files, self._at, self._then = 0, set[str](), at, then
        self._root = str(IN.absolute()) + "/"

    def before(self, fd: int) -> None:
        """Account for a read."""
        path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        if not path.startswith(self._root):
            return
        self.files.add(path.removeprefix(self._root))
        if self.count == self._at:
            self._then()
        self.count += 1


@contextlib.contextmanager
def reading(reads: Reads) -> Iterator[None]:
    """Have all positioned reads of this process counted."""
    usual = os.pread, os.preadv

    def pread(fd: int, *rest: Any) -> bytes:
        reads.before(fd)
        return usual[0](fd, *rest)

    def preadv(fd: int, *rest: Any) -> int:
        reads.before(fd)
        return usual[1](fd, *rest)

    os.pread, os.preadv = pread, preadv
    try:
        yield
    finally:
        os.pread, os.preadv = usual


# -- looking ---------------------------------------------------------------------------------------


def tree(folder: Path) -> Tree:
    """Return a digest of every file below a folder; of a receipt, of what may not differ."""
    return {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "receipt.json":
        receipt = json.loads(content)
        for name in ("created", "digest"):
            del receipt[name]
        for name in ("seconds", "peak_memory", "threads"):
            del receipt["totals"][name]
        content = json.dumps(receipt).encode()
    return blake3(content).hexdigest()


def outcome(verb: Verb, reads: Reads) -> Tree | regraft.RegraftError:
    """Run a verb; return what it made, or the typed error that it ended with."""
    try:
        with reading(reads):
            verb.call()
    except regraft.RegraftError as error:
        return error
    return tree(OUT)


# -- the matrix ------------------------------------------------------------------------------------


class Bench:
    """A folder with two sets of inputs, in which cases are run one after the other."""

    def __init__(self, folder: Path) -> None:
        """Write the inputs."""
        self._old, self._new = folder / "old", folder / "new"
        write_inputs(self._old, 3)
        write_inputs(self._new, 5)
        self._case = folder / "case"
        self._known: dict[tuple[str, str, str], Tree | str] = {}

    def fresh(self, verb: Verb) -> None:
        """Go to a folder that holds the old inputs of a verb and nothing else."""
        os.chdir("/")
        shutil.rmtree(self._case, ignore_errors=True)
        (self._case / IN).mkdir(parents=True)
        os.chdir(self._case)
        for name in verb.inputs:
            shutil.copytree(self._old / name, IN / name)

    def undisturbed(self, verb: Verb) -> tuple[Tree, Reads]:
        """Return what a verb makes of the old inputs, and its reads."""
        self.fresh(verb)
        reads = Reads()
        made = outcome(verb, reads)
        if isinstance(made, regraft.RegraftError):
            raise made
        return made, reads

    def change(self, file: str, way: Way) -> None:
        """Change a file of the case."""
        way(IN / file, (self._new / file).read_bytes())

    def of_changed(self, name: str, file: str, way: Way) -> Tree | str:
        """Return what a verb makes of inputs that were changed before, or the kind of its error."""
        key = (name, file, way.__name__)
        if key not in self._known:
            self.fresh(VERBS[name])
            self.change(file, way)
            made = outcome(VERBS[name], Reads())
            self._known[key] = made if isinstance(made, dict) else type(made).__name__
        return self._known[key]

    def disturbed(self, name: str, file: str, way: Way, at: int, old: Tree) -> tuple[str, str]:
        """Run one case; return how it ended, and what is wrong with that."""
        verb, new = VERBS[name], self.of_changed(name, file, way)
        self.fresh(verb)
        made = outcome(verb, Reads(at, lambda: self.change(file, way)))
        if left := [path.name for path in Path().iterdir() if path not in (IN, OUT)]:
            return "", f"left {left}"
        if isinstance(made, dict):
            return ("old", "") if made == old else ("new", "made a mixture" * (made != new))
        if OUT.exists():
            return "", "an error and an output"
        ended = "changed" if isinstance(made, regraft.ChangedError) else type(made).__name__
        again = outcome(verb, Reads())
        again = again if isinstance(again, dict) else type(again).__name__  # type: ignore[assignment]
        return ended, "" if again == new else f"again: {str(again)[:120]}"


def run_share(share: tuple[int, int, int, list[str]]) -> tuple[Counter[str], list[str]]:
    """Run every n-th case: its number among the processes, their number, the stride, the verbs."""
    number, processes, every, names = share
    warnings.simplefilter("ignore")
    counts, failures = Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="regraft-inputs-") as folder:
        bench = Bench(Path(folder))
        for name in names:
            old, reads = bench.undisturbed(VERBS[name])
            cases = list(product(sorted(reads.files), WAYS, range(reads.count)))
            for file, way, at in cases[::every][number::processes]:
                what = f"{name}, {file} {way.__name__} at read {at} of {reads.count}"
                ended, wrong = _attempt(bench, name, file, way, at, old)
                counts[f"{name}: points"] += 1
                counts[f"ended: {ended or 'wrong'}"] += 1
                failures += [f"{what}: {wrong}"] if wrong else []
        os.chdir("/")
    return counts, failures


def _attempt(
    bench: Bench, name: str, file: str, way: Way, at: int, old: Tree
) -> tuple[str, str]:  # fmt: skip
    try:
        return bench.disturbed(name, file, way, at, old)
    except Exception as error:  # whatever it is, it is a failure to be counted
        return "", f"untyped {type(error).__name__}: {str(error)[:200]}"


def main() -> int:
    """Run the matrix and print what came of it."""
    options = _options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "REGRAFT_CACHE": ""}  # every byte is read and hashed
    started = time.perf_counter()
    counts, failures = Counter[str](), list[str]()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        names = options.verbs or list(VERBS)
        shares = [(i, options.processes, options.every, names) for i in range(options.processes)]
        for found, bad in pool.map(run_share, shares):
            counts += found
            failures += bad
    seconds = time.perf_counter() - started
    points = sum(n for name, n in counts.items() if name.endswith(": points"))
    result = {**counts, "points": points, "failures": failures, "seconds": round(seconds)}
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 1 if failures else 0


def _table(result: dict[str, Any]) -> str:
    failures = result["failures"]
    lines = [f"{name}: {value}" for name, value in result.items() if name != "failures"]
    return "\n".join([*lines, f"failures: {len(failures)}", *(f"  {each}" for each in failures)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Change inputs while they are read.")
    parser.add_argument("--every", type=int, default=1, help="take only every N-th case")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbs", nargs="*", choices=VERBS, help="by default all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
