"""From samples to figures, each beside its target, and from figures to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.merge.disk import Raw, Shared
from benchmarks.merge.measure import Pairs, Undos
from benchmarks.shared.figures import Figure, cpu, mib, peak, runs, seconds_of, spread
from benchmarks.shared.page import BEGIN, END
from benchmarks.shared.process import Sample

COPY_LIMIT = 1.0
PATCH_LIMIT = 0.02
RAW_LIMIT = 1.3
SHARED_LIMIT, DISK_LIMIT = 0.25, 1.1
REFLINK = "merge of q and v, on XFS: new disk, of what changes"
PEFT_LIMIT = 10.0
PEAK_LIMIT = 400 * 2**20
UNDO_KIND_LIMIT = 1.2
HELP_LIMIT, TINY_LIMIT, COMPILE_LIMIT, CHECK_LIMIT = 0.25, 1.0, 3.0, 1.0


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


def raw_figure(found: Raw) -> Figure:
    """Compare each merge with the raw write of its pair."""
    writes, merges = seconds_of(found.writes), seconds_of(found.merges)
    ratios = [merge / write for merge, write in zip(merges, writes, strict=True)]
    value = median(ratios)
    detail = (
        f"merge {spread(merges)}, raw write {spread(writes)}; ratios {min(ratios):.2f} to "
        f"{max(ratios):.2f}; {runs(len(ratios), 'pair')}"
    )
    name = "merge against a raw write of as many bytes (`O_DIRECT`, room set aside), median ratio"
    return Figure(
        name, value, f"{value:.2f} x", f"at most {RAW_LIMIT:g} x", value <= RAW_LIMIT, detail
    )


def shared_figures(found: Shared) -> list[Figure]:
    """Compare work that shares blocks with a copy that shares none, and with what changes."""
    figures = []
    for name, samples in found.samples.items():
        figures += [_shared_time(found, name, samples), _shared_disk(found, name)]
    return figures


def _shared_time(found: Shared, name: str, samples: Sequence[Sample]) -> Figure:
    copies, values = seconds_of(found.copies), seconds_of(samples)
    value = median(values) / median(copies)
    detail = (
        f"{spread(values)} against {spread(copies)}; CPU time {cpu(samples)} against "
        f"{cpu(found.copies)}; {runs(len(values), 'round')}"
    )
    label = f"{_on_xfs(name)}, against `cp -r --reflink=never` and a sync"
    passed = value <= SHARED_LIMIT
    return Figure(label, value, f"{value:.2f} x", f"at most {SHARED_LIMIT:g} x", passed, detail)


def _on_xfs(name: str) -> str:
    verb, comma, how = name.partition(",")
    return f"{verb} of q and v, on XFS{comma}{how}"


def _shared_disk(found: Shared, name: str) -> Figure:
    taken = median(found.disk[name])
    value = taken / found.changed
    detail = (
        f"{taken / 1e6:.1f} MB for {found.changed / 1e6:.1f} MB of {found.nbytes / 1e9:.2f} GB; "
        f"the disk's free bytes before and after; {runs(len(found.disk[name]), 'round')}"
    )
    label = f"{_on_xfs(name)}: new disk, of what changes"
    passed = value <= DISK_LIMIT
    return Figure(label, value, f"{value:.2f} x", f"at most {DISK_LIMIT:g} x", passed, detail)


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


def undo_kind_figures(passes: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Figure]:
    """Compare what an element of each kind of merge takes with the usual kind, the first one."""
    usual, *others = passes
    return [_undo_kind_figure(name, passes[name], usual, passes[usual]) for name in others]


def _undo_kind_figure(
    name: str, passes: Mapping[str, Sequence[float]], usual: str,
    usually: Mapping[str, Sequence[float]],
) -> Figure:  # fmt: skip
    def ratio(work: str) -> float:
        return median(a / b for a, b in zip(passes[work], usually[work], strict=True))

    def taken(work: str) -> str:
        return f"{median(passes[work]):.2f} ns against {median(usually[work]):.2f}"

    value = ratio("restore")
    detail = (
        f"of {usual}; back {taken('restore')}; merged with an undo patch {ratio('keep'):.2f} x, "
        f"{taken('keep')}; {len(passes['keep'])} passes"
    )
    return Figure(
        f"an element taken back in memory, {name}, against the usual case", value,
        f"{value:.2f} x", f"at most {UNDO_KIND_LIMIT:g} x", value <= UNDO_KIND_LIMIT, detail,
    )  # fmt: skip


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
- **Against the disk.** As many bytes as the model has are written straight to the disk, in blocks
  of 4 MiB past the page cache, room set aside before, and flushed; in turns with the merge. No work
  that leaves as many bytes can be faster.
- **On XFS**, on a loop device, an adapter of rank 8 on q and v shares what it does not touch. A
  copy that shares nothing, a merge, an un-merge and a swap take turns; what they read is in memory.
  Then the same with digests that `regraft digest` has kept (`--digest-cache`). New disk is what the
  file system has less of afterwards, everything counted.
- **Undo.** A merge without a patch, one with it and an un-merge take turns; ratios are taken
  within each round. Every other line of the table is with a patch, as that is the default.
- **Kinds of merges.** A tile of 256 by 2048 weights is merged in memory on one thread, with its
  undo kept, and taken back; rank 16 in all. The figure is CPU time of the way back over that of the
  usual case, bfloat16 with one adapter: the median of the ratios within each round.
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
