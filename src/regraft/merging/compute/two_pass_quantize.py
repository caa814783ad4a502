"""Weights that are put into a quantized format: their scales first, then their codes.

A scale needs a whole block of values, and a quantized scale all of them, so a weight is gone
through twice. The first pass is shared: whoever comes for a tile of codes helps to gather until
there is nothing left, and waits for the others.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from regraft.concurrency import Abandoned
from regraft.deltas.kernels import merge as kernels
from regraft.deltas.kernels.weights import Bytes, Floats, Sums, Weights
from regraft.merging.compute.step_math import StepMath
from regraft.merging.inputs.source import Source
from regraft.merging.planning.plan import Step
from regraft.merging.planning.tiles import Tile, tiles_of
from regraft.quant.grid import values_of
from regraft.quant.making import Maker, Making
from regraft.quant.rounding import account, codes_for
from regraft.quant.weight import Block


class Gathering:
    """One weight on its way into a format; safe to use from several threads.

    Attributes:
        widest: the most bytes that a tile of it reads.

    Args:
        step: what makes its codes.
        maker: the format.
        name, shape: the weight's.
        math: computes its values.
        source: what its source is read from.
        tile_bytes: the size that tiles are cut by.
    """

    def __init__(
        self, step: Step, maker: Maker, name: str, shape: tuple[int, ...], math: StepMath,
        source: Source, tile_bytes: int,
    ) -> None:  # fmt: skip
        self.step, self.math, self._source = step, math, source
        self.making: Making = maker.begin(name, shape)
        tiles = list(tiles_of(step, tile_bytes))
        self.widest = max(tile.read for tile in tiles)
        self._tiles: Iterator[Tile] = iter(tiles)
        # A tile is handed out and counted in ``_inside`` in one step. So when there is no tile left
        # and nobody is inside, all of the weight was gathered.
        self._changed = threading.Condition()
        self._inside, self._failed = 0, False
        self._small: Mapping[str, Bytes] | None = None

    def values(self, tile: Tile, raw: Bytes, room: Bytes, sums: Sums) -> tuple[Weights, Floats]:
        """Return a tile's weights and its values before they become codes.

        Args:
            tile: the tile.
            raw: takes the weights' bytes.
            room: takes the values, float32.
            sums: as in :func:`regraft.deltas.kernels.merge.merge_rows`; added to.
        """
        self._source.read(self.step.source, tile.read_at, raw)
        weights = Weights.of_bytes(raw, self.step.source.dtype)
        values = room[: 4 * raw.size // self.step.source.itemsize].view(np.float32)
        if self.step.segments:
            self.math.run(tile, weights, Weights.of_floats(values), sums)
        else:
            kernels.widen(*weights.arguments, values)
        return weights, values

    def gathered(self, raw: Bytes, room: Bytes) -> Mapping[str, Bytes]:
        """Return the small stored tensors by role, once all tiles were gone through.

        Raises:
            NumericError: the weight holds NaN or infinity.
            Abandoned: another thread failed.
        """
        while True:
            with self._changed:
                tile = next(self._tiles, None)
                if tile is None:
                    return self._wait()
                self._inside += 1
            try:
                sums: Sums = np.zeros(4, np.float64)
                _, values = self.values(tile, raw[: tile.read], room, sums)
                self.making.gather(Block(tile.rows, tile.columns), values)
            except BaseException:
                self.fail()
                raise
            finally:
                with self._changed:
                    self._inside -= 1
                    self._changed.notify_all()

    def _wait(self) -> Mapping[str, Bytes]:
        """Wait for those who are still at it; the last one makes the scales."""
        # Called with the lock held and no tile left to hand out, so those inside only get fewer.
        self._changed.wait_for(lambda: not self._inside or self._failed)
        if self._failed:
            raise Abandoned
        if self._small is None:
            self._small = self.making.finish()
        return self._small

    def fail(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def encode(
        self, tile: Tile, weights: Weights, values: Floats, rounding: str, key: int, coded: Sums
    ) -> Bytes:
        """Return the bytes of a tile's codes.

        Args:
            tile: the tile.
            weights, values: as :meth:`values` gives them.
            rounding: of :data:`regraft.quant.weight.ROUNDINGS`.
            key: says which random bits rounding takes.
            coded: added to: what survived of the delta and the noise, as in
                :func:`regraft.quant.rounding.requantize`, for a step with deltas.
        """
        at = Block(tile.rows, tile.columns)
        if rounding == "nearest" and not self.step.segments:
            return self.making.encode(at, values)
        block = self.making.start_codes(at, values)
        codes = block.codes
        if rounding != "nearest":
            width = self.step.matrix[1]
            first = at.rows[0] * width + at.columns[0]
            index = (first, width if block.rows > 1 else 0)
            codes = codes_for(block, weights.kind, values, rounding, key, index, np.zeros(2))
        if self.step.segments:
            after = np.empty(values.size, np.float32)
            values_of(replace(block, codes=codes), *Weights.of_floats(after).arguments)
            account(np.ascontiguousarray(weights.floats()), values, after, coded)
        if rounding == "nearest":
            return self.making.encode(at, values)
        return self.making.codec.pack(self.making.weight("F32", {}), at, codes)


class Gatherings:
    """The weights that are being made, by name; each lives until its last tensor is written."""

    def __init__(self, left: Counter[str]) -> None:
        """Begin with none.

        Args:
            left: how many tensors of each weight are still to be finished; counted down.
        """
        self._left = left
        self._open: dict[str, Gathering] = {}
        self._lock = threading.Lock()  # a weight is open from its first use to its last tensor

    def of(self, name: str, make: Callable[[], Gathering]) -> Gathering:
        """Return a weight's, made if it is not there."""
        with self._lock:
            if name not in self._open:
                self._open[name] = make()
            return self._open[name]

    def finish(self, name: str) -> None:
        """Count a tensor of a weight as finished, and let go of the weight's with the last one."""
        with self._lock:
            self._left[name] -= 1
            gathering = None if self._left[name] else self._open.pop(name, None)
        if gathering is not None:
            gathering.math.release()

    def fail(self) -> None:
        """Wake whoever waits for any."""
        with self._lock:
            found = list(self._open.values())
        for gathering in found:
            gathering.fail()
