"""Make the digests as other x86 processors would, in child processes, and print a table.

    PYTHONPATH=scripts python -m digests.processors [--brief] [--only TEXT]

numba compiles for the kind that is named, and numpy leaves out the instructions that it lacks.
A kind with instructions that this machine lacks is left out. It ends with 1 if a digest differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from llvmlite import binding


@dataclass(frozen=True)
class Kind:
    """A kind of processor.

    Attributes:
        name: LLVM's.
        needs: instructions that it has beyond the oldest x86-64.
        openblas: the kernels that OpenBLAS takes for it.
        numpy_plain: whether numpy has to leave out all that it has beside its baseline.
    """

    name: str
    needs: tuple[str, ...]
    openblas: str
    numpy_plain: bool


_V3 = ("avx2", "fma", "f16c", "bmi2")
KINDS = (
    Kind("x86-64", (), "Prescott", numpy_plain=True),
    Kind("nehalem", ("sse4.2",), "Nehalem", numpy_plain=True),
    Kind("sandybridge", ("avx",), "Sandybridge", numpy_plain=True),
    Kind("haswell", _V3, "Haswell", numpy_plain=False),
    Kind("znver3", (*_V3, "sha"), "Zen", numpy_plain=False),
    Kind("skylake-avx512", (*_V3, "avx512f", "avx512dq"), "SkylakeX", numpy_plain=False),
)


def environment(kind: Kind, cache: Path) -> dict[str, str]:
    """Return the environment of a process that takes its processor for one of a kind."""
    found = os.environ | {
        "NUMBA_CPU_NAME": kind.name, "NUMBA_CPU_FEATURES": ",".join(f"+{n}" for n in kind.needs),
        "NUMBA_CACHE_DIR": str(cache), "OPENBLAS_CORETYPE": kind.openblas,
    }  # fmt: skip
    if kind.numpy_plain:
        extensions = np.show_config(mode="dicts")["SIMD Extensions"]
        found["NPY_DISABLE_CPU_FEATURES"] = " ".join(extensions["found"])
    return found


def _outcome(kind: Kind, arguments: list[str]) -> tuple[bool, str]:
    """Return whether all digests are as expected, and the last line that says so."""
    lacking = [name for name in kind.needs if not binding.get_host_cpu_features().get(name)]
    if lacking:
        return True, f"left out: this machine lacks {', '.join(lacking)}"
    with tempfile.TemporaryDirectory() as cache:
        made = subprocess.run(
            [sys.executable, "-m", "digests", *arguments], env=environment(kind, Path(cache)),
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    lines = made.stdout.splitlines() or [f"ended with {made.returncode}"]
    return made.returncode == 0, lines[-1]


def main() -> int:
    """Run the command line; return its exit code."""
    right = True
    for kind in KINDS:
        good, said = _outcome(kind, sys.argv[1:])
        right = right and good
        print(f"{kind.name:16}{said}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
