"""Timing calls of one process in turns, so that whatever slows the machine slows all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_SECONDS = 0.02
"""A sample takes at least this long; short calls are repeated within it."""


@dataclass(frozen=True)
class Job:
    """A call to time.

    Attributes:
        call: what is timed.
        before, after: what is done around each call, and is not timed; with either of them each
            sample is one call.
    """

    call: Callable[[], Any]
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None


Times = dict[str, list[float]]
"""Seconds per call by the name of the job, one for each round."""


def in_turns(jobs: Mapping[str, Job], rounds: int) -> Times:
    """Time each job once a round, after one that does not count; which goes first rotates."""
    counts = {name: _calls(job) for name, job in jobs.items()}
    times: Times = {name: [] for name in jobs}
    names = list(jobs)
    gc.collect()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_sample(jobs[name], counts[name]))
    return times


def there_and_back(
    pairs: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]],
    what: tuple[str, str],
    rounds: int,
) -> Times:
    """Time two calls of which the second undoes the first, after a round that does not count.

    Returns:
        Times by ``"WHAT, NAME"``.
    """
    times: Times = {f"{each}, {name}": [] for name in pairs for each in what}
    names = list(pairs)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for each, call in zip(what, pairs[name], strict=True):
                seconds = _sample(Job(call), 1)
                if number:
                    times[f"{each}, {name}"].append(seconds)
    return times


def _calls(job: Job) -> int:
    """Run a job to warm it up, and return how many calls make a sample."""
    _sample(job, 1)
    if job.before or job.after:
        return 1
    seconds = _sample(job, 1)
    return max(1, int(LEAST_SECONDS / max(seconds, 1e-7)))


def _sample(job: Job, calls: int) -> float:
    """Return the seconds of one call."""
    if job.before:
        job.before()
    started = time.perf_counter()
    for _ in range(calls):
        job.call()
    seconds = (time.perf_counter() - started) / calls
    if job.after:
        job.after()
    return seconds
