"""Attached adapters whose truth is computed by hand; the others are in tests/faithful."""

from __future__ import annotations

import pytest

from faithful.harness import Case, Workshop, expected_logits
from faithful.test_exceptions import BY_HAND
from runtime.attached import assert_attached


@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.id)
def test_an_attached_model_answers_as_it_should(case: Case, workshop: Workshop) -> None:
    folder = workshop.base(case.architecture, case.dtype, case.sharded)
    expected = expected_logits(
        case, workshop, folder, workshop.adapters(case), case.example_inputs()
    )
    assert_attached(case, workshop, expected)
