"""From what was measured to figures, each beside its target."""

from __future__ import annotations

from statistics import median

from benchmarks.huge.measure import CAPS, Measured, Taken
from benchmarks.shared.figures import Figure, cpu, mib, peak, runs, seconds_of
from benchmarks.shared.page import BEGIN, END
from benchmarks.shared.process import Sample
from regraft.tensors import parse_size

PLAN_LIMIT, DISK_LIMIT = 10.0, 1.1
NAMES = {"fp8": "as published (FP8, stays FP8)", "bf16": "in bfloat16"}


def figures_of(found: Measured) -> list[Figure]:
    """Return the lines of one format."""
    name = NAMES[found.kimi.format]
    return [
        _plan_figure(name, found),
        _time_figure(f"{name}: merge against a raw write of what changes", found, found.merge),
        _disk_figure(f"{name}: new disk of the merge, of what changes", found, found.merge),
        _peak_figure(name, found),
        _time_figure(f"{name}: un-merge against a raw write of what changes", found, found.unmerge),
        _disk_figure(f"{name}: new disk of the un-merge, of what changes", found, found.unmerge),
        _digest_figure(name, found),
    ]


def _plan_figure(name: str, found: Measured) -> Figure:
    value = median(seconds_of(found.plans))
    detail = (
        f"{found.tensors:,} tensors, {found.nbytes / 1e12:.2f} TB; CPU time {cpu(found.plans)}; "
        f"peak {mib(peak(found.plans))} MiB; {runs(len(found.plans), 'run')}"
    )
    passed = value < PLAN_LIMIT
    shown, target = f"{value:.1f} s", f"under {PLAN_LIMIT:g} s"
    return Figure(f"{name}: planned (`--dry-run`)", value, shown, target, passed, detail)


def _time_figure(name: str, found: Measured, taken: Taken) -> Figure:
    value = taken.sample.seconds / found.raw.seconds
    detail = (
        f"{taken.sample.seconds:.0f} s against {found.raw.seconds:.0f} s for "
        f"{found.changed / 1e9:.2f} GB of {found.nbytes / 1e12:.2f} TB; CPU time "
        f"{cpu([taken.sample])}; {_moved(taken.sample)}"
    )
    return Figure(name, value, f"{value:.1f} x", "-", None, detail)


def _moved(sample: Sample) -> str:
    return f"{sample.read_bytes / 1e9:.2f} GB read, {sample.written_bytes / 1e9:.2f} GB written"


def _disk_figure(name: str, found: Measured, taken: Taken) -> Figure:
    value = taken.disk / found.changed
    detail = f"{taken.disk / 1e9:.2f} GB against {found.changed / 1e9:.2f} GB"
    if taken is found.merge:
        detail += f"; the patch is {found.patch / 1e9:.2f} GB of it"
    passed = value <= DISK_LIMIT
    return Figure(name, value, f"{value:.2f} x", f"at most {DISK_LIMIT:g} x", passed, detail)


def _peak_figure(name: str, found: Measured) -> Figure:
    value, cap = found.merge.sample.peak_bytes, parse_size(CAPS[found.kimi.format])
    target = f"at most {mib(cap)} MiB"
    undone = mib(found.unmerge.sample.peak_bytes)
    detail = f"`--max-memory {CAPS[found.kimi.format]}`; un-merge {undone} MiB"
    label = f"{name}: peak resident memory of the merge"
    return Figure(label, value, f"{mib(value)} MiB", target, value <= cap, detail)


def _digest_figure(name: str, found: Measured) -> Figure:
    seconds = found.digest.seconds
    whole = seconds * found.nbytes / found.digest_bytes
    detail = (
        f"{seconds:.1f} s for one file of {found.digest_bytes / 1e9:.1f} GB, all holes but its "
        f"attention; {found.digest_bytes / 1e9 / seconds:.1f} GB/s; CPU time {cpu([found.digest])}"
    )
    label = f"{name}: digests of the whole base, once, reckoned from one file"
    return Figure(label, whole, f"{whole / 60:.1f} min", "-", None, detail)


INTRODUCTION = f"""# Benchmarks of a huge model

`make bench-huge` merges an adapter into a model of a trillion parameters and writes the table
below. The model has the names, shapes, dtypes and files of Kimi K2 (moonshotai/Kimi-K2-Instruct:
139,644 tensors in 61 files, 958 GiB, most of them FP8 with a scale for each block of 128 by 128),
or those of the same model in bfloat16 (1.9 TiB). The adapter has rank 8 on the five linear layers
of each attention, which are 0.6% of the model.

**What is real and what is not.** The files lie on an XFS on a loop device. The weights of the
attention layers are random numbers, read from the disk, merged and written. All other weights are
holes: they read as zeros and take up no room. So what an adapter touches is measured as it is,
and what it does not touch only where its names, headers and places count, which is all that a
merge looks at where blocks are shared and digests are known.

**Digests.** A receipt has the digest of every tensor. Where nothing is known of a base, a merge
reads and hashes all of it, reflinks or not: a terabyte from a disk of 2 GB/s takes ten minutes.
Whoever merges into one base more than once runs `regraft digest BASE` first, once, and gives
`--digest-cache`. Here the list that this leaves was laid down by the code that `regraft digest`
uses: attention weights and scales read and hashed, zeros hashed once for each size. The last line
of each format says what hashing one file takes, and reckons the whole from it; from holes, so a
disk's own time comes on top.

- **Planned** is `regraft merge ... --dry-run`: every header read, matched and laid out.
- **Raw write** is the physical limit: as many bytes as change, in blocks of 4 MiB, past the page
  cache, room set aside before, flushed; on the same file system.
- **New disk** is what the file system has less of afterwards, all counted: weights, headers,
  edges, receipt, index, the copy of the adapter, the patch.
- **Memory** is the largest resident set the kernel saw. A plan reckons with 4 KiB for each tensor,
  so 139,644 of them do not fit under the default cap of 512 MiB; the merge says so before it
  begins, and FP8 is measured with 1 GiB.

{BEGIN}
{END}
"""
