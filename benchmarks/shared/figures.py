"""A figure beside its target, and how samples read in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.shared.process import Sample

GROWTH_LIMIT = 0.10


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what was measured.
        value: the number compared with the target; None if it was not measured.
        shown: how the value reads.
        target: how the target reads.
        passed: whether the value keeps the target; None if it was not measured.
        detail: what the value was made from, or why there is none.
    """

    name: str
    value: float | None
    shown: str
    target: str
    passed: bool | None
    detail: str


def missing(name: str, target: str, why: str) -> Figure:
    """Return the line of a figure that was not measured."""
    return Figure(name, None, "not measured", target, None, why)


def growth_figure(merges: Sequence[Sample], large: Sample, scale: int) -> Figure:
    usual = peak(merges)
    value = large.peak_bytes / usual - 1
    detail = f"{mib(large.peak_bytes)} MiB against {mib(usual)} MiB; {large.seconds:.1f} s"
    passed = abs(value) <= GROWTH_LIMIT
    return Figure(growth_name(scale), value, f"{value:+.1%}", "within 10%", passed, detail)


def growth_name(scale: int) -> str:
    return f"the same at {scale} times the layers"


def seconds_of(samples: Sequence[Sample]) -> list[float]:
    return [sample.seconds for sample in samples]


def peak(samples: Sequence[Sample]) -> float:
    return median(sample.peak_bytes for sample in samples)


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f}"


def cpu(samples: Sequence[Sample]) -> str:
    return f"{median(sample.cpu_seconds for sample in samples):.2g} s"


def spread(values: Sequence[float]) -> str:
    middle = f"{median(values):.1f} s"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


def runs(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
