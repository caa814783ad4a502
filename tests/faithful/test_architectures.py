"""A merged checkpoint answers as the live adapter model answered, on every architecture."""

from __future__ import annotations

import pytest

from faithful import cases, embedding_cases
from faithful.harness import Case, Workshop, assert_faithful

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
def test_merged_model_answers_as_the_live_one(case: Case, workshop: Workshop) -> None:
    assert_faithful(case, workshop)
