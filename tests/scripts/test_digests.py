"""What regraft writes today has the digests that are expected; `make digests` holds all."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("digests.__main__")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_outputs_of_some_cases_have_the_expected_digests(digests: Any, tmp_path: Path) -> None:
    wanted = digests.chosen((), brief=True)
    assert len(wanted) > 30
    found = digests.run(wanted, tmp_path.resolve())
    assert digests.differing(found, wanted) == []


def test_another_byte_is_noticed(digests: Any, tmp_path: Path) -> None:
    wanted = digests.chosen(["Conv1D"], brief=True)
    found = digests.run(wanted, tmp_path.resolve())
    name = next(name for name in found if name.endswith("merged/model.safetensors"))
    assert digests.differing(found | {name: "0" * 32}, wanted) == [name]
    del found[name]
    assert digests.differing(found, wanted) == [name]


def test_files_count_without_what_differs_from_run_to_run(digests: Any, tmp_path: Path) -> None:
    del digests
    digesting = importlib.import_module("digests.digesting")
    folder = tmp_path / "regraft"
    folder.mkdir()

    def digest(receipt: dict[str, Any]) -> str:
        (folder / "receipt.json").write_text(json.dumps(receipt))
        return str(dict(digesting.digests_of(tmp_path, tmp_path))["regraft/receipt.json"])

    one = {"created": "now", "output": str(tmp_path), "tensors": [{"changed": 3, "norm": 1.0}]}
    other = {"created": "then", "output": "", "tensors": [{"changed": 3, "norm": 1.0 + 1e-9}]}
    assert digest(one) == digest(other)
    other["tensors"] = [{"changed": 4, "norm": 1.0}]
    assert digest(one) != digest(other)
