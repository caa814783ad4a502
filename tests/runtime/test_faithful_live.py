"""A model with adapters attached answers as PEFT's live model does, and is otherwise untouched.

The cases are those that merges of files are tested with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faithful.cases import ULP_FLIPS
from faithful.harness import Case, Workshop, assert_visible, expected_logits
from faithful.test_architectures import CASES
from faithful.test_exceptions import BY_HAND
from regraft import Adapters, attach
from regraft.testing import zoo
from runtime.live import assert_same_state, distance, no_trace, state_of, tree_of

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of their range: some roundings of float32."""


def base_of(case: Case, folder: Path) -> Any:
    """Return the case's base in memory, as it was when the adapter went on."""
    model = zoo.load_base(folder)
    if case.prepare is not None:
        case.prepare(model)
    return model.eval()


def attached(model: Any, folders: list[Path], weights: tuple[float, ...] | None) -> Adapters:
    """Attach one adapter, or several with their weights."""
    adapters = attach(model, folders[0], "a0")
    names = [f"a{number}" for number in range(len(folders))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        adapters.load_adapter(folder, name)
    if weights is not None:
        adapters.set_adapter(dict(zip(names, weights, strict=True)))
    elif len(names) > 1:
        adapters.set_adapter(names)
    return adapters


def tolerance_of(case: Case) -> float:
    """Return a case's tolerance.

    It is wide where PEFT rounds what PiSSA or OLoRA leave of a bfloat16 base to bfloat16 again; a
    live model's weights stay as they are, so nothing is rounded.
    """
    return 1e-2 if case.tolerance >= ULP_FLIPS else TOLERANCE


@pytest.mark.parametrize("case", [*CASES, *BY_HAND], ids=lambda case: case.id)
def test_an_attached_model_answers_as_the_live_one(case: Case, workshop: Workshop) -> None:
    folder = workshop.base(case.architecture, case.dtype, case.sharded)
    folders, inputs = workshop.adapters(case), case.example_inputs()
    expected = expected_logits(case, folder, folders, inputs)
    model = base_of(case, folder)
    plain, state, tree = zoo.logits(model, inputs), state_of(model), tree_of(model)
    assert_visible(expected, plain)
    with no_trace(model):
        adapters = attached(model, folders, case.weights)
        found = zoo.logits(model, inputs)
        assert_same_state(model, state)
        assert tree_of(model) == tree
        with adapters.disable_adapter():
            assert np.array_equal(zoo.logits(model, inputs), plain)
        assert np.array_equal(zoo.logits(model, inputs), found)
        assert adapters.detach() is model
    assert np.array_equal(zoo.logits(model, inputs), plain)
    assert distance(found, expected) <= tolerance_of(case)
