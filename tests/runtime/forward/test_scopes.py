"""Scopes that end in another order, thread or task than they began in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from regraft.runtime.store.library import Library
from runtime.interrupts import World, bits_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("scopes"), cached=False)


@pytest.fixture(autouse=True)
def _nothing_is_left(world: World) -> Iterator[None]:
    yield
    world.check()
    assert world.handle.active_adapters == ["a"]


def test_each_scope_takes_away_its_own_selection_and_says_that_another_one_was_open(
    world: World,
) -> None:
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(world.handle.using(None))
    inner.enter_context(world.handle.using("b"))
    with pytest.raises(regraft.UsageError, match="scope of 'b' is open") as caught:
        outer.close()
    assert caught.value.problems[0].where == "the scope of no adapter"
    assert world.handle.active_adapters == ["b"]
    assert world.is_answer(["b"])
    inner.close()
    assert world.is_answer(["a"])


def test_three_scopes_end_from_the_middle(world: World) -> None:
    stacks = [ExitStack() for _ in range(3)]
    for stack, choice in zip(stacks, ("b", None, "b"), strict=True):
        stack.enter_context(world.handle.using(choice))
    with pytest.raises(regraft.UsageError):
        stacks[1].close()
    assert world.handle.active_adapters == ["b"]
    stacks[2].close()
    assert world.handle.active_adapters == ["b"]
    stacks[0].close()


def test_generators_that_take_turns_are_told(world: World) -> None:
    def stream(name: str, steps: int) -> Iterator[list[str]]:
        with world.handle.using(name):
            for _ in range(steps):
                yield world.handle.active_adapters

    first, second = stream("a", 1), stream("b", 2)
    assert [next(first), next(second)] == [["a"], ["b"]]
    with pytest.raises(regraft.UsageError, match="Generators that take turns"):
        next(first)
    assert list(second) == [["b"]]


def test_an_error_that_ends_a_scope_is_not_hidden(world: World) -> None:
    inner = ExitStack()

    def fail() -> None:
        with world.handle.using(None):
            inner.enter_context(world.handle.using("b"))
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        fail()
    assert "scope of 'b' is open" in caught.value.__notes__[0]
    inner.close()


def test_scopes_of_two_handles_do_not_concern_one_another(world: World, tmp_path: Path) -> None:
    other = World(tmp_path, cached=False)
    first, second = ExitStack(), ExitStack()
    first.enter_context(world.handle.using("b"))
    second.enter_context(other.handle.using("b"))
    first.close()
    assert other.is_answer(["b"])
    assert world.is_answer(["a"])
    second.close()
    other.check()


def test_a_scope_that_ends_in_another_thread_is_over_where_it_began(world: World) -> None:
    stack = ExitStack()
    stack.enter_context(world.handle.using("b"))
    thread = threading.Thread(target=stack.close)
    thread.start()
    thread.join()
    assert world.handle.active_adapters == ["a"]
    assert world.is_answer(["a"])
    with world.handle.using("b"):
        assert world.is_answer(["b"])


def test_a_merge_after_one_that_was_taken_back_in_a_disabled_block_is_disabled_and_comes_back(
    world: World,
) -> None:
    handle = world.handle
    handle.merge_adapter("a")
    with handle.disable_adapter():
        handle.unmerge_adapter()
    handle.merge_adapter("a")
    with handle.disable_adapter():
        assert torch.equal(world.answer(), world.answers[None])
        assert handle.merged_adapters == []
    assert handle.merged_adapters == ["a"]
    assert bits_of(world.model) == world.bits["a",]
    handle.unmerge_adapter()


def test_a_mix_of_an_adapter_that_another_thread_deletes_is_not_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, mix, other = world.handle, Library.mix, [True]

    def after_another_thread(self: Library, *rest: Any) -> Any:
        if other:
            other.clear()
            handle.delete_adapter("b")
            handle.load_adapter(world.folders["c"], "b")
        return mix(self, *rest)

    handle.set_adapter(None)
    handle.load_adapter(world.folders["c"], "c")
    monkeypatch.setattr(Library, "mix", after_another_thread)
    with handle.using(["a", "b"]):
        pass
    with handle.using(["a", "b"]):
        now = world.answer()
    with handle.using(["a", "c"]):
        assert torch.equal(now, world.answer())
    for name in ("b", "c"):
        handle.delete_adapter(name)
    handle.load_adapter(world.folders["b"], "b")
    handle.set_adapter("a")
