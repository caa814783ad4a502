"""The executor, with jobs that are no merge: order, memory, ends and failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from regraft.concurrency import Sequencer
from regraft.merging.execution.executor import BATCH_BYTES, Run, execute_runs

SHORT = 0.001
"""Seconds in which another thread comes along."""


class Log:
    """What happened, in the order in which it did; and how much the jobs under way cost."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.accounted: list[tuple[str, int, bool]] = []
        self.ended: list[str] = []
        self.failed: set[str] = set()
        self.taken, self.most = 0, 0
        self.inside = threading.Lock()

    def take(self, cost: int) -> None:
        """Note that memory is taken, or given back."""
        with self.inside:
            self.taken += cost
            self.most = max(self.most, self.taken)


class Word(Run[int, list[str]]):
    """A job that puts together a word, letter by letter and in order."""

    def __init__(
        self, log: Log, word: str, cost: int = 1, broken: int | None = None, size: int = BATCH_BYTES
    ) -> None:
        self._log, self._word, self._cost, self._broken = log, word, cost, broken
        self._size = size
        self._order, self.written = Sequencer(), ""
        log.begun.append(word)

    @property
    def tiles(self) -> Sequence[int]:
        return range(len(self._word))

    @property
    def cost(self) -> int:
        return self._cost

    def size(self, tile: int) -> int:
        del tile
        return self._size

    def work(self, tile: int, memory: list[str]) -> None:
        memory.append(self._word[tile])
        if tile == 0:
            self._log.take(self._cost)
        time.sleep(SHORT * (tile % 3))
        if tile == self._broken:
            raise OSError(f"{self._word} has no letter {tile}")
        with self._order.turn(tile):
            self.written += memory[-1]

    def account(self, tile: int, *, last: bool) -> None:
        assert self._log.inside.acquire(blocking=False), "one call at a time"
        self._log.accounted.append((self._word, tile, last))
        self._log.inside.release()

    def finish(self) -> None:
        assert self.written == self._word
        self._log.take(-self._cost)
        self._log.ended.append(self._word)

    def fail(self) -> None:
        self._log.failed.add(self._word)
        self._order.fail()


WORDS = [f"{n:07b}" for n in range(40)]


def run(runs: Iterator[Word], threads: int = 6, room: int = 3) -> bool:
    """Execute; return whether what is shared was told to stop."""
    stopped = threading.Event()
    try:
        execute_runs(runs, threads, room=room, memory=list, stop=stopped.set)
    except OSError:
        assert stopped.is_set()
        raise
    return stopped.is_set()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_job_ends_once_after_all_its_tiles(threads: int) -> None:
    log = Log()
    assert not run((Word(log, word) for word in WORDS), threads)
    assert sorted(log.ended) == WORDS
    assert len(log.accounted) == sum(map(len, WORDS))
    assert {(word, tile) for word, tile, _ in log.accounted} == {
        (word, tile) for word in WORDS for tile in range(len(word))
    }
    of_each = {word: [last for w, _, last in log.accounted if w == word] for word in WORDS}
    assert all(lasts == [False] * 6 + [True] for lasts in of_each.values())


def test_jobs_are_begun_in_order_and_only_when_they_are_needed() -> None:
    log, ahead = Log(), list[int]()

    def words() -> Iterator[Word]:
        for word in WORDS:
            ahead.append(len(log.begun) - len(log.ended))
            yield Word(log, word)

    run(words(), threads=4, room=1000)
    assert log.begun == WORDS
    assert max(ahead) <= 4


def test_the_jobs_under_way_keep_to_the_room() -> None:
    log = Log()
    run(Word(log, word, cost=number % 4) for number, word in enumerate(WORDS))
    assert log.most == 3
    assert log.taken == 0


@pytest.mark.parametrize("size", [1, BATCH_BYTES // 5, BATCH_BYTES])
@pytest.mark.parametrize("costs", [(0,), (3,), (0, 3), (0, 0, 0, 2, 3), (1, 0, 3)])
def test_small_tiles_that_are_done_by_one_thread_keep_nobody_waiting(
    costs: tuple[int, ...], size: int
) -> None:
    log = Log()
    words = (Word(log, w, cost=costs[n % len(costs)], size=size) for n, w in enumerate(WORDS))
    run(words)
    assert (sorted(log.ended), log.begun) == (WORDS, WORDS)
    assert log.most == max(costs)
    assert log.taken == 0


def test_a_job_that_is_larger_than_the_room_is_alone() -> None:
    log = Log()
    run(Word(log, word, cost=100 if word == WORDS[20] else 1) for word in WORDS)
    assert sorted(log.ended) == WORDS
    assert log.most == 100


def test_an_error_wakes_all_and_ends_no_job_that_is_not_whole() -> None:
    log = Log()
    broken = (Word(log, w, broken=2 if w == WORDS[9] else None) for w in WORDS)
    with pytest.raises(OSError, match=f"{WORDS[9]} has no letter 2"):
        run(broken)
    assert WORDS[9] in log.failed
    assert not log.failed & set(log.ended)
    known = log.failed | set(log.ended)
    assert len(set(log.begun) - known) <= 1  # one may be begun just when the others are woken
    assert len(log.begun) < len(WORDS)
