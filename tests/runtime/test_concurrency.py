"""Many threads and tasks use one model, each with adapters of its own."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from faithful.cases import TOY_CONVS, lora
from faithful.harness import Workshop
from regraft import Adapters, attach
from regraft.testing import zoo

THREADS = 16
CALLS = 10
CHOICES: list[Any] = ["a", "b", "c", None, {"a": 0.5, "c": -1.0}, ["a", "b"]]

CONFIGS = {
    "llama": [lora(), lora(["q_proj"], r=2), lora(["up_proj"], use_dora=True)],
    "toynet": [lora(TOY_CONVS), lora(["attention"], r=2), lora(["head", "embed"], r=3)],
}


def attached(architecture: str, workshop: Workshop) -> tuple[Any, Adapters, dict[str, Any]]:
    """Return a model with three adapters, and inputs."""
    base = workshop.base(architecture)
    model = zoo.load_base(base)
    adapters = attach(model)
    for name, config in zip("abc", CONFIGS[architecture], strict=True):
        adapters.load_adapter(workshop.adapter(base, config, seed=ord(name)), name)
    return model, adapters, zoo.example_inputs(architecture)


def answers_of(model: Any, adapters: Adapters, inputs: dict[str, Any]) -> list[np.ndarray]:
    """Return the answer of each choice, one after the other, all different."""
    answers = []
    for choice in CHOICES:
        with adapters.using(choice):
            answers.append(zoo.logits(model, inputs))
    assert len({answer.tobytes() for answer in answers}) == len(CHOICES)
    return answers


@contextmanager
def switching(adapters: Adapters) -> Iterator[None]:
    """Go on changing what answers by default, in another thread."""
    done = threading.Event()

    def switch() -> None:
        while not done.wait(0.001):
            for choice in CHOICES:
                adapters.set_adapter(choice)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONFIGS)
def test_no_thread_hears_another_ones_adapters(architecture: str, workshop: Workshop) -> None:
    model, adapters, inputs = attached(architecture, workshop)
    expected = answers_of(model, adapters, inputs)
    start = threading.Barrier(THREADS)

    def work(number: int) -> int:
        wrong, order = 0, np.random.default_rng(number)
        start.wait()
        for _ in range(CALLS):
            one, other = order.integers(0, len(CHOICES), 2)
            with adapters.using(CHOICES[one]):
                with adapters.using(CHOICES[other]):
                    inner = zoo.logits(model, inputs)
                outer = zoo.logits(model, inputs)
            wrong += not np.array_equal(inner, expected[other])
            wrong += not np.array_equal(outer, expected[one])
        return wrong

    with switching(adapters), ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(work, range(THREADS))) == 0


@pytest.mark.slow
def test_threads_may_have_rows_of_their_own(workshop: Workshop) -> None:
    model, adapters, inputs = attached("llama", workshop)

    def answer(rows: list[Any]) -> np.ndarray:
        with adapters.rows(rows):
            return zoo.logits(model, inputs)

    pairs = [[one, other] for one in CHOICES for other in CHOICES]
    expected = [answer(rows) for rows in pairs]
    with ThreadPoolExecutor(THREADS) as pool:
        for found, wanted in zip(pool.map(answer, pairs * 2), expected * 2, strict=True):
            assert np.array_equal(found, wanted)


@pytest.mark.slow
def test_tasks_that_take_turns_keep_their_adapters(workshop: Workshop) -> None:
    model, adapters, inputs = attached("llama", workshop)
    expected = answers_of(model, adapters, inputs)

    async def work(number: int) -> int:
        wrong = 0
        for turn in range(6):
            at = (number + turn) % len(CHOICES)
            with adapters.using(CHOICES[at]):
                await asyncio.sleep(0)
                wrong += not np.array_equal(zoo.logits(model, inputs), expected[at])
                found = await asyncio.to_thread(zoo.logits, model, inputs)
                wrong += not np.array_equal(found, expected[at])
        return wrong

    async def together() -> list[int]:
        return await asyncio.gather(*(work(number) for number in range(12)))

    assert sum(asyncio.run(together())) == 0


def test_a_thread_begins_with_what_answers_for_all(workshop: Workshop) -> None:
    model, adapters, inputs = attached("llama", workshop)
    expected = answers_of(model, adapters, inputs)
    adapters.set_adapter("b")
    with adapters.using("a"), ThreadPoolExecutor(1) as pool:
        assert np.array_equal(pool.submit(zoo.logits, model, inputs).result(), expected[1])
        context = contextvars.copy_context()
        inside = pool.submit(context.run, zoo.logits, model, inputs).result()
        assert np.array_equal(inside, expected[0])
        assert adapters.active_adapters == ["a"]
    assert adapters.active_adapters == ["b"]


def test_a_scope_ends_with_an_error(workshop: Workshop) -> None:
    model, adapters, inputs = attached("llama", workshop)
    expected = answers_of(model, adapters, inputs)
    adapters.set_adapter("c")
    with pytest.raises(KeyError), adapters.using("a"):
        raise KeyError
    assert np.array_equal(zoo.logits(model, inputs), expected[2])


def test_adapters_come_and_go_while_others_answer(workshop: Workshop) -> None:
    model, adapters, inputs = attached("llama", workshop)
    expected = answers_of(model, adapters, inputs)
    folder = workshop.adapter(workshop.base("llama"), lora(["v_proj", "o_proj"], r=5), seed=9)
    failures: list[BaseException] = []

    def come_and_go() -> None:
        try:
            for number in range(8):
                adapters.load_adapter(folder, f"guest{number}")
                with adapters.using({f"guest{number}": 0.5, "a": 1.0}):
                    zoo.logits(model, inputs)
                adapters.delete_adapter(f"guest{number}")
        except BaseException as failure:
            failures.append(failure)
            raise

    thread = threading.Thread(target=come_and_go)
    thread.start()
    while thread.is_alive():
        with adapters.using("a"), torch.no_grad():
            assert np.array_equal(zoo.logits(model, inputs), expected[0])
    thread.join()
    assert not failures
    assert adapters.names == ("a", "b", "c")
