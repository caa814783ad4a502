"""A model with adapters attached answers as PEFT's live model does, and is otherwise untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from faithful.cases import ULP_FLIPS
from faithful.harness import Case, Workshop, assert_visible
from regraft import Adapters, attach
from regraft.testing import zoo
from runtime.live import assert_same_state, distance, no_trace, state_of, tree_of

TOLERANCE = 5e-5
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


def assert_attached(case: Case, workshop: Workshop, expected: np.ndarray) -> None:
    """Attach the case's adapters, compare with the live model, and detach them.

    Args:
        case: the case.
        workshop: has its files.
        expected: the live model's logits.
    """
    folder = workshop.base(case.architecture, case.dtype, case.sharded)
    folders, inputs = workshop.adapters(case), case.example_inputs()
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
