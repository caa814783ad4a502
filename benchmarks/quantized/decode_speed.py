"""How fast codes become values and values codes, in memory, on one thread.

    python benchmarks/quantized/decode_speed.py OUT.json [--small]

Writes ``{name: G elements/s}``. A weight is gone through in tiles, as a merge does it: what a tile
takes from its stored bytes to bfloat16 is timed, and likewise from values to stored bytes.
bitsandbytes is given the same tiles, one call each. All times are CPU time of the process, so that
neither a second thread nor others on the machine make a figure better or worse than it is.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # read when bitsandbytes' library is loaded

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from regraft.deltas.kernels.weights import Weights
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.grid import values_of
from regraft.quant.making import Maker
from regraft.quant.registry import maker_of
from regraft.quant.rounding import codes_for
from regraft.quant.weight import FORMATS, Block, QuantizedWeight
from regraft.tensors import TensorSpec, nbytes_of

ROWS, COLUMNS = 8960, 1536
TILE_ROWS = 682
"""Rows whose bfloat16 values are 2 MiB, the size of a merge's tiles."""

SECONDS = 2.0
"""Each figure is the median of as many passes as begin in this time."""


class Held:
    """A weight quantized by regraft whose stored tensors lie in memory."""

    def __init__(self, maker: Maker, values: Floats) -> None:
        shape = values.shape
        self.values, self.maker = values, maker
        making = maker.begin("w", shape)
        for at in tiles(*shape):
            making.gather(at, tile_of(values, at))
        self.parts = dict(making.finish())
        codes = [making.encode(at, tile_of(values, at)) for at in tiles(*shape)]
        self.parts["codes"] = np.concatenate(codes)
        self.weight: QuantizedWeight = making.weight("BF16", self._specs())
        self.raw = np.empty(nbytes_of("BF16", (TILE_ROWS, shape[1])), np.uint8)

    def _specs(self) -> dict[str, TensorSpec]:
        outputs = self.maker.outputs("w", self.values.shape)
        return {
            out.role: TensorSpec(
                out.role, out.dtype, out.shape, Path("memory"), 0, nbytes_of(out.dtype, out.shape)
            )
            for out in outputs
        }

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        buffer[:] = self.parts[spec.name][offset : offset + buffer.size]

    def decode(self) -> None:
        """Turn every tile into bfloat16."""
        for at in tiles(*self.weight.shape):
            block = self.weight.grid.block(self.weight, at, self.read)
            raw = self.raw[: 2 * at.height * at.width]
            values_of(block, *Weights.of_bytes(raw, "BF16").arguments)

    def requantizer(self, rounding: str) -> Callable[[], None]:
        """Return what rounds values a little off the grid to it, codes read and packed."""
        rng = np.random.default_rng(1)
        shift = rng.standard_normal(self.values.shape, dtype=np.float32) * np.float32(1e-4)
        moved = self._decoded() + shift
        kind, sums, width = 1, np.zeros(2, np.float64), self.weight.shape[1]

        def requantize() -> None:
            for at in tiles(*self.weight.shape):
                block = self.weight.grid.block(self.weight, at, self.read)
                values = tile_of(moved, at)
                index = (at.rows[0] * width, width)
                codes = codes_for(block, kind, values, rounding, 7, index, sums)
                self.weight.grid.pack(self.weight, at, codes)

        return requantize

    def _decoded(self) -> Floats:
        found = np.empty(self.weight.shape, np.float32)
        for at in tiles(*self.weight.shape):
            block = self.weight.grid.block(self.weight, at, self.read)
            raw = self.raw[: 2 * at.height * at.width]
            view = Weights.of_bytes(raw, "BF16")
            values_of(block, *view.arguments)
            found[slice(*at.rows)] = view.floats().reshape(at.height, at.width)
        return found

    def make(self) -> None:
        """Quantize the weight anew."""
        Held(self.maker, self.values)


def tiles(rows: int, columns: int) -> Iterator[Block]:
    for first in range(0, rows, TILE_ROWS):
        yield Block((first, min(first + TILE_ROWS, rows)), (0, columns))


def tile_of(values: Floats, at: Block) -> Floats:
    return values[slice(*at.rows)].reshape(-1)


def speed(work: Callable[[], object], elements: int, seconds: float) -> float:
    """Return G elements/s: the median of passes, after one that is not counted."""
    work()
    taken, end = list[float](), time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return elements / median(taken) / 1e9


def ours(values: Floats, seconds: float) -> dict[str, float]:
    """Measure regraft in every format."""
    makers = {name: maker_of(name, dtype="BF16") for name in FORMATS if name != "fp4"}
    makers["nf4, double"] = maker_of("nf4", dtype="BF16", nested=True)
    found: dict[str, float] = {}
    for name, maker in makers.items():
        held = Held(maker, values)
        found[f"decode {name}"] = speed(held.decode, values.size, seconds)
        work = held.requantizer("stochastic")
        found[f"requantize {name}"] = speed(work, values.size, seconds)
        found[f"quantize {name}"] = speed(held.make, values.size, seconds)
    return found


def theirs(values: Floats, seconds: float) -> dict[str, float]:
    """Measure bitsandbytes with NF4, plain and double."""
    torch.set_num_threads(1)
    weights = [torch.from_numpy(values[slice(*at.rows)]).bfloat16() for at in tiles(*values.shape)]
    found: dict[str, float] = {}
    for name, nested in (("nf4", False), ("nf4, double", True)):

        def quantize(nested: bool = nested) -> list[tuple[torch.Tensor, object]]:
            return [
                quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
                for w in weights
            ]

        made = quantize()

        def decode(made: list[tuple[torch.Tensor, object]] = made) -> None:
            for codes, state in made:
                dequantize_4bit(codes, state)

        found[f"decode {name}"] = speed(decode, values.size, seconds)
        found[f"quantize {name}"] = speed(quantize, values.size, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="a small weight, and one pass")
    options = parser.parse_args()
    rows, seconds = (2 * TILE_ROWS, 0.0) if options.small else (ROWS, SECONDS)
    values = np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=np.float32)
    values *= np.float32(0.02)
    found = {"regraft": ours(values, seconds), "bitsandbytes": theirs(values, seconds)}
    options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
