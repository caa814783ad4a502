"""After an interrupt a live model and its handle are as before a step, or as after it.

All steps of all operations, and many real signals, are tried by scripts/torture/interrupts.py; here
some of them.
"""

from __future__ import annotations

import _thread
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from regraft.merging.compute.step_inverse import Backwards
from regraft.merging.compute.step_math import StepMath
from regraft.runtime.whole import Turns, asked_to_stop, whole
from runtime.interrupts import OPERATIONS, Operation, World, at_every_point, at_random, bits_of

STRIDES = {"attach": 211, "load_adapter": 149, "load_adapter to train": 149, "add_adapter": 211,
           "merge_adapter": 113, "swap_adapter": 113, "set_adapter of mixes": 307,
           "rows": 149}  # fmt: skip
"""Of the operations with many steps each so many-th is tried."""


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Let interrupts be heard also where the tests run in the background, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, cached=False)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_interrupted_at_any_step(operation: Operation, cached: bool, tmp_path: Path) -> None:
    world, stride = World(tmp_path, cached=cached), STRIDES.get(operation.name, 23)
    points, wrong = at_every_point(world, operation, stride, random.randrange(stride))
    assert wrong == []
    assert points or operation.name == "pin"


@pytest.mark.parametrize("operation", OPERATIONS[:3], ids=lambda operation: operation.name)
def test_signals_at_random_moments(operation: Operation, world: World) -> None:
    heard, wrong = at_random(world, operation, 25, random.Random(0))
    assert wrong == []
    assert heard > 0


# -- failures --------------------------------------------------------------------------------------


def test_what_could_not_be_taken_back_is_said_and_can_be_taken_back_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))
    run = StepMath.run

    def fail(self: StepMath, *arguments: Any) -> None:
        if next(count) == 2:
            raise MemoryError("no more")
        run(self, *arguments)

    def fail_too(*_: Any) -> bool:
        raise MemoryError("still no more")

    with monkeypatch.context() as patched:
        patched.setattr(StepMath, "run", fail)
        patched.setattr(Backwards, "restore", fail_too)
        with pytest.raises(MemoryError):
            world.handle.merge_adapter("a")
    assert world.handle.merged_adapters == ["a"]
    assert bits_of(world.model) not in world.bits.values()
    with pytest.raises(regraft.UsageError, match="some weights are merged"):
        world.answer()
    with pytest.raises(regraft.UsageError, match="merged into the weights"):
        world.handle.merge_adapter("b")
    world.handle.unmerge_adapter()
    assert bits_of(world.model) == world.bits[()]
    world.check()


def test_two_threads_that_merge_at_once_are_one_merge_and_one_refusal(world: World) -> None:
    start, outcomes = threading.Barrier(2), list[str]()

    def work(name: str) -> None:
        start.wait()
        try:
            world.handle.merge_adapter(name)
            outcomes.append("merged")
        except regraft.UsageError:
            outcomes.append("refused")

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["merged", "refused"]
    world.check()
    world.handle.unmerge_adapter()
    assert bits_of(world.model) == world.bits[()]


def test_disabled_blocks_of_a_merge_nest(world: World) -> None:
    world.handle.merge_adapter("a")
    with world.handle.disable_adapter():
        assert world.handle.merged_adapters == []
        with world.handle.disable_adapter():
            assert world.is_answer([])
        assert world.is_answer([])
        with pytest.raises(regraft.UsageError, match="answers now"):
            world.handle.delete_adapter("a")
    assert world.handle.merged_adapters == ["a"]
    world.check()


# -- a whole step ----------------------------------------------------------------------------------


def test_a_step_gives_what_it_returns_or_raises() -> None:
    assert whole(lambda: 3) == 3
    with pytest.raises(KeyError, match="mine"):
        whole(lambda: {}["mine"])
    assert whole(lambda: whole(threading.current_thread)) is not threading.main_thread()


@torch.no_grad()
def test_a_step_computes_as_its_caller_does() -> None:
    assert whole(torch.is_grad_enabled) is False
    with torch.inference_mode():
        assert whole(torch.is_inference_mode_enabled) is True


def test_an_interrupt_is_raised_when_the_step_is_over_and_has_been_told() -> None:
    log: list[str] = []

    def work() -> None:
        asked = asked_to_stop()
        _thread.interrupt_main()
        deadline = time.monotonic() + 30
        while not asked() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        log.append("asked" if asked() else "not asked")

    with pytest.raises(KeyboardInterrupt):
        whole(work)
    assert log == ["asked"]


def test_who_waits_for_another_ones_step_can_be_interrupted() -> None:
    turns, began, stop = Turns(), threading.Event(), threading.Event()

    def long() -> None:
        began.set()
        stop.wait(30)

    other = threading.Thread(target=turns.whole, args=(long,))
    other.start()
    began.wait()
    threading.Timer(0.05, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        turns.whole(lambda: pytest.fail("it is not its turn"))
    stop.set()
    other.join()
