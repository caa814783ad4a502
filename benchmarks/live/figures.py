"""The figures of live models, and the text around them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.live.many import CAP_SHARE, Cached, Threaded
from benchmarks.live.measure import MIX, Merging
from benchmarks.live.timing import Times
from benchmarks.shared.figures import Figure, runs
from benchmarks.shared.page import BEGIN, END

LOAD_LIMIT, SWITCH_LIMIT = 10.0, 100.0
FORWARD_LIMIT, PEFT_LIMIT, MIXED_LIMIT = 1.05, 1.0, 1.10
MERGE_LIMIT, LOAD_MERGED_LIMIT = 3.0, 1.2
RECORD = "for the record"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def faster(
    name: str, theirs: Sequence[float], ours: Sequence[float], limit: float | None
) -> Figure:
    """Return how many times faster one is: the median of the ratios within each round."""
    found = ratios(theirs, ours)
    value = median(found)
    target = RECORD if limit is None else f"at least {limit:g} x"
    return Figure(f"{name}, times faster", value, shown(value), target,
                  None if limit is None else value >= limit, detail(theirs, ours))  # fmt: skip


def as_fast(
    name: str, ours: Sequence[float], other: Sequence[float], limit: float | None
) -> Figure:
    """Return how much longer one takes: the median of the ratios within each round."""
    found = ratios(ours, other)
    value = median(found)
    target = RECORD if limit is None else f"at most {limit:.2f} x"
    return Figure(f"{name}, median ratio", value, shown(value), target,
                  None if limit is None else value <= limit, detail(ours, other))  # fmt: skip


def detail(above: Sequence[float], below: Sequence[float]) -> str:
    """Return what a ratio was made from."""
    found = ratios(above, below)
    return (
        f"{span(above)} against {span(below)}; ratios {number(min(found))} to "
        f"{number(max(found))}; {runs(len(found), 'round')}"
    )


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def shown(value: float) -> str:
    return f"{number(value)} x"


UNITS = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6))
"""From how many seconds on a unit is used, and how many of it are a second."""


def span(seconds: Sequence[float]) -> str:
    """Return the median of some times, and their range."""
    _, unit, factor = next(row for row in UNITS if median(seconds) >= row[0])
    low, middle, high = (number(v * factor) for v in (min(seconds), median(seconds), max(seconds)))
    return f"{middle} {unit}" if len(seconds) == 1 else f"{middle} {unit} ({low} to {high})"


# -- each measurement ------------------------------------------------------------------------------


def load_figures(times: Times) -> list[Figure]:
    """Compare loading an adapter with PEFT's."""
    ours, selected = times["load, regraft"], times["load and select, regraft"]
    name = "load an adapter from warm disk onto the running model, against PEFT"
    return [
        faster(f"{name}'s `load_adapter`", times["load, peft"], ours, LOAD_LIMIT),
        faster(f"{name}'s with `low_cpu_mem_usage`", times["load, peft on meta"], ours, None),
        faster("load and select it, against PEFT", times["load and select, peft"], selected, None),
    ]


def switch_figures(times: Times) -> list[Figure]:
    """Compare switching with PEFT's."""
    theirs = times["switch, peft"]
    return [
        faster("switch adapters (`set_adapter`) against PEFT", theirs, times["switch, regraft"],
               SWITCH_LIMIT),
        faster("switch for a block of code (`using`) against PEFT's `set_adapter`", theirs,
               times["scope, regraft"], None),
    ]  # fmt: skip


def forward_figures(times: Times) -> list[Figure]:
    """Compare forward passes with the base alone, and with PEFT."""
    found = []
    for what in dict.fromkeys(name.rpartition(", ")[0] for name in times):
        base, none, ours, theirs = (
            times[f"{what}, {who}"] for who in ("base", "none", "regraft", "peft")
        )
        found += [
            as_fast(f"{what}: one adapter against the base alone", ours, base, FORWARD_LIMIT),
            as_fast(f"{what}: one adapter against PEFT", ours, theirs, PEFT_LIMIT),
            as_fast(f"{what}: PEFT against the base alone", theirs, base, None),
            as_fast(f"{what}: attached, no adapter, against the base alone", none, base, None),
        ]
    return found


def mixed_figures(times: Times) -> list[Figure]:
    """Compare a batch of eight adapters with one of a single adapter."""
    found = []
    for what in dict.fromkeys(name.rpartition(", ")[0].rpartition(", ")[0] for name in times):
        one, rows, one_peft, rows_peft = (
            times[f"{what}, {who}"]
            for who in ("one, regraft", "rows, regraft", "one, peft", "rows, peft")
        )
        name = f"{what}: {MIX} adapters in {MIX} rows"
        found += [
            as_fast(f"{name} against one adapter", rows, one, MIXED_LIMIT),
            as_fast(f"{name} against PEFT's `adapter_names`", rows, rows_peft, None),
            as_fast(f"{name}, PEFT against PEFT with one", rows_peft, one_peft, None),
        ]
    return found


def merge_figures(found: Merging) -> list[Figure]:
    """Compare merges in memory with PEFT's, and what is left of the weights after them."""
    figures = [
        faster(f"{verb} in memory (`{verb}_adapter`) against PEFT", found.times[f"{verb}, peft"],
               found.times[f"{verb}, regraft"], MERGE_LIMIT)
        for verb in ("merge", "unmerge")
    ]  # fmt: skip
    share = found.undo_bytes / found.model_bytes
    ours, theirs = found.changed["regraft"], found.changed["peft"]
    beside = f"PEFT {theirs:,} of {found.weights:,} adapted weights ({theirs / found.weights:.1%})"
    return [
        *figures,
        Figure("what is kept to take a merge back, of the model's bytes", share, f"{share:.2%}",
               RECORD, None, f"{found.undo_bytes / 1e6:.1f} MB for {found.model_bytes / 1e9:.2f} "
               "GB; PEFT keeps nothing"),
        Figure(f"weights changed by {found.cycles} merges and un-merges", ours, f"{ours:,}", "0",
               ours == 0, beside),
    ]  # fmt: skip


