"""From samples to figures, each beside its target, and from figures to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from measure import Pairs, Undos
from process import Sample

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

COPY_LIMIT = 1.0
PATCH_LIMIT = 0.02
PEFT_LIMIT = 10.0
PEAK_LIMIT = 400 * 2**20
GROWTH_LIMIT = 0.10
HELP_LIMIT, TINY_LIMIT, COMPILE_LIMIT, CHECK_LIMIT = 0.25, 1.0, 3.0, 1.0


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


def seconds_of(samples: Sequence[Sample]) -> list[float]:
    return [sample.seconds for sample in samples]


def copy_figure(pairs: Pairs) -> Figure:
    """Compare each merge with the copy of its pair: a disk that slows down slows down both."""
    copies, merges = seconds_of(pairs.copies), seconds_of(pairs.merges)
    ratios = [merge / copy for merge, copy in zip(merges, copies, strict=True)]
    value = median(ratios)
    detail = (
        f"merge {spread(merges)}, copy {spread(copies)}; ratios {min(ratios):.2f} to "
        f"{max(ratios):.2f}, ratio of the medians {median(merges) / median(copies):.2f}; "
        f"CPU time {cpu(pairs.merges)} against {cpu(pairs.copies)}; {runs(len(ratios), 'pair')}"
    )
    name = "merge against `cp -r` and a sync of the copy, median ratio"
    return Figure(name, value, f"{value:.2f} x", "at most 1.0 x", value <= COPY_LIMIT, detail)


def undo_figures(undos: Undos) -> list[Figure]:
    """Compare merges with an undo patch, and un-merges, with the plain merge of their round."""
    plains = seconds_of(undos.plains)
    share = undos.patch_bytes / undos.model_bytes
    detail = (
        f"{undos.patch_bytes / 1e6:.1f} MB for {undos.model_bytes / 1e9:.2f} GB, "
        f"|delta|/|W| {undos.relative_delta:.2%}; the adapter's copy not counted"
    )
    name = "undo patch, of the model's bytes"
    size = Figure(name, share, f"{share:.2%}", "at most 2%", share <= PATCH_LIMIT, detail)
    return [
        size,
        _ratio_figure("merge with an undo patch against one without", undos.merges, plains, 1.15),
        _ratio_figure("un-merge against a merge without a patch", undos.unmerges, plains, 1.2),
    ]


def _ratio_figure(
    name: str, samples: Sequence[Sample], plains: Sequence[float], limit: float
) -> Figure:
    values = seconds_of(samples)
    ratios = [value / plain for value, plain in zip(values, plains, strict=True)]
    value = median(ratios)
    detail = (
        f"{spread(values)} against {spread(plains)}; ratios {min(ratios):.2f} to "
        f"{max(ratios):.2f}; CPU time {cpu(samples)}; peak {mib(peak(samples))} MiB; "
        f"{runs(len(values), 'round')}"
    )
    return Figure(
        name + ", median ratio", value, f"{value:.2f} x", f"at most {limit:g} x", value <= limit,
        detail,
    )  # fmt: skip


def peft_figure(peft: Sequence[Sample], merges: Sequence[Sample]) -> Figure:
    theirs, ours = seconds_of(peft), seconds_of(merges)
    value = median(theirs) / median(ours)
    peaks = f"{mib(peak(peft))} MiB at peak against {mib(peak(merges))} MiB"
    detail = f"PEFT {spread(theirs)}, regraft {spread(ours)}; {peaks}; {runs(len(peft), 'run')}"
    name = "merge against PEFT, times faster"
    return Figure(name, value, f"{value:.1f} x", "at least 10 x", value >= PEFT_LIMIT, detail)


def peak_figure(merges: Sequence[Sample]) -> Figure:
    value = max(sample.peak_bytes for sample in merges)
    smallest = min(sample.peak_bytes for sample in merges)
    detail = f"largest of {runs(len(merges), 'run')}; the smallest is {mib(smallest)} MiB"
    name = "peak resident memory of a merge"
    return Figure(name, value, f"{mib(value)} MiB", "at most 400 MiB", value <= PEAK_LIMIT, detail)


def growth_figure(merges: Sequence[Sample], large: Sample, scale: int) -> Figure:
    usual = peak(merges)
    value = large.peak_bytes / usual - 1
    detail = f"{mib(large.peak_bytes)} MiB against {mib(usual)} MiB; {large.seconds:.1f} s"
    passed = abs(value) <= GROWTH_LIMIT
    return Figure(growth_name(scale), value, f"{value:+.1%}", "within 10%", passed, detail)


def growth_name(scale: int) -> str:
    return f"the same at {scale} times the layers"


def time_figure(name: str, samples: Sequence[Sample], limit: float) -> Figure:
    values = seconds_of(samples)
    value = median(values)
    extent = f"{min(values):.2f} to {max(values):.2f} s"
    detail = f"{extent}; CPU time {cpu(samples)}; {runs(len(values), 'run')}"
    return Figure(name, value, f"{value:.2f} s", f"under {limit:g} s", value < limit, detail)


def compile_figure(pairs: Sequence[tuple[Sample, Sample]]) -> Figure:
    values = [first.seconds - second.seconds for first, second in pairs]
    firsts = seconds_of([first for first, _ in pairs])
    value = median(values)
    used = median(first.cpu_seconds - second.cpu_seconds for first, second in pairs)
    count = runs(len(pairs), "run")
    detail = f"first run {spread(firsts)}, less the second; CPU time {used:.1f} s; {count}"
    passed = value < COMPILE_LIMIT
    name = "compilation, once after installing"
    return Figure(name, value, f"{value:.2f} s", f"under {COMPILE_LIMIT:g} s", passed, detail)


def missing(name: str, target: str, why: str) -> Figure:
    """Return the line of a figure that was not measured."""
    return Figure(name, None, "not measured", target, None, why)


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


VERDICTS: dict[bool | None, str] = {True: "pass", False: "miss", None: "-"}


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| what | measured | target | | from |", "|---|---|---|---|---|"]
    lines += [
        f"| {f.name} | {f.shown} | {f.target} | {VERDICTS[f.passed]} | {f.detail} |"
        for f in figures
    ]
    return "\n".join(lines)


def as_json(
    figures: Sequence[Figure], machine: Mapping[str, str], samples: Mapping[str, object]
) -> dict[str, object]:
    """Return everything, down to the single runs, as JSON-ready objects."""
    return {
        "machine": dict(machine),
        "figures": [asdict(figure) for figure in figures],
        "samples": dict(samples),
    }


def section(figures: Sequence[Figure], machine: Mapping[str, str], command: str) -> str:
    """Return what goes between the two markers of the page."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    return f"{table(figures)}\n\n{facts}\n- command: `{command}`\n"


