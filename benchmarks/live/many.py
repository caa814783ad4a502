"""The measurements of many adapters on a small model: a cache, and threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

import regraft
from benchmarks.live import models
from benchmarks.live.measure import Inputs, passing
from benchmarks.live.models import Sizes

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that float32 rounding explains."""

CAP_SHARE = 8
"""The cache is this much smaller than all adapters together."""

PEFT_SHARE = 10
"""PEFT gets one in so many of the threads' calls: it is slow, and its share of wrong ones plain."""


def logits(call: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a forward pass."""
    found: torch.Tensor = passing(call, ids)().logits
    return found


def is_right(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the expected ones, up to rounding."""
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def answers(model: Any, adapters: Mapping[str, Path], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what PEFT answers with each adapter, one after the other."""
    names = list(adapters)
    adapted = models.peft_model(model, {names[0]: adapters[names[0]]})
    found = {}
    for name, path in adapters.items():
        tensors = load_file(path / "adapter_model.safetensors")
        set_peft_model_state_dict(adapted, tensors, adapter_name=names[0])
        found[name] = logits(adapted, ids)
    return found


# -- the cache -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """Requests for adapters at random, on a cache that holds some of them.

    Attributes:
        adapters, requests: how many.
        adapter_bytes: the tensors of all adapters.
        max_bytes, peak_bytes: the cache's cap, and the most it held.
        resident_bytes: by how much the process grew.
        hit_rate: the share of requests whose adapter was there.
        register_seconds: for each adapter, when it was made known.
        hits, misses, plain: seconds to begin and end a scope, with the adapter there, with it not
            there, and on a handle without a cache.
        wrong: answers that are not PEFT's.
    """

    adapters: int
    requests: int
    adapter_bytes: int
    max_bytes: int
    peak_bytes: int
    resident_bytes: int
    hit_rate: float
    register_seconds: float
    hits: list[float]
    misses: list[float]
    plain: list[float]
    wrong: int


def cached(inputs: Inputs, sizes: Sizes) -> Cached:
    """Ask for adapters at random, and hold each answer against PEFT's."""
    ids = models.prompt(sizes.small, 1, 8)
    model = models.load_base(inputs.base, torch.float32)
    expected = answers(model, inputs.adapters, ids)
    plain = _plain(inputs, model, expected, ids, min(sizes.requests, 500))
    total = sum(_adapter_bytes(path) for path in inputs.adapters.values())
    cache = regraft.AdapterCache(max(total // CAP_SHARE, 2 * total // len(inputs.names)))
    adapters = regraft.attach(model, cache=cache)
    started = time.perf_counter()
    for name, path in inputs.adapters.items():
        adapters.load_adapter(path, name=name)
    seconds = (time.perf_counter() - started) / len(inputs.names)
    resident = resident_bytes()
    hits, misses, wrong = _requests(
        adapters, expected, ids, sizes.requests, lambda: cache.stats().misses
    )
    stats = cache.stats()
    return Cached(
        len(inputs.names), sizes.requests, total, cache.max_bytes, stats.peak_bytes,
        resident_bytes() - resident, stats.hit_rate, seconds, hits, misses, plain, wrong,
    )  # fmt: skip


def _requests(
    adapters: Any,
    expected: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    count: int,
    misses: Callable[[], int] = lambda: 0,
) -> tuple[list[float], list[float], int]:
    """Return the seconds of scopes with a hit, and with a miss, and how many answers are wrong."""
    chance, names = random.Random(0), list(expected)
    seconds: tuple[list[float], list[float]] = ([], [])
    wrong = 0
    for _ in range(count):
        name = chance.choice(names)
        missed = misses()
        taken = -time.perf_counter()
        with adapters.using(name):
            taken += time.perf_counter()
            wrong += not is_right(logits(adapters.model, ids), expected[name])
            taken -= time.perf_counter()
        taken += time.perf_counter()
        seconds[misses() - missed].append(taken)
    return seconds[0], seconds[1], wrong


def _plain(
    inputs: Inputs, model: Any, expected: Mapping[str, torch.Tensor], ids: torch.Tensor, count: int
) -> list[float]:
    """Return the seconds of scopes on a handle without a cache, and a few adapters."""
    adapters = regraft.attach(model)
    few = dict(list(expected.items())[:8])
    for name in few:
        adapters.load_adapter(inputs.adapters[name], name=name)
    seconds, _, wrong = _requests(adapters, few, ids, count)
    assert not wrong
    adapters.detach()
    return seconds


def _adapter_bytes(path: Path) -> int:
    tensors = load_file(path / "adapter_model.safetensors").values()
    return sum(t.numel() * t.element_size() for t in tensors)


def resident_bytes() -> int:
    """Return the resident memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


# -- threads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threaded:
    """Forward passes of threads with an adapter each.

    Attributes:
        threads: how many.
        calls: of all threads, by who answered.
        wrong: outputs that are not the adapter's, by who answered.
        seconds: of all calls together.
    """

    threads: int
    calls: dict[str, int]
    wrong: dict[str, int]
    seconds: dict[str, float]


def threaded(inputs: Inputs, sizes: Sizes) -> Threaded:
    """Let each thread ask for its own adapter, again and again."""
    ids = models.prompt(sizes.small, 1, 8)
    chosen = {name: inputs.adapters[name] for name in inputs.names[: sizes.threads]}
    model = models.load_base(inputs.base, torch.float32)
    expected = answers(model, chosen, ids)
    peft = models.peft_model(model, chosen)
    adapters = regraft.attach(model)
    for name, path in chosen.items():
        adapters.load_adapter(path, name=name)

    def ours(name: str) -> torch.Tensor:
        with adapters.using(name):
            return logits(model, ids)

    def theirs(name: str) -> torch.Tensor:
        peft.set_adapter(name)
        return logits(peft, ids)

    for call in (ours, theirs):
        assert all(is_right(call(name), expected[name]) for name in chosen)
    each = sizes.calls // len(chosen)
    counts = {"regraft": each, "peft": max(each // PEFT_SHARE, 1)}
    found = {
        who: _run(call, list(chosen), expected, counts[who])
        for who, call in (("regraft", ours), ("peft", theirs))
    }
    return Threaded(
        len(chosen),
        {who: count * len(chosen) for who, count in counts.items()},
        {who: wrong for who, (wrong, _) in found.items()},
        {who: seconds for who, (_, seconds) in found.items()},
    )


def _run(
    call: Callable[[str], torch.Tensor],
    names: Sequence[str],
    expected: Mapping[str, torch.Tensor],
    count: int,
) -> tuple[int, float]:
    """Return how many answers were wrong, and the seconds of all; an error is raised."""
    wrong, errors, gate = [0] * len(names), list[BaseException](), threading.Barrier(len(names) + 1)

    def work(number: int) -> None:
        name = names[number]
        gate.wait()
        try:
            for _ in range(count):
                wrong[number] += not is_right(call(name), expected[name])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(names))]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(wrong), time.perf_counter() - started
