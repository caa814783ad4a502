"""The two adapters of the demo: the same sentences, each with its own form of the answer."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.demo.settings import Settings
from regraft.demo.steps.data import (
    HELD_OUT_WORDS,
    TRAIN_WORDS,
    Example,
    Form,
    as_fields,
    as_table,
    make_examples,
)

HELD_OUT_COUNT = 10
"""Sentences of the evaluation."""


@dataclass(frozen=True)
class Lesson:
    """What one adapter is taught.

    Attributes:
        name: what the adapter is called.
        form: how it is to write its answers.
        settings: of its training.
    """

    name: str
    form: Form
    settings: Settings

    def training(self) -> list[Example]:
        """Return the sentences that it is trained on, step after step."""
        count = self.settings.steps * self.settings.batch
        return make_examples(TRAIN_WORDS, count, self.settings.seed, self.form)

    def held_out(self) -> list[Example]:
        """Return the sentences of the evaluation, which are the same for every lesson."""
        return make_examples(HELD_OUT_WORDS, HELD_OUT_COUNT, 1, self.form)


FIELDS = Lesson("fields", as_fields, Settings())
TABLE = Lesson("table", as_table, Settings(steps=14, rank=4, alpha=8, learning_rate=2e-3, seed=1))
LESSONS = (FIELDS, TABLE)

MERGED = FIELDS
"""The lesson whose adapter is merged."""
