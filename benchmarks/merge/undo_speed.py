"""How fast merges of several kinds are taken back, in memory, on one thread.

    python benchmarks/merge/undo_speed.py OUT.json [--small]

Writes ``{case: {"keep": [...], "restore": [...]}}``: of each pass, nanoseconds an element of a
merge that keeps its undo, and of the way back. The usual case is bfloat16 with one adapter; passes
of all cases take turns. All have rank 16 in all, so that their products cost the same. Times are
CPU time of the thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from regraft.deltas.kernels import merge as kernels
from regraft.deltas.kernels.weights import Weights
from regraft.deltas.matrix_units import Units
from regraft.deltas.undo.units import Decoder, Encoder, TileCorrection, TileRows, merge
from regraft.tensors import DTYPES

ROWS, COLUMNS, RANK, PASSES = 256, 2048, 16, 25
SIZE, RELATIVE = 0.02, 0.005
"""Root mean square of the weights, and that of the delta over it."""

USUAL = "bfloat16, one adapter"
CASES = {
    USUAL: ("BF16", "BF16", (0,)),
    "bfloat16, DoRA": ("BF16", "BF16", (kernels.ROW_FACTOR,)),
    "bfloat16, two adapters": ("BF16", "BF16", (0, 0)),
    "bfloat16 into float16": ("BF16", "F16", (0,)),
    "bfloat16 into float32": ("BF16", "F32", (0,)),
    "float16, one adapter": ("F16", "F16", (0,)),
    "float32, one adapter": ("F32", "F32", (0,)),
}
"""Dtypes of base and output, and the flags of each delta."""

Work = Callable[[], object]


def tile_of(source: str, merged: str, flags: tuple[int, ...], rows: int) -> TileRows:
    """Return a tile of random weights with deltas of the given flags."""
    rng, count, rank = np.random.default_rng(0), rows * COLUMNS, RANK // len(flags)
    values = (rng.standard_normal(count) * SIZE).astype(np.float32)
    weights = Weights.of_bytes(np.zeros(count * DTYPES[source].bits // 8, np.uint8), source)
    weights.take(Weights.of_floats(values), np.zeros(4, np.float64))
    result = Weights.of_bytes(np.zeros(count * DTYPES[merged].bits // 8, np.uint8), merged)
    table = np.array(
        [(rows * rank * d, COLUMNS * rank * d, rank, flag, 0) for d, flag in enumerate(flags)],
        np.int64,
    )
    left = rng.standard_normal(rows * RANK) * (RELATIVE * SIZE / RANK**0.5)
    return TileRows(
        weights, result, rows, COLUMNS, 0, 0, left.astype(np.float32),
        rng.standard_normal(COLUMNS * RANK).astype(np.float32), COLUMNS, table,
        np.ones(len(flags), np.float32),
        (1 + 0.01 * rng.standard_normal(rows)).astype(np.float32), 0,
    )  # fmt: skip


def works(source: str, merged: str, flags: tuple[int, ...], rows: int) -> tuple[Work, Work]:
    """Return a merge of a tile that keeps its undo, and its way back, once it was right."""
    run = tile_of(source, merged, flags, rows)
    units, item, encoder = Units.of(rows, COLUMNS, []), DTYPES[source].bits // 8, Encoder()
    raw = (run.source.x32 if source == "F32" else run.source.x16).view(np.uint8)
    back = np.zeros_like(raw)

    def keep() -> TileCorrection:
        encoder.begin(units, 0, units.count, item)
        merge(run, np.zeros(4, np.float64), encoder)
        return encoder.finish(raw)

    kept = keep()
    undone = replace(run, source=Weights.of_bytes(back, source))

    def restore() -> object:
        decoder = Decoder(units, 0, units.count, kept, item)
        decoder.restore(undone)
        return decoder.finish(back)

    if not restore() or not np.array_equal(raw, back):
        raise SystemExit(f"{source} into {merged} did not come back")
    return keep, restore


def nanoseconds(work: Work, elements: int) -> float:
    """Return what a pass takes for an element, in CPU time."""
    started = time.thread_time()
    work()
    return (time.thread_time() - started) / elements * 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="a small tile, and one pass")
    options = parser.parse_args()
    rows, passes = (8, 1) if options.small else (ROWS, PASSES)
    ready = {name: works(*case, rows) for name, case in CASES.items()}
    found = {name: {"keep": list[float](), "restore": list[float]()} for name in CASES}
    for _ in range(passes):
        for name, (keep, restore) in ready.items():
            found[name]["keep"].append(nanoseconds(keep, rows * COLUMNS))
            found[name]["restore"].append(nanoseconds(restore, rows * COLUMNS))
    options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
