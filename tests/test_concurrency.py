"""Threads that share work: what they wait for comes, or all of them end."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from regraft.concurrency import (
    WAITING_FOR_DISK,
    Abandoned,
    MemoryGate,
    Sequencer,
    available_cores,
    default_threads,
    for_each,
)

SHORT = 0.002
"""Seconds in which another thread comes along."""


# -- how many --------------------------------------------------------------------------------------


def test_python_is_asked_for_cores_where_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 5, raising=False)
    assert available_cores() == 5
    assert default_threads() == 5 + WAITING_FOR_DISK


def test_else_the_cores_are_those_that_the_process_is_bound_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 7}, raising=False)
    assert available_cores() == 3


@pytest.mark.parametrize(("there", "expected"), [(6, 6), (None, 1)])
def test_other_systems_say_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, there: int | None, expected: int
) -> None:
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    assert available_cores() == expected


# -- threads ---------------------------------------------------------------------------------------


def test_every_item_is_worked_on_once_with_the_memory_of_its_thread() -> None:
    seen: list[tuple[int, int]] = []
    for_each(
        range(200), lambda item, memory: seen.append((item, memory)), 4, memory=threading.get_ident
    )
    assert sorted(item for item, _ in seen) == list(range(200))
    assert len({memory for _, memory in seen}) <= 4


def test_items_are_taken_one_by_one_and_not_before_a_thread_is_free() -> None:
    taken, done = 0, 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(50):
            assert taken - done <= 3
            taken += 1
            yield number

    lock = threading.Lock()

    def work(_: int, __: None) -> None:
        nonlocal done
        with lock:
            done += 1

    for_each(items(), work, 3, memory=lambda: None)
    assert taken == done == 50


def test_the_first_error_ends_all_and_is_raised() -> None:
    order, done = Sequencer(), list[int]()

    def work(number: int, _: None) -> None:
        if number == 3:
            time.sleep(SHORT)
            raise OSError("no such disk")
        with order.turn(number):  # from the fourth on, it never comes
            done.append(number)

    with pytest.raises(OSError, match="no such disk"):
        for_each(range(100), work, 4, memory=lambda: None, stop=order.fail)
    assert done == [0, 1, 2]
    assert not any(t.name.startswith("regraft") for t in threading.enumerate())


def test_an_error_of_the_items_is_raised_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second one")

    with pytest.raises(ValueError, match="the second one"):
        for_each(items(), lambda *_: None, 2, memory=lambda: None)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C be heard, which what started the tests may have turned off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_is_raised_once_all_threads_have_ended() -> None:
    underway, done = list[int](), list[int]()

    def work(number: int, _: None) -> None:
        underway.append(number)
        for _ in range(3 * (number == 20)):
            _thread.interrupt_main()
            time.sleep(10 * SHORT)
        time.sleep(SHORT / 10)
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        for_each(range(5000), work, 3, memory=lambda: None)
    assert sorted(done) == sorted(underway)
    assert len(done) < 5000


def test_an_interrupt_may_fall_into_the_start_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    start, done = threading.Thread.start, list[int]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    def work(number: int, _: None) -> None:
        time.sleep(SHORT)
        done.append(number)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for_each(range(5000), work, 3, memory=lambda: None)
    count = len(done)
    time.sleep(2 * SHORT)
    assert len(done) == count < 5000


@pytest.mark.parametrize("granted", [0, 1])
def test_fewer_threads_do_all_of_it(monkeypatch: pytest.MonkeyPatch, granted: int) -> None:
    left, start = iter(range(granted)), threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    done: list[int] = []
    for_each(range(20), lambda item, _: done.append(item), 4, memory=lambda: None)
    assert sorted(done) == list(range(20))


# -- memory ----------------------------------------------------------------------------------------


def test_no_more_is_inside_than_there_is_room_for() -> None:
    gate, lock = MemoryGate(10), threading.Lock()
    inside, most = 0, list[int]()

    def work(size: int, _: None) -> None:
        nonlocal inside
        with gate.holding(size):
            with lock:
                inside += size
                most.append(inside)
            time.sleep(SHORT / 10)
            with lock:
                inside -= size

    for_each([4, 3, 5, 2, 6, 1] * 10, work, 8, memory=lambda: None)
    assert max(most) <= 10
    assert max(most) > 6


def test_one_alone_may_be_larger_than_the_room() -> None:
    gate = MemoryGate(10)
    with gate.holding(1000):
        pass
    gate.enter(11)
    gate.fail()
    with pytest.raises(Abandoned):
        gate.enter(1)


# -- order -----------------------------------------------------------------------------------------


def test_turns_come_in_the_order_of_the_numbers() -> None:
    order, seen = Sequencer(), list[int]()

    def work(number: int, _: None) -> None:
        time.sleep(SHORT * (number % 3) / 5)
        with order.turn(number):
            seen.append(number)

    for_each(range(100), work, 6, memory=lambda: None)
    assert seen == list(range(100))


def test_after_a_turn_that_failed_there_is_none() -> None:
    order = Sequencer()
    with pytest.raises(OSError), order.turn(0):
        raise OSError
    order.fail()
    with pytest.raises(Abandoned), order.turn(1):
        pass
