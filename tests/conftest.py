"""What holds for all tests: kernels are those of the sources, threads are few, no disk is awaited,
and each run has a folder of its own for temporary files.

Compiled kernels that are older than their sources are removed before anything runs: numba looks
only at the file that a compiled function is in, and not at what it is made of.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import tempfile
from collections import Counter
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import regraft
from kernels import compile_all
from temp_root import TempRoot, place_of_files, remove_left_over

PACKAGE = Path(regraft.__file__).parent

# Bytecode is kept beside the sources, as kernels are, for the workers and for every process that a
# test starts: without, each of them compiles all of regraft, and each run all the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tests share the cores with each other, and waking a second thread costs more than the models do.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # counts if it is set before torch is imported
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # transformers starts four for each model

# What one test reads is not known to another, nor to the user's own work.
os.environ["REGRAFT_CACHE"] = ""

if not Path("/dev/nvidiactl").exists():
    # Without CUDA triton's kernels are interpreted. It asks once, when it is imported by whomever.
    os.environ.setdefault("TRITON_INTERPRET", "1")


class _AsWritten(SourceFileLoader):
    """Finds and loads bitsandbytes' functions such that they run as they are written.

    They ask torch to compile them, and go without where it cannot: it would compile them anew for
    every size up to the eighth, and its compiler takes a fifth of the time of all imports.
    """

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "bitsandbytes.backends.default.ops":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = cls(name, spec.origin)
        return spec

    def exec_module(self, module: ModuleType) -> None:
        import torch

        with mock.patch.object(torch, "compile", side_effect=NotImplementedError):
            super().exec_module(module)


TEMP_ROOT = pytest.StashKey[TempRoot]()


def pytest_configure(config: pytest.Config) -> None:
    """Remove stale kernels, and let files be flushed without waiting for the disk."""
    sys.meta_path.insert(0, _AsWritten)
    # pytest goes without its plugin for logging, which hangs handlers on hundreds of loggers six
    # times a test; no test looks at them. Without any handler, loggers would print warnings.
    logging.getLogger().addHandler(logging.NullHandler())
    os.fsync = os.fstat  # fails for what is no open file, too; nobody cuts the power meanwhile
    _remove_stale_kernels()
    processes = len(getattr(config.option, "tx", None) or ())
    if processes > 1:  # in the process that starts the workers of pytest-xdist
        compile_all(processes)
    if config.option.basetemp is None:  # the workers of pytest-xdist are given the one of the run
        parent = place_of_files()
        for place in {parent, Path(tempfile.gettempdir())}:
            remove_left_over(place)
        config.stash[TEMP_ROOT] = TempRoot(parent)
        config.option.basetemp = str(config.stash[TEMP_ROOT].path / "run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of each parametrized test but its first: the fast tests go without them.

    Files with the most slow tests come first, so that none of them is left for the end.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    seen = set[str]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in seen:
            item.add_marker("further")
        seen.add(name)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the run's temporary files."""
    if (root := config.stash.get(TEMP_ROOT, None)) is not None:
        root.remove()


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Look for no garbage while all is imported: nearly nothing is, and looking takes an eighth."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave out of all garbage collections what was imported so far: millions of objects."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def _what_is_there_is_frozen() -> None:
    """Leave out of all garbage collections what is there by now: some libraries ask for many."""
    gc.collect()
    gc.freeze()


def _remove_stale_kernels() -> None:
    """Several workers may be at it at once."""
    ground = _newest(PACKAGE / "numerics")
    for room in (PACKAGE / "deltas", PACKAGE / "quant"):
        newest = max(ground, _newest(room))
        for path in room.rglob("__pycache__/*.nb[ic]"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < newest:
                    path.unlink()


def _newest(room: Path) -> float:
    return max(path.stat().st_mtime for path in room.rglob("*.py"))
