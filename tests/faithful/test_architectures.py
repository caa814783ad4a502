"""Merged checkpoints, and models with adapters attached, answer as PEFT's live model did."""

from __future__ import annotations

import pytest

from faithful import cases, embedding_cases
from faithful.harness import Case, Workshop, assert_faithful
from runtime.attached import assert_attached

CASES = [
    *cases.everywhere(),
    *cases.TARGETS,
    *cases.INITS,
    *cases.BIASES,
    *cases.LORA_BIASES,
    *cases.EXPERTS,
    *cases.CONVS,
    *cases.SEVERAL,
    *embedding_cases.EMBEDDINGS,
    *embedding_cases.TIED,
    *embedding_cases.WHOLE_MODULES,
    *embedding_cases.TOKEN_ROWS,
    *embedding_cases.GROWN_VOCABULARIES,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_merged_and_attached_models_answer_as_the_live_one(case: Case, workshop: Workshop) -> None:
    expected = assert_faithful(case, workshop)
    assert_attached(case, workshop, expected)