def write_page(path: Path, content: str, introduction: str | None = None) -> None:
    """Put the section into the page, which is begun if there is none."""
    page = path.read_text("utf-8") if path.exists() else introduction or INTRODUCTION
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(replaced(page, content), encoding="utf-8")


def replaced(page: str, content: str) -> str:
    """Return a page with the text between its markers replaced; without markers it is added."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = page.rstrip() + "\n\n", "\n"
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


INTRODUCTION = f"""# Benchmarks

`make bench` measures what regraft promises and writes the table below. Every time is that of a
whole process, from its start to its end, with the interpreter's start, the imports, all digests
and the flush to the disk. The base is a checkpoint of random weights in the shape of Qwen2.5-1.5B
(3.1 GB in bfloat16, four files), the adapter has rank 16 on all linear layers.

- **Against a copy.** `cp -r BASE OUT && sync OUT/* OUT` and `regraft merge BASE ADAPTER -o OUT`
  take turns, and which goes first alternates. `sync` with names flushes exactly these files and
  the folder; the merge flushes the same before it ends. The base is in the page cache for both.
  Removing OUT, and a sync after that, is not timed. The figure is the median of the ratios within
  each pair.
- **Undo.** A merge without a patch, one with it and an un-merge take turns; ratios are taken
  within each round. Every other line of the table is with a patch, as that is the default.
- **Against PEFT.** `from_pretrained` in bfloat16, `merge_and_unload`, `save_pretrained`; PEFT
  does not flush what it wrote, and is not asked to.
- **Memory** is the largest resident set the kernel saw (`ru_maxrss`); for PEFT that includes the
  pages of the base it maps.
- **Start-up** is measured warm, but for the compilation: there the cache of compiled code is
  empty, and the second run, which finds it, is taken off the first.
- **Check** reads the headers of a 70B-shaped checkpoint in some 30 files; the weights are holes.

{BEGIN}
{END}
"""
