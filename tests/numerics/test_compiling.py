"""What numba keeps of compiled functions may be damaged, and is then made anew."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba
import pytest

from merging import toys
from regraft.numerics import compiling
from regraft.numerics.compiling import CompileCacheWarning
from regraft.numerics.listeners import while_compiling

SOURCE = """
from regraft.numerics.compiling import njit

@njit(cache=True, _nrt=False)
def double(x):
    return 2 * x

@njit(cache=True, _nrt=False)
def triple(x):
    return 3 * x
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which nothing is yet."""
    (tmp_path / "doubling.py").write_text(SOURCE)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_said", set())
    return tmp_path / "cache"


def load(cache: Path) -> ModuleType:
    """Import the function as a new process would."""
    spec = importlib.util.spec_from_file_location("doubling", cache.parent / "doubling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(cache: Path) -> tuple[int, int, list[str]]:
    """Return what the function gives, how often it came from the cache, and the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        double = load(cache).double
        value = double(21)
    said = [str(each.message) for each in told if each.category is CompileCacheWarning]
    return value, sum(double.stats.cache_hits.values()), said


def files(cache: Path, suffix: str) -> list[Path]:
    return sorted(cache.rglob(f"*.{suffix}"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "garbage": lambda path: path.write_bytes(b"\x00garbage" * 99),
    "one bit": flip,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_told_once_and_made_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str
) -> None:
    assert run(cache) == (42, 0, [])
    assert run(cache) == (42, 1, [])
    for path in files(cache, suffix):
        DAMAGE[damage](path)
    value, hits, said = run(cache)
    assert (value, hits) == (42, 0)
    if (damage, suffix) == ("a folder", "nbc"):  # numba finds it gone, and that it cannot be kept
        assert len(said) == 1
        return
    assert len(said) == 1
    assert "compiled again" in said[0]
    if damage != "a folder":
        monkeypatch.setattr(compiling, "_said", set())
        assert run(cache) == (42, 1, [])


def test_files_that_took_each_others_names_are_made_anew(cache: Path) -> None:
    """The code of one function would run in the place of another."""
    run(cache)
    assert load(cache).triple(5) == 15
    one, other = files(cache, "nbc")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    value, hits, said = run(cache)
    assert (value, hits, len(said)) == (42, 0, 1)


@pytest.mark.parametrize("setting", ["NUMBA_DISABLE_JIT=1", "NUMBA_NUM_THREADS=0"])
def test_settings_that_keep_numba_from_compiling_are_refused_by_name(
    tmp_path: Path, setting: str
) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "adapter")
    name, _, value = setting.partition("=")
    command = [sys.executable, "-m", "regraft", "merge", base, adapter, "-o", tmp_path / "out"]
    done = subprocess.run(
        command, env=os.environ | {name: value}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert name in done.stderr or "NUMBA_" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_as_numba_alone_writes_it_is_made_anew(cache: Path) -> None:
    run(cache)
    (index,) = files(cache, "nbi")
    index.write_bytes(pickle.dumps("0.50") + pickle.dumps(("stamp", {})))
    value, hits, said = run(cache)
    assert (value, hits, len(said)) == (42, 0, 1)
    assert "older version" in said[0]
    assert run(cache) == (42, 1, [])


@pytest.mark.slow
def test_a_cache_of_another_numba_is_made_anew_in_silence(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cache)
    with monkeypatch.context() as patch:
        patch.setattr(numba, "__version__", "0.50")
        assert run(cache) == (42, 0, [])
    assert run(cache) == (42, 0, [])
    assert run(cache) == (42, 1, [])


def test_where_nothing_can_be_kept_that_is_told_and_functions_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", refuse)
        value, _, said = run(cache)
    assert (value, len(said)) == (42, 1)
    assert "cannot be kept" in said[0]
    monkeypatch.setattr(compiling, "_said", set())
    monkeypatch.setattr(compiling._Files, "_open_for_write", refuse)
    value, _, said = run(cache)
    assert (value, len(said)) == (42, 1)
    assert "cannot be kept" in said[0]


def test_whoever_listens_is_told_before_a_function_is_compiled(cache: Path) -> None:
    told: list[str] = []
    with while_compiling(lambda: told.append("compiling")):
        run(cache)
        assert told == ["compiling"]
        run(cache)  # from the cache
    assert told == ["compiling"]
    for path in files(cache, "nbc"):
        path.unlink()
    run(cache)
    assert told == ["compiling"]  # nobody listens any more


LOADS = """
import sys
from doubling import double
from numba import njit
print(double(21), sum(double.stats.cache_hits.values()))
print("numba.cpython.setobj" in sys.modules)

@njit
def fourfold(x):
    return double(double(x))

print(fourfold(5))
"""


def test_what_is_loaded_needs_none_of_what_compiling_needs_and_may_be_compiled_against(
    cache: Path,
) -> None:
    path = os.pathsep.join([str(cache.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": path}
    command = [sys.executable, "-c", LOADS]
    for found in (["42", "0", "True", "20"], ["42", "1", "False", "20"]):
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert (told.stdout.split(), told.stderr) == (found, "")
