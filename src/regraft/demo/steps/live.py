"""The adapters on a running model: switched, mixed in a batch, merged and un-merged in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import blake3

import regraft
from regraft.demo.state import DemoFolder
from regraft.demo.steps.answers import Asker
from regraft.demo.steps.compare import Logits
from regraft.demo.steps.data import Example
from regraft.demo.steps.lessons import LESSONS
from regraft.runtime.in_place.weights import bytes_of

Answers = dict[str, list[str]]
"""By the adapter's name, its answer to each sentence."""


@dataclass(frozen=True)
class Switched:
    """What one base answered, alone and with each adapter.

    Attributes:
        base: its own answers.
        adapters: the adapters' answers.
        switch_seconds: mean time to switch.
    """

    base: list[str]
    adapters: Answers
    switch_seconds: float


@dataclass(frozen=True)
class InMemory:
    """What a merge into the running model gave.

    Attributes:
        answers: of the merged model.
        restored: whether every bit of the base was back afterwards.
        tensors: how many tensors were compared for that.
        changed: how many of them the merge had changed.
        undo_bytes: what was kept for the way back.
        merge_seconds, unmerge_seconds: what it took.
    """

    answers: list[str]
    restored: bool
    tensors: int
    changed: int
    undo_bytes: int
    merge_seconds: float
    unmerge_seconds: float


class LiveModel:
    """The base in memory, once, with every adapter of the demo attached.

    Args:
        base: its folder.
        folder: where the adapters are.
        four_bits: whether the base is put into NF4.

    Attributes:
        nbytes: memory of the base's weights.
        load_seconds: time to read and attach all adapters.
    """

    def __init__(self, base: Path, folder: DemoFolder, *, four_bits: bool = False) -> None:
        self._asker = Asker(base, four_bits=four_bits)
        self.nbytes = sum(each.nbytes for each in _distinct(self._asker.model))
        start = time.perf_counter()
        self._adapters = regraft.attach(self._asker.model)
        for lesson in LESSONS:
            self._adapters.load_adapter(folder.adapter(lesson.name), lesson.name)
        self.load_seconds = time.perf_counter() - start

    def switched(self, sentences: Sequence[str]) -> Switched:
        """Ask the base, and then each adapter in turn."""
        seconds: list[float] = []
        base = self._asker.answers(sentences)
        answers: Answers = {}
        for lesson in LESSONS:
            seconds.append(_timed(partial(self._adapters.set_adapter, lesson.name)))
            answers[lesson.name] = self._asker.answers(sentences)
        seconds.append(_timed(partial(self._adapters.set_adapter, None)))
        return Switched(base, answers, sum(seconds) / len(seconds))

    def by_row(self, adapters: Sequence[str | None], sentences: Sequence[str]) -> list[str]:
        """Ask in one batch, each row of which has an adapter of its own, or none."""
        with self._adapters.rows(adapters):
            return self._asker.answers(sentences)

    def all_by_row(self, sentences: Sequence[str]) -> Answers:
        """Ask every adapter every sentence, all in one batch."""
        count = len(sentences)
        names = [lesson.name for lesson in LESSONS for _ in sentences]
        answers = self.by_row(names, [*sentences] * len(LESSONS))
        return {
            lesson.name: answers[at * count : (at + 1) * count] for at, lesson in enumerate(LESSONS)
        }

    def logits(self, name: str, examples: list[Example]) -> Logits:
        """Return the logits with one adapter; see :meth:`Asker.logits`."""
        with self._adapters.using(name):
            return self._asker.logits(examples)

    def merged_in_memory(self, name: str, sentences: Sequence[str]) -> InMemory:
        """Merge an adapter into the weights, ask, take it out, and compare every bit."""
        before = _digests(self._asker.model)
        report = self._adapters.merge_adapter(name)
        merged, answers = _digests(self._asker.model), self._asker.answers(sentences)
        unmerge_seconds = _timed(self._adapters.unmerge_adapter)
        return InMemory(
            answers=answers,
            restored=_digests(self._asker.model) == before,
            tensors=len(before),
            changed=sum(merged[each] != before[each] for each in before),
            undo_bytes=report.undo_bytes,
            merge_seconds=report.seconds,
            unmerge_seconds=unmerge_seconds,
        )


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _digests(model: Any) -> dict[str, bytes]:
    """Return the digest of every tensor's bytes, by its name in ``state_dict()``."""
    return {
        name: blake3.blake3(bytes_of(tensor.contiguous()).data).digest()
        for name, tensor in model.state_dict().items()
    }


def _distinct(model: Any) -> list[Any]:
    """Return the model's tensors, each once, ties or not."""
    return [*model.parameters(), *model.buffers()]
