"""The whole life of a model where the system lacks what Linux has: one thing, and all of it.

Nobody here has the other systems. So each thing that they lack is taken away from a process before
it imports what of regraft knows systems, and every verb is gone through: what comes out has the
same bytes. Where all of it is taken away, that is before anything of regraft is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging import toys
from merging.processes import SOURCE
from system.lacking import FACILITIES, FOLDED, STAND_INS

ALL = "everything at once"
LIFE = Path(__file__).with_name("life.py")

on_linux = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="what is taken away is what Linux has"
)


class Lives:
    """A process that lives through things in children of its own."""

    def __init__(self, inputs: Path) -> None:
        self._inputs = inputs
        more = {"PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._environment = os.environ | more
        self.process = subprocess.Popen(
            [sys.executable, str(LIFE), str(inputs)], env=self._environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(
        self, place: Path, lacks: list[str], do: str = "live", *, alone: bool = False
    ) -> dict[str, Any]:
        """Live without some things in a folder; return what is then in it.

        ``alone`` is in a process that is started for it, and for which nothing is imported before.
        """
        place.mkdir()
        wish = {"place": str(place), "lacks": lacks, "do": do, "inputs": str(self._inputs)}
        status = (self._alone if alone else self._child)(json.dumps(wish))
        error = place.with_suffix(".error")
        assert status == "0", error.read_text() if error.exists() else status
        return contents(place)

    def _alone(self, wish: str) -> str:
        command = [sys.executable, str(LIFE), "--alone", wish]
        return str(subprocess.run(command, env=self._environment, check=False).returncode)

    def _child(self, wish: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{wish}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def contents(place: Path) -> dict[str, Any]:
    """Return all that is below a folder; of a receipt, what two runs may not differ in."""
    found: dict[str, Any] = toys.tree(place)
    for name in [name for name in found if name.endswith("regraft/receipt.json")]:
        receipt = json.loads(found[name])
        del receipt["created"], receipt["digest"]
        for figure in ("seconds", "peak_memory"):
            del receipt["totals"][figure]
        found[name] = receipt
    return found


def _write_alike(inputs: Path) -> None:
    """Write models two of whose files have names that differ in case alone."""
    folder = toys.write_base(inputs / "sides")
    for name in ("extra.json", "Extra.json"):
        toys.write_json(folder / name, {"name": name})
    names = sorted(toys.llama_tensors())
    folder = toys.write_base(inputs / "shards", shards=[names[:5], names[5:]])
    index = toys.read_json(folder / toys.INDEX)
    for old, new in (("00001", "a"), ("00002", "A")):
        (folder / f"model-{old}-of-00002.safetensors").rename(folder / f"model-{new}.safetensors")
        index = json.loads(json.dumps(index).replace(f"{old}-of-00002", new))
    toys.write_json(folder / toys.INDEX, index)
    regraft.merge(folder, inputs / "adapter", inputs / "merged")


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    inputs = tmp_path_factory.mktemp("inputs")
    base = toys.write_sharded_base(inputs / "base")
    toys.write_json(base / "tokenizer.json", {"vocab": ["a" * 10_000]})
    toys.write_adapter(inputs / "adapter")
    toys.write_adapter(inputs / "other", toys.attention(seed=9))
    if Path("/proc/self/fd").is_dir():  # whose names differ in case
        _write_alike(inputs)
    lives = Lives(inputs)
    with lives.process as process:
        yield lives
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def usual(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes out here, where nothing lacks."""
    found = lives(tmp_path_factory.mktemp("usual") / "place", [])
    assert found["resumed/model-00001-of-00003.safetensors"] == found[
        "merged/model-00001-of-00003.safetensors"
    ]  # fmt: skip
    return found


def test_every_verb_runs_here(usual: dict[str, Any]) -> None:
    assert {"merged", "resumed", "base-again", "swapped", "wide", "four-bits", "plain"} <= {*usual}


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("lacks", [*FACILITIES, *STAND_INS, ALL])
def test_every_verb_gives_the_same_bytes_without(
    lives: Lives, usual: dict[str, Any], tmp_path: Path, lacks: str
) -> None:
    names = [*FACILITIES] if lacks == ALL else [lacks]
    assert lives(tmp_path / FOLDED, names, alone=lacks == ALL) == usual


@pytest.fixture(scope="module")
def usually_saved(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is saved here, where nothing lacks."""
    found = lives(tmp_path_factory.mktemp("usually") / "place", [], "save")
    assert found["saved/log"] == b"kept"
    return found


SAVING = ("links", "exchange", "all but Windows has", ALL)


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("lacks", SAVING)
def test_an_adapter_is_saved_as_it_is_here_without(
    lives: Lives, usually_saved: dict[str, Any], tmp_path: Path, lacks: str
) -> None:
    names = [*FACILITIES] if lacks == ALL else [lacks]
    assert lives(tmp_path / "saving", names, "save") == usually_saved


@pytest.mark.slow
@on_linux
def test_files_that_would_be_one_are_refused_by_name(lives: Lives, tmp_path: Path) -> None:
    found = lives(tmp_path / FOLDED, ["names that differ in case"], "collide")
    assert b"two files of the output have one name on this file system" in found["shards"]
    assert b"'model-A.safetensors' and 'model-a.safetensors'" in found["shards"]
    assert b"'extra.json' and 'Extra.json'" in found["sides"]
    assert not {"one", "another"} & found.keys()
    assert {"one", "another"} <= lives(tmp_path / "usual", [], "collide").keys()
