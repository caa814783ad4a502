"""Kernels compiled before the tests begin, in as many processes as the tests will have.

Each process of the tests would compile nearly all of them otherwise, for a minute, and the same
ones at the same time: after a change to the kernels, and where the sources were just cloned.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def float32(folder: Path) -> None:
    """Merge into float32."""
    import regraft
    from merging import toys

    base = toys.write_base(folder / "base", toys.llama_tensors("float32"))
    regraft.merge(base, toys.write_adapter(folder / "adapter"), folder / "out")


def bfloat16(folder: Path) -> None:
    """Merge into bfloat16, verify it against base and adapter, and take it back."""
    import regraft
    from merging import toys

    base, adapter = toys.write_base(folder / "base"), toys.write_adapter(folder / "adapter")
    regraft.merge(base, adapter, folder / "out")
    regraft.unmerge(folder / "out", folder / "back")
    regraft.verify(folder / "out", base=base, adapters=[adapter])


def codes(folder: Path) -> None:
    """Put weights into codes, merge into them, and take that back."""
    import regraft
    from merging import toys

    base, adapter = toys.write_base(folder / "base"), toys.write_adapter(folder / "adapter")
    for to in ("nf4", "int8"):
        regraft.quantize(base, folder / to, to)
        for rounding in ("stochastic", "nearest"):
            out = folder / f"{to}-{rounding}"
            regraft.merge(folder / to, adapter, out, quantize="keep", rounding=rounding)
        regraft.unmerge(out, folder / f"{to}-back")


def norms(folder: Path) -> None:
    """Merge what needs norms of weights."""
    import regraft
    from merging import toys

    base = toys.write_base(folder / "base")
    factors = toys.dora(toys.Q0, toys.HIDDEN, toys.HIDDEN)
    dora = toys.write_adapter(folder / "dora", factors, target_modules=["q_proj"], use_dora=True)
    regraft.merge(base, dora, folder / "out")


JOBS: tuple[Callable[[Path], None], ...] = (float32, codes, norms, bfloat16)
"""In an order in which every second of them takes half of the time."""


def compile_all(processes: int) -> None:
    """Compile what nearly all tests need; does nothing where something is compiled already."""
    import regraft

    package = Path(regraft.__file__).parent
    if any((package / "deltas").rglob("*.nbc")):
        return
    paths = os.pathsep.join([str(package.parent), str(TESTS)])
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(share), str(processes)],
            env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL,
        )
        for share in range(min(processes, len(JOBS)))
    ]  # fmt: skip
    for process in started:
        process.wait()  # what did not compile here says so in the test that needs it


if __name__ == "__main__":
    share, shares = int(sys.argv[1]), int(sys.argv[2])
    for job in JOBS[share::shares]:
        with tempfile.TemporaryDirectory() as place:
            job(Path(place))
