"""What the steps of a plan share while they are computed, and the work that each of them is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from regraft.formats.files.reading import FilePool
from regraft.merging.compute.block_work import BlockWork
from regraft.merging.compute.factors import FactorStore
from regraft.merging.compute.requantize import Coder
from regraft.merging.compute.step_math import StepMath
from regraft.merging.compute.tile_work import CodedWork, MadeWork, PlainWork, TileWork
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.inputs.dequantized_view import Quantization, as_stored
from regraft.merging.inputs.source import FileSource, Source
from regraft.merging.inputs.stacking import plain_values
from regraft.merging.options import KEEP
from regraft.merging.planning.plan import Made, Plan, Step
from regraft.merging.planning.tiles import Tile, tiles_of
from regraft.quant.weight import Decoder

if TYPE_CHECKING:
    from regraft.merging.compute.two_pass_quantize import Gathering, Gatherings

FACTOR_CACHE = 32 * 2**20
"""Bytes of decoded adapter tensors kept for the next step that asks for them."""


def plain_source(plan: Plan, stored: Source) -> Source:
    """Return what gives the plain weights that a plan's steps read, the way they see them."""
    quantization = plan.quantization
    if quantization is not None and plan.options.get("quantize") == KEEP:
        turned = {name: as_stored(weight) for name, weight in quantization.weights.items()}
        return DequantizingSource(turned, stored)
    return seen_through(quantization, stored)


def seen_through(quantization: Quantization | None, stored: Source) -> Source:
    """Return what gives a base's plain weights, from what gives its stored tensors."""
    return stored if quantization is None else plain_values(quantization, stored)


def factor_room(plan: Plan) -> int:
    """Return the bytes that the factors of all steps under way may take: those of any one fit."""
    return max([step.factor_bytes for step in plan.steps] + [2 * FACTOR_CACHE])


class PlanContext:
    """What the steps of a plan share; safe to use from several threads.

    Attributes:
        store: the adapters' tensors.
        source: gives the plain weights of the base.
        tile_bytes: the size that tiles are cut by.
    """

    def __init__(
        self, plan: Plan, files: FilePool, store: FactorStore, stored: Source, *,
        tile_bytes: int | None = None, checks: bool = True, norms: bool = True,
    ) -> None:  # fmt: skip
        """Take a plan and what its tensors are read from.

        Args:
            plan: the plan.
            files: the open files of the adapters.
            store: the adapters' tensors.
            stored: gives the base's stored tensors.
            tile_bytes: the size that tiles are cut by; by default the plan's.
            checks: whether inputs are refused that a merge may not take: NaN in an adapter's whole
                tensor, and codes that packing would not give again.
            norms: whether sums of plain values have those of weights and deltas.
        """
        self._plan, self.store = plan, store
        self.source, self._files = plain_source(plan, stored), FileSource(files)
        self.tile_bytes = plan.tile_bytes if tile_bytes is None else tile_bytes
        self._checks, self._norms = checks, norms
        made = [(step.made.name, step) for step in plan.steps if step.made is not None]
        self._codes = {name: step for name, step in made if step.codes_of is not None}
        self._gatherings = _gatherings(Counter(name for name, _ in made))

    def source_of(self, step: Step) -> Source:
        """Return what a step's source is read from."""
        return self.source if step.source_adapter is None else self._files

    def tiles_of(self, step: Step) -> Iterator[Tile]:
        """Yield a step's tiles in order."""
        return tiles_of(step, self.tile_bytes, self.source_of(step).grain(step.source))

    def codes_of(self, made: Made) -> Step:
        """Return the step that makes the codes of a weight that is put into a format."""
        return self._codes[made.name]

    def work_of(self, step: Step, *, keeps: bool = False) -> TileWork:
        """Return what does a step's tiles; ``keeps`` is whether what takes them back is wanted."""
        options, source = self._plan.options, self.source_of(step)
        if step.made is not None:
            gathering = self._gathering(step.made)
            return MadeWork(step, gathering, options["rounding"], options["seed"])
        if step.coded is not None:
            if not isinstance(source, DequantizingSource):
                raise TypeError("codes come from a quantized base")
            if isinstance(step.coded.codec, Decoder):
                return BlockWork(
                    step, self.store, source, options["rounding"], options["seed"],
                    self.tile_bytes, keeps=keeps,
                )  # fmt: skip
            coder = Coder(step.coded, options["rounding"], options["seed"])
            return CodedWork(
                step, self.store, source, coder, self.tile_bytes, keeps=keeps, checks=self._checks
            )
        return PlainWork(
            step, self.store, partial(source.read, step.source), self.tile_bytes, keeps=keeps,
            checks=self._checks, norms=self._norms, zero_signs=not step.source.is_virtual,
        )  # fmt: skip

    def _gathering(self, made: Made) -> Gathering:
        from regraft.merging.compute.two_pass_quantize import Gathering  # compiled, and rare

        def make() -> Gathering:
            codes = self._codes[made.name]
            source = self.source_of(codes)
            read = partial(source.read, codes.source)
            math = StepMath(codes, self.store, read, self.tile_bytes)
            return Gathering(
                codes, made.maker, made.name, made.shape, math, source, self.tile_bytes
            )

        assert self._gatherings is not None  # the plan has such steps
        return self._gatherings.of(made.name, make)

    def finish(self, step: Step) -> None:
        """Count a step as done; with the last one of a weight that is made, let go of that."""
        if step.made is not None and self._gatherings is not None:
            self._gatherings.finish(step.made.name)

    def fail(self) -> None:
        """Wake whoever waits for the scales of a weight."""
        if self._gatherings is not None:
            self._gatherings.fail()


def _gatherings(left: Counter[str]) -> Gatherings | None:
    if not left:
        return None
    from regraft.merging.compute.two_pass_quantize import Gatherings  # compiled; few merges need it

    return Gatherings(left)


def _has_rows(step: Step) -> bool:
    return bool(step.segments) or step.codes_of is not None


def largest_tile(plan: Plan) -> int:
    """Return the largest tile's bytes: the tile size, or more where a row may not be split."""
    widest = max(
        (step.matrix[1] * step.source.itemsize for step in plan.steps if _has_rows(step)), default=0
    )
    whole_rows = max(
        (tile.read for step in plan.steps if _has_rows(step) and widest > plan.tile_bytes
         for tile in tiles_of(step, plan.tile_bytes)), default=0,
    )  # fmt: skip
    return max(plan.tile_bytes, whole_rows)
