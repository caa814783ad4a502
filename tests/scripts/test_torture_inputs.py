"""What changes inputs while they are read finds mixtures, and there are none."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from regraft.formats.files.watching import Watch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def torture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module, run in a folder of its own."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("torture.inputs")
    monkeypatch.chdir(tmp_path)  # which is gone back from afterwards, too
    return module


def test_a_change_in_the_middle_is_refused_and_one_that_is_not_is_found(
    torture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = torture.Bench(tmp_path)
    old, reads = bench.undisturbed(torture.VERBS["merge"])
    assert {"base/model.safetensors", "adapter/adapter_config.json"} <= reads.files
    case = ("merge", "base/model.safetensors", torture.with_old_times)
    middle = range(reads.count // 2, reads.count, 2)
    assert bench.disturbed(*case, middle[0], old) == ("changed", "")
    monkeypatch.setattr(Watch, "problems", lambda _: [])
    assert any(bench.disturbed(*case, at, old) == ("new", "made a mixture") for at in middle)
