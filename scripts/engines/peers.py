"""The programs whose dialects are read and written: their own code, run by the tests of dialects.

Each has an environment, in which the tests that import it run; what they need of regraft is
installed there, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from engines.pipelines import PACKAGES as OF_DIFFUSERS
from engines.running import RUNNERS, converters, python_of

NAME = "dialects"
ROOT = Path(__file__).parents[2]
TESTS = "tests/adapters/dialects"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A program whose dialect is read and written.

    Attributes:
        dialects: their names.
        shown: the program's name.
        distribution: its package, whose version is shown.
        environment: the name of its environment.
        packages: what that is made of.
        tests: the files of tests that run its code.
        read, written: what these hold a merge of its adapter, and an adapter written for it,
            against.
        alone: what is installed without what it needs in turn: tinker-cookbook needs packages that
            are not for every system.
    """

    dialects: str
    shown: str
    distribution: str
    environment: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    read: str
    written: str
    alone: tuple[str, ...] = ()


PEERS: tuple[Peer, ...] = (
    Peer("`mlx`", "mlx-lm", "mlx-lm", "dialect-mlx",
         ("mlx[cpu]", "mlx-lm==0.32.2", TORCH, "peft==0.21.2", "transformers==5.23.0"),
         ("test_mlx_peer.py",), "its live model", "its live model"),
    Peer("`torchtune`", "torchtune", "torchtune", "torchtune",
         (TORCH, "torchtune==0.6.1", "torchao==0.14.1"), ("test_torchtune_peer.py",),
         "its live model; its export to PEFT", "its live model"),
    Peer("`litgpt`", "LitGPT", "litgpt", "litgpt", (TORCH, "litgpt==0.5.13"),
         ("test_litgpt_peer.py",), "its live model; its own merge", "its live model"),
    Peer("`tinker`", "tinker-cookbook", "tinker-cookbook", "tinker",
         (TORCH, "tinker", "pyrage", "transformers==5.5.4"), ("test_tinker_peer.py",),
         "its export to PEFT; its own merge", "", alone=("tinker-cookbook==0.6.1",)),
    Peer("`kohya`, `diffusers`", "diffusers", "diffusers", "diffusers", OF_DIFFUSERS,
         ("test_images.py", "test_kohya_transformers.py"),
         "its live model; its conversion of checkpoints", "its live model"),
    Peer("`gguf`", "llama.cpp", "xllamacpp", "llama.cpp",
         next(each.packages for each in RUNNERS if each.name == "llama.cpp"), ("test_gguf.py",),
         "its server; its converter", "its server"),
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What the tests of a peer gave: its name and version, and how many passed and did not."""

    shown: str
    version: str
    passed: int
    failed: int
    skipped: int

    @property
    def is_right(self) -> bool:
        """Whether tests ran, and none failed."""
        return self.passed > 0 and not self.failed

    @property
    def text(self) -> str:
        """A cell of the table."""
        said = [f"{self.passed} tests" if self.passed else "**none ran**"]
        said += [f"**{self.failed} failed**"] if self.failed else []
        said += [f"{self.skipped} not run"] if self.skipped else []
        return ", ".join(said)


def show(root: Path, given: Mapping[str, str], folder: Path) -> list[Ran]:
    """Run the tests of every peer, each in its environment.

    Args:
        root: where environments are made.
        given: Pythons that are there, by the name of an environment.
        folder: where the tests' reports are written.
    """
    return [_run(peer, root, given, folder) for peer in PEERS]


def _run(peer: Peer, root: Path, given: Mapping[str, str], folder: Path) -> Ran:
    report, more = folder / f"{peer.environment}.xml", dict[str, str]()
    if peer.environment == "llama.cpp":  # is asked by tests that run here
        own = python_of(peer.environment, peer.packages, root, given)
        python = Path(sys.executable)
        more = {"REGRAFT_LLAMA_CPP_PYTHON": str(own),
                "REGRAFT_LLAMA_CPP_SOURCE": str(converters(root))}  # fmt: skip
    else:
        packages = (*peer.packages, *_own_packages(), "pytest")
        own = python = python_of(peer.environment, packages, root, given, alone=peer.alone)
    command = [str(python), "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider",
               *(f"{TESTS}/{name}" for name in peer.tests)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"} | more
    report.unlink(missing_ok=True)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if not report.exists():
        raise RuntimeError(f"{peer.shown}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return _counted(peer, report, _version(peer, own))


def _own_packages() -> list[str]:
    """Return what regraft itself needs, as pyproject.toml says."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages: list[str] = said["project"]["dependencies"]
    return packages


def _counted(peer: Peer, report: Path, version: str) -> Ran:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return Ran(peer.shown, version, total - skipped - failed, failed, skipped)


def _version(peer: Peer, python: Path) -> str:
    asked = f"from importlib.metadata import version; print(version({peer.distribution!r}))"
    done = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def table(ran: Sequence[Ran], root: Path) -> list[str]:
    """Return the lines of the table, of this run and of those before it."""
    file = root / "peers.json"
    before = [Ran(**each) for each in json.loads(file.read_text())] if file.exists() else []
    by_name = {each.shown: each for each in (*before, *ran)}
    file.write_text(json.dumps([asdict(each) for each in by_name.values()], indent=1))
    lines = ["| dialect | program | reading it, held against | writing it, against | shown by |",
             "|---|---|---|---|---|"]  # fmt: skip
    for peer in PEERS:
        if (found := by_name.get(peer.shown)) is not None:
            cells = (peer.dialects, f"{peer.shown} {found.version}", peer.read, peer.written,
                     found.text)  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines
