"""The figures of work on 4-bit models, and the text around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from benchmarks.shared import figures
from benchmarks.shared.figures import Figure, cpu, mib, peak, runs, seconds_of, spread
from benchmarks.shared.page import BEGIN, END
from benchmarks.shared.process import Sample

MERGE_LIMIT = 5.0
QUANTIZE_LIMIT = 20.0
DECODE_LIMIT = 1.0
PEAK_LIMIT = 512 * 2**20
RECORD = "for the record"

Samples = Mapping[str, Sequence[Sample]]
Speeds = Mapping[str, Mapping[str, float]]


def merge_figures(samples: Samples) -> list[Figure]:
    """Compare merges out of 4 bits with PEFT's of the same round."""
    name = "merge out of 4 bits against transformers, bitsandbytes and PEFT"
    pairs = (("merge", ""), ("no undo", ", `--no-undo`"))
    return [_faster(name + what, samples["peft"], samples[key], MERGE_LIMIT) for key, what in pairs]


def _faster(
    name: str, theirs: Sequence[Sample], ours: Sequence[Sample], limit: float | None
) -> Figure:
    """Return how many times faster one is: the median of the ratios within each round."""
    slow, fast = seconds_of(theirs), seconds_of(ours)
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    value = median(ratios)
    detail = (
        f"{spread(slow)} against {spread(fast)}; ratios {min(ratios):.1f} to {max(ratios):.1f}; "
        f"CPU time {cpu(theirs)} against {cpu(ours)}; {mib(peak(theirs))} MiB at peak against "
        f"{mib(peak(ours))} MiB; {runs(len(ratios), 'round')}"
    )
    return _at_least(f"{name}, times faster", value, "x", limit, detail)


def _at_least(name: str, value: float, unit: str, limit: float | None, detail: str) -> Figure:
    shown = f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    if limit is None:
        return Figure(name, value, shown, RECORD, None, detail)
    return Figure(name, value, shown, f"at least {limit:g} {unit}", value >= limit, detail)


def peak_figure(samples: Samples) -> Figure:
    """Return the largest peak of any process of regraft at the usual size."""
    names = ("merge", "no undo", "quantize", "quantize, double")
    peaks = {name: max(s.peak_bytes for s in samples[name]) for name in names}
    value = max(peaks.values())
    detail = "; ".join(f"{name} {mib(nbytes)} MiB" for name, nbytes in peaks.items())
    return Figure(
        "largest peak resident memory of a merge or a quantization", value, f"{mib(value)} MiB",
        "at most 512 MiB", value <= PEAK_LIMIT, detail,
    )  # fmt: skip


def growth_figure(merges: Sequence[Sample], large: Sample, scale: int) -> Figure:
    """Compare the peak of a merge with that of a merge into a larger base."""
    name = f"peak of a merge out of 4 bits at {scale} times the layers, against the usual one"
    return replace(figures.growth_figure(merges, large, scale), name=name)


def quantize_figures(
    samples: Samples, calls: Mapping[str, Sequence[float]], speeds: Speeds
) -> list[Figure]:
    """Compare quantizing with bitsandbytes: whole processes, its calls alone, and in memory."""
    found = []
    for suffix, option in (("", ""), (", double", " --double-quant")):
        theirs, ours = samples[f"bitsandbytes{suffix}"], samples[f"quantize{suffix}"]
        name = f"`quantize --to nf4{option}` against bitsandbytes"
        found.append(_faster(f"{name}, whole processes", theirs, ours, QUANTIZE_LIMIT))
        alone = calls[f"bitsandbytes{suffix}"]
        ratio = median(alone) / median(seconds_of(ours))
        detail = (
            f"{spread(alone)} in `quantize_4bit` alone, without reading and writing, against "
            f"{spread(seconds_of(ours))} of the whole process of regraft; "
            f"{runs(len(alone), 'round')}"
        )
        found.append(_at_least(f"{name}, its calls alone, times faster", ratio, "x", None, detail))
        found.append(_in_memory(name, f"quantize nf4{suffix}", speeds, QUANTIZE_LIMIT))
    return found


def _in_memory(name: str, key: str, speeds: Speeds, limit: float | None) -> Figure:
    ours, theirs = speeds["regraft"][key], speeds["bitsandbytes"][key]
    detail = f"{ours:.2f} against {theirs:.3f} G elements/s"
    return _at_least(f"{name}, in memory on one thread, times faster", ours / theirs, "x", limit,
                     detail)  # fmt: skip


def speed_figures(speeds: Speeds) -> list[Figure]:
    """Return the speeds of decoding and of rounding back to codes."""
    unit = "G elements/s"
    found = []
    for name in ("nf4", "nf4, double", "int8", "fp8"):
        key = f"decode {name}"
        other = speeds["bitsandbytes"].get(key)
        value = speeds["regraft"][key]
        detail = f"bitsandbytes {other:.2f}, {other / value:.1f} times as fast" if other else "-"
        limit = DECODE_LIMIT if name.startswith("nf4") else None
        found.append(_at_least(f"{name} to bfloat16 on one thread", value, unit, limit, detail))
    for name in ("nf4", "nf4, double", "int8", "fp8"):
        value = speeds["regraft"][f"requantize {name}"]
        what = f"values beside the grid to codes ({name}) on one thread, stochastic"
        found.append(_at_least(what, value, unit, None, "bitsandbytes does not do this"))
    return found


INTRODUCTION = f"""# Benchmarks of quantized work

`make bench-quantized` measures merges out of 4 bits, quantizing, and the kernels beneath, against
the libraries that do the same. Like [the other figures](benchmarks.md), times are those of whole
processes, with the interpreter's start, the imports, all digests and the flush to the disk. The
base is a checkpoint of random weights in the shape of Qwen2.5-1.5B (3.1 GB in bfloat16), put into
NF4 by `regraft quantize` (1.2 GB); the adapter has rank 16 on all linear layers. Everything runs on
the CPU.

- **Merge.** `regraft merge BASE4BIT ADAPTER -o OUT` writes plain bfloat16 weights. The peer
  ([peft_merge.py](../benchmarks/quantized/peft_merge.py)) loads the model with
  `from_pretrained`, calls `dequantize()`, loads the adapter with PEFT, `merge_and_unload` and
  `save_pretrained`; it writes the same weights. (PEFT can also merge into the 4-bit layers, but
  that rounds every weight to codes again: see [what survives](benchmarks-qlora.md).)
- **Quantizing.** The peer
  ([bitsandbytes_quantize.py](../benchmarks/quantized/bitsandbytes_quantize.py))
  reads each file with safetensors, calls `quantize_4bit` for each linear layer and saves with
  `save_file`. It uses one core; codes and scales are the same, byte for byte.
- The commands take turns, and which goes first rotates. The figure is the median of the ratios
  within each round. Inputs are in the page cache. The peers do not flush what they wrote, and are
  not asked to.
- **Memory** is the largest resident set the kernel saw (`VmHWM`, as `ru_maxrss` has it); for the
  peers that includes the pages of the base they map.
- **In memory on one thread**
  ([decode_speed.py](../benchmarks/quantized/decode_speed.py)): a weight of 8960 by 1536 in tiles of
  2 MiB of bfloat16, CPU time, the median of the passes of some seconds. Packing and unpacking of
  codes is included; so are, for double quantization, the scales.

{BEGIN}
{END}
"""
