"""Interrupts at every step of what a handle does, and what has to hold after each.

Python raises what a signal's handler raises in the main thread: after a call, as a function begins
or a generator goes on, and at the end of a loop's round. A trace function raises an interrupt at
the n-th of these steps, for every n, in the code of regraft's runtime and in what it uses of
``contextlib`` and ``threading``. Other threads are not traced: signals are not heard there either.
"""

from __future__ import annotations

import contextlib
import dis
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import regraft
from regraft.runtime.forward import scopes

SIZE = 8
LOCKS = type(threading.Lock()), type(threading.RLock())
TRACED = (str(Path(regraft.__file__).parent / "runtime"), contextlib.__file__, threading.__file__)
HEEDED = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD")
          if name in dis.opmap}  # fmt: skip
"""Instructions after which an interpreter looks whether there is a signal."""


# -- where an interrupt may come -------------------------------------------------------------------


class Points:
    """Counts the steps at which a signal may be heard, and raises at one of them.

    Attributes:
        seen: how many there were.
        where: the code at which it raised.
    """

    def __init__(self, at: int = -1) -> None:
        self._at, self.seen, self.where = at, 0, ""
        self._before: dict[int, int] = {}

    def __enter__(self) -> Points:
        sys.settrace(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _begin(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._before[id(frame)] = dis.opmap["RESUME"]
        return self._step

    def _step(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "opcode":
            before = self._before.get(id(frame))
            self._before[id(frame)] = frame.f_code.co_code[frame.f_lasti]
            if before in HEEDED:
                self._pass(frame)
        return self._step

    def _pass(self, frame: FrameType) -> None:
        self.seen += 1
        if self.seen == self._at + 1:
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            raise KeyboardInterrupt


@contextlib.contextmanager
def alarm(seconds: float, every: float = 0.0) -> Iterator[None]:
    """Let a real signal come after a time, and again after each further one."""

    def fire(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, fire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, every)
        yield
    finally:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
                break
            except KeyboardInterrupt:
                continue


# -- a model and its adapters ----------------------------------------------------------------------


class Layer(nn.Module):
    """Two linear layers, one of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(SIZE, SIZE)
        self.v_proj = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return as many values as there came."""
        out: torch.Tensor = self.v_proj(torch.tanh(self.q_proj(x)))
        return out


class Model(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return as many values as there came."""
        for layer in self.layers:
            x = layer(x)
        return x


def write_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter for the model."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(2):
        for name in ("q_proj", "v_proj"):
            key = f"base_model.model.layers.{number}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, SIZE, generator=noise)
            tensors[f"{key}.lora_B.weight"] = torch.randn(SIZE, 2, generator=noise)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of all weights."""
    return {name: bytes(t.detach().numpy().tobytes()) for name, t in model.state_dict().items()}


class World:
    """A model with adapters, and what it has to answer.

    Attributes:
        model, handle: the model, and its handle; None while it is detached.
        folders: adapters by name.
        bits: the weights by what is merged into them.
        answers: the model's answers by what is chosen.
    """

    NAMES = "ab"

    def __init__(self, folder: Path, *, cached: bool) -> None:
        torch.manual_seed(0)
        self.cached = cached
        self.model, self.x = Model(), torch.randn(3, SIZE)
        self.folders = {n: write_adapter(folder / n, ord(n)) for n in "abc"}
        self.plain = traces(self.model)
        self.handle = self.attach()
        self.bits = {(): bits_of(self.model)}
        for name in self.NAMES:
            self.handle.merge_adapter(name)
            self.bits[name,] = bits_of(self.model)
            self.handle.unmerge_adapter()
        self.answers = {}
        for choice in (None, "a", "b"):
            with self.handle.using(choice):
                self.answers[choice] = self.answer()
        assert len({each.numpy().tobytes() for each in self.answers.values()}) == 3

    def attach(self) -> regraft.Adapters:
        """Attach two adapters, of which the first answers."""
        cache = regraft.AdapterCache("1MiB", timeout=2.0) if self.cached else None
        handle = regraft.attach(self.model, self.folders["a"], "a", cache=cache)
        handle.load_adapter(self.folders["b"], "b")
        return handle

    def answer(self) -> torch.Tensor:
        """Return what the model answers."""
        with torch.no_grad():
            found: torch.Tensor = self.model(self.x)
        return found

    def check(self) -> None:
        """Fail unless what the handle says is so, all locks are free, and it goes on working."""
        handle = regraft.handle_of(self.model)
        if handle is None:
            assert traces(self.model) == self.plain, "something is left on the model"
            return
        self.check_idle(handle)
        merged = tuple(handle.merged_adapters)
        assert bits_of(self.model) == self.bits[merged], f"the weights are not those of {merged}"
        if merged:
            assert self.is_answer(list(merged)), "the answer is wrong"
            return
        if all(weight == 1 for _, weight in handle._default_names):
            assert self.is_answer(handle.active_adapters), "the answer is wrong"
        for choice in (name for name in self.NAMES if name in handle.names):
            with handle.using(choice):
                assert self.is_answer([choice]), f"not the answer of {choice}"
        self.check_idle(handle)

    def is_answer(self, names: list[str]) -> bool:
        """Whether the model answers as it has to with these adapters."""
        expected = self.answers[names[0] if names else None]
        return bool(torch.allclose(self.answer(), expected, atol=1e-4))

    def check_idle(self, handle: Any) -> None:
        """Fail if a lock is held, a scope is open, or an adapter is leased that nobody uses."""
        held_locks = not_free(locks_in(handle))
        assert not held_locks, f"locks are held: {held_locks}"
        assert not scopes.current(), "a scope is open"
        assert not handle._state.open_scopes, "a scope is open"
        cache = handle._library.cache
        if cache is None:
            return
        cache.stats()
        for store in (cache._device, cache._host):
            held = [entry for entry in store._entries.values() if entry.held]
            assert store.nbytes == sum(entry.nbytes for entry in held), "bytes are miscounted"
            assert not store._queue, "somebody is left in the queue"
        used = bool(handle._default_names) + len(cache._pins)
        assert len(cache._device._holds) == used, "an adapter is leased by nobody"

    def mend(self) -> None:
        """Go on with the handle as if nothing had been, to where operations begin."""
        handle = regraft.handle_of(self.model)
        if handle is None:
            self.handle = self.attach()
            return
        self.handle = handle
        if handle.merged_adapters:
            handle.unmerge_adapter()
        for name in handle.names:
            if name not in self.NAMES:
                handle.set_adapter("a" if "a" in handle.names else None)
                handle.delete_adapter(name)
        for name in self.NAMES:
            if name not in handle.names:
                handle.load_adapter(self.folders[name], name)
        handle.set_adapter("a")


def traces(model: nn.Module) -> list[Any]:
    """Return what a model has of hooks and attributes, and which parameters are trained."""
    found = []
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        found.append((name, sorted(vars(module)), hooks))
    return [*found, [p.requires_grad for p in model.parameters()]]


def locks_in(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield every lock that an object of regraft has, or one that it has."""
    todo, seen = [("handle", thing)], set[int]()
    while todo:
        place, each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, LOCKS):
            yield place, each
        elif type(each).__module__.startswith("regraft."):
            inner = getattr(each, "__dict__", {})
            todo += [(f"{place}.{name}", value) for name, value in inner.items()]
        elif isinstance(each, dict):
            todo += [(f"{place}[{key!r}]", value) for key, value in each.items()]


def not_free(locks: Iterator[tuple[str, Any]]) -> list[str]:
    """Return the places of those locks that another thread cannot have."""
    held: list[str] = []

    def take_each() -> None:
        for place, lock in locks:
            if lock.acquire(timeout=1.0):
                lock.release()
            else:
                held.append(place)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(take_each).result()
    return held


# -- what is interrupted ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """Something that a handle does.

    Attributes:
        name: what it is called.
        act: does it.
        prepare: brings the world to where it begins.
    """

    name: str
    act: Callable[[World], object]
    prepare: Callable[[World], object] = field(default=lambda _: None)


def _merged(world: World) -> None:
    world.handle.merge_adapter("a")


def _with_c(world: World) -> None:
    world.handle.load_adapter(world.folders["c"], "c")


def _with_c_used(world: World) -> None:
    _with_c(world)
    with world.handle.using("c"):
        world.answer()


def _detached(world: World) -> None:
    world.handle.detach()


def _disabled(world: World) -> None:
    with world.handle.disable_adapter():
        assert world.is_answer([])


def _using(world: World) -> None:
    with world.handle.using("b"):
        assert world.is_answer(["b"])


def _rows(world: World) -> None:
    with world.handle.rows(["a", "b", None]):
        found = world.answer()
    for row, choice in enumerate(("a", "b", None)):
        assert torch.allclose(found[row], world.answers[choice][row], atol=1e-4)


def _mixed(world: World) -> None:
    world.handle.set_adapter({"a": 0.5, "b": random.random()})
    world.handle.set_adapter("a")


def _trained(world: World) -> None:
    world.handle.load_adapter(world.folders["c"], "c", is_trainable=True)


def _replaced(world: World) -> None:
    layer = world.model.layers[1]
    new = nn.Linear(SIZE, SIZE, bias=False)
    new.load_state_dict(layer.v_proj.state_dict())
    layer.v_proj = new


def _new(world: World) -> None:
    config = regraft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    world.handle.add_adapter("c", config)


def _pinned(world: World) -> None:
    cache = world.handle._library.cache
    if cache is not None:
        cache.pin("b")
        cache.unpin("b")


OPERATIONS = [
    Operation("merge_adapter", lambda w: w.handle.merge_adapter("a")),
    Operation("unmerge_adapter", lambda w: w.handle.unmerge_adapter(), _merged),
    Operation("swap_adapter", lambda w: w.handle.swap_adapter("a", "b"), _merged),
    Operation("disable_adapter while merged", _disabled, _merged),
    Operation("disable_adapter", _disabled),
    Operation("detach while merged", _detached, _merged),
    Operation("detach", _detached),
    Operation("attach", lambda w: regraft.attach(w.model, w.folders["a"], "a"), _detached),
    Operation("load_adapter", _with_c),
    Operation("load_adapter to train", _trained),
    Operation("add_adapter", _new),
    Operation("delete_adapter", lambda w: w.handle.delete_adapter("c"), _with_c_used),
    Operation("set_adapter", lambda w: w.handle.set_adapter("b")),
    Operation("set_adapter of mixes", _mixed),
    Operation("using", _using),
    Operation("rows", _rows),
    Operation("follow a module that was replaced", lambda w: w.is_answer(["a"]), _replaced),
    Operation("pin", _pinned),
]


def interrupted(world: World, operation: Operation, points: Any) -> bool:
    """Do an operation under points or an alarm; return whether it was interrupted."""
    operation.prepare(world)
    try:
        with points:
            operation.act(world)
    except KeyboardInterrupt:
        return True
    return False


def after(world: World, what: str) -> str | None:
    """Return what is wrong after an interrupt; None if all is right."""
    try:
        world.check()
        world.mend()
        world.check()
    except BaseException as problem:
        return f"{what}: {type(problem).__name__}: {problem}"[:400]
    return None


def at_every_point(
    world: World, operation: Operation, every: int = 1, first: int = 0
) -> tuple[int, list[str]]:
    """Interrupt an operation at every n-th point; return how many they were, and what was wrong."""
    number, count, wrong = first, 0, []
    while True:
        points = Points(number)
        if not interrupted(world, operation, points) and not points.where:
            return count, wrong + _list(after(world, f"{operation.name}, not interrupted"))
        count += 1  # also where Python swallows it: in a finalizer, or a weak reference's callback
        found = after(world, f"{operation.name}, point {number}, {points.where}")
        if found is not None:
            return count, [*wrong, found]
        number += every


def at_random(
    world: World, operation: Operation, count: int, chance: random.Random, every: float = 0.0
) -> tuple[int, list[str]]:
    """Send real signals at random moments; return how many were heard, and what was wrong."""
    started = time.perf_counter()
    interrupted(world, operation, Points())
    took, heard = time.perf_counter() - started, 0
    if found := after(world, operation.name):
        return 0, [found]
    for number in range(8 * count):
        if number >= count and heard:  # a busy machine may have slept through all so far
            break
        longest = 1.2 * took if number % 2 else 0.1 * took  # the first time may be a slow one
        moment = chance.uniform(1e-5, longest)
        heard += interrupted(world, operation, alarm(moment, every))
        if found := after(world, f"{operation.name}, a signal after {moment * 1e3:.3f} ms"):
            return heard, [found]
    return heard, []


def _list(found: str | None) -> list[str]:
    return [] if found is None else [found]
