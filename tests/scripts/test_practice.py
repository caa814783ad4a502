"""The lists of ``make practice``: some cases of each are right, and the docs count these lists."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("_what_is_there_is_frozen")

ROOT = Path(__file__).parents[2]

SOME = {
    "PEFT's models and configs": ("llama, dora", "gpt2, token rows", "t5, plain", "conv2d, plain"),
    "adapters together on these models": ("PEFT's MLP, heads saved, rows",),
    "Trainer": ("gradient accumulation", "resumed from a checkpoint"),
    "serving": (
        "generate: beams",
        "rows",
        "exported by torch.export",
        "threads",
        "merged in memory, and taken back",
    ),
}


@pytest.fixture
def practice(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("practice.page")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name"), [(g, name) for g, names in SOME.items() for name in names]
)
def test_some_of_each_list_are_right(practice: Any, group: str, name: str) -> None:
    outcome_of = importlib.import_module("practice.outcome").outcome_of
    (case,) = (case for case in practice.GROUPS[group]() if case.name == name)
    outcome = outcome_of(group, case)
    assert (outcome.kind, outcome.message) == ("right", "")


@pytest.mark.usefixtures("practice")
def test_an_untyped_error_and_another_answer_are_told_apart() -> None:
    outcome = importlib.import_module("practice.outcome")

    def crash() -> None:
        raise KeyError("x")

    def wrong() -> None:
        outcome.require(False, "other tokens")

    kinds = [outcome.outcome_of("g", outcome.Case("c", attempt)).kind for attempt in (crash, wrong)]
    assert kinds == ["crashed", "wrong"]


def test_the_counts_in_the_docs_are_of_these_lists(practice: Any) -> None:
    text = practice.PAGE.read_text(encoding="utf-8")
    block = text.partition(practice.BEGIN)[2].partition(practice.END)[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in block.split("\n")[3:-1]]
    found = {group: str(len(list(cases()))) for group, cases in practice.GROUPS.items()}
    assert dict(rows) == found, "run: make practice"


def test_names_are_told_apart(practice: Any) -> None:
    for cases in practice.GROUPS.values():
        names = [case.name for case in cases()]
        assert len(set(names)) == len(names)