def load_merged_figures(times: Times) -> list[Figure]:
    """Compare loading with an adapter merged in with loading the base."""
    name = "`load_merged` against `from_pretrained` of the base"
    peft = "`load_merged` against `from_pretrained`, PEFT and `merge_and_unload`"
    found = []
    for suffix in ("", ", first pass"):
        base, read, ours, theirs = (
            times[f"{who}{suffix}"]
            for who in (
                "from_pretrained",
                "from_pretrained that reads",
                "load_merged",
                "merge_and_unload",
            )
        )
        what = ", each with a first forward pass" if suffix else ""
        limit = None if suffix else LOAD_MERGED_LIMIT
        found += [as_fast(f"{name}{what}", ours, base, limit),
                  as_fast(f"{name} with `disable_mmap`{what}", ours, read, None),
                  faster(f"{peft}{what}", theirs, ours, None)]  # fmt: skip
    return found


def cache_figures(found: Cached) -> list[Figure]:
    """Return what a cache of some of many adapters did."""
    much = (
        f"{found.adapters:,} adapters of {found.adapter_bytes / 1e6:.0f} MB, "
        f"{found.requests:,} requests"
    )
    share = found.peak_bytes / found.max_bytes
    overhead = median(found.hits) - median(found.plain) if found.hits else 0.0
    each = f"{span(found.hits)} with the adapter there; " if found.hits else ""
    return [
        Figure("adapter cache: wrong answers", found.wrong, f"{found.wrong:,}", "0",
               found.wrong == 0, f"held against PEFT's, within float32 rounding; {much}"),
        Figure("adapter cache: most bytes held, of the cap", share, f"{share:.1%}", "at most 100%",
               share <= 1, f"{found.peak_bytes / 1e6:.1f} of {found.max_bytes / 1e6:.1f} MB; the "
               f"process grew by {found.resident_bytes / 1e6:.0f} MB"),
        Figure("adapter cache: requests whose adapter was there", found.hit_rate,
               f"{found.hit_rate:.1%}", RECORD, None,
               f"asked for at random, with room for one in {CAP_SHARE}"),
        Figure("adapter cache: what a request takes more than without a cache", overhead,
               f"{overhead * 1e6:.0f} µs", RECORD, None,
               f"{each}{span(found.plain)} without a cache; {span(found.misses)} with the adapter "
               f"on disk; making one known takes {span([found.register_seconds])}"),
    ]  # fmt: skip


def thread_figures(found: Threaded) -> list[Figure]:
    """Return how many outputs of threads were another adapter's."""
    ours, theirs = found.wrong["regraft"], found.wrong["peft"]
    speeds = {who: found.calls[who] / seconds for who, seconds in found.seconds.items()}
    beside = (
        f"PEFT with `set_adapter` in each thread: {theirs:,} of {found.calls['peft']:,}; "
        f"{speeds['regraft']:.0f} calls a second, PEFT {speeds['peft']:.0f}"
    )
    count = f"{found.calls['regraft']:,} calls"
    name = f"wrong outputs of {found.threads} threads with an adapter each, {count}"
    return [Figure(name, ours, f"{ours:,}", "0", ours == 0, beside)]


INTRODUCTION = f"""# Benchmarks of live models

`make bench-live` measures adapters on a running torch model against PEFT, on the CPU. Both run in
one process on the same weights: PEFT wraps a second module tree whose parameters are those of the
first. The base is a checkpoint of random weights in the shape of Llama-3.2-1B with 32,000 tokens
(hidden 2048, 16 layers, bfloat16, 2.2 GB); the adapters are PEFT's files, of rank 16 on all 112
linear layers of the blocks, with random factors in float32.

- **In turns.** The contestants of a line take turns, and which goes first rotates. What is timed
  runs once before it counts; calls of less than 20 ms are repeated within a sample. A figure is the
  median of the ratios within each round; ranges are those of all rounds.
- **Load.** From warm disk, beside eight adapters that are there. PEFT reads onto the CPU as it does
  by default; `low_cpu_mem_usage=True`, which spares it the initial values, is a line of its own.
  Taking the adapter off again is not timed.
- **Forward passes** are without gradients and fill the key-value cache; those over one token begin
  with 64 tokens in it. The base alone is a third module tree over the same weights, without a hook.
- **Mixed batches.** Eight rows with an adapter each against the same rows with one adapter for all.
- **Merging** is `merge_adapter` and `unmerge_adapter` in place, PEFT's on a copy of the weights,
  since it changes them. Weights count as changed if any bit differs from the base.
- **`load_merged`** against `from_pretrained` alone. That maps the weights, and they are read when
  they are first used; so there are lines with `disable_mmap`, which reads them, and with a first
  forward pass over one token.
- **Adapter cache.** A small base in float32 (hidden 256, 4 layers), asked for adapters at random by
  one thread; each answer is held against PEFT's with that adapter.
- **Threads.** The same base; each thread asks for its own adapter, in a scope (`using`), or with
  PEFT's `set_adapter`, which is for the whole model. An output is wrong if it differs from the
  adapter's by more than float32 rounding.

{BEGIN}
{END}
"""
