"""Is this the merge? Does it again, tile by tile, and compares with what a merged model holds.

Each tensor is first compared bit by bit, in the dtype it is stored in. One that differs is looked
at once more: with the merged weight in float32 beside it, the sums of
:mod:`regraft.deltas.kernels.agreement` tell roundings from a delta that is missing, doubled or of
another scale. Nothing of the merged model but names, shapes and numbers is relied on.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from regraft.adapters.model import Adapter
from regraft.concurrency import MemoryGate, for_each
from regraft.deltas.kernels.agreement import Agreement, Care, Fit
from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.errors import InputError, RegraftError, UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.merging.another_base import notes_of_another_base
from regraft.merging.compute.context import FACTOR_CACHE, PlanContext, factor_room
from regraft.merging.compute.factors import FactorStore
from regraft.merging.compute.tile_work import Computed, TileMemory
from regraft.merging.inputs.base import decoded_like, see
from regraft.merging.inputs.dequantized_view import GGUF, see_through
from regraft.merging.inputs.source import FileSource
from regraft.merging.options import MergeOptions
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.planner import make_plan
from regraft.merging.planning.quantized.gguf_output import decoded_to
from regraft.merging.planning.tiles import Tile
from regraft.numerics.conversions import KINDS
from regraft.progress import Progress, ProgressMeter
from regraft.tensors import DTYPES, WORKING_DTYPES, TensorSpec
from regraft.verifying.diagnosis import (
    Diagnosis,
    Facts,
    Shares,
    other_scales,
    touched,
    untouched,
)
from regraft.verifying.report import FINE, TensorVerdict
from regraft.verifying.tensor_locations import Place, Places, whole

_SAMPLE = 4096
"""Elements by which a tensor that stands in another's place is known."""

_MOST_SWAPPED = 256
"""With more tensors that are something else than this, none is searched for another's content."""


@dataclass(frozen=True)
class Judgement:
    """What came of doing the merge again.

    Attributes:
        tensors: one verdict per tensor, in the order of the merge, then what there is besides.
        touched: names of the tensors that an adapter has a say in.
        config: what the merged model's config says and the merge would not.
        warnings: what the user should know.
        another_base: which adapters were trained on another base, likewise.
    """

    tensors: tuple[TensorVerdict, ...]
    touched: frozenset[str]
    config: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    another_base: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Subject:
    """A tensor of the merge and where the merged model has it, in the dtype it has it in."""

    step: Step
    place: Place


def judge(
    merged: Checkpoint,
    base: Checkpoint,
    adapters: Sequence[Adapter],
    options: MergeOptions,
    progress: Progress | None = None,
) -> Judgement:
    """Compare every tensor of a merged model with the merge of adapters into a base.

    Raises:
        UnsupportedError: the merged model is quantized, and the options do not say how; or the base
            is in a way that is not known.
        MismatchError: adapters and base do not fit.
        MemoryCapError: the merge does not fit under the cap.
        RegraftError: something cannot be read, or an adapter holds NaN.
    """
    if options.quantize is None:
        _refuse_packed(merged)
    base, quantization = see(base, _decoded(base, merged, options))
    plan = make_plan(base, adapters, options, None, quantization=quantization)
    places = Places(merged, base)
    answers, subjects = _find(plan, places)
    with FilePool() as files:
        bench = _Bench(plan, files, base, adapters, options)
        told = ProgressMeter(progress, "verify", sum(subject.step.nbytes for subject in subjects))

        def work(subject: _Subject, own: _Bench) -> None:
            answers[subject.step.name] = own.judge(subject)
            told.add(subject.step.nbytes, subject.step.name)

        for_each(subjects, work, plan.threads, memory=bench.of_thread)
        _find_swapped(bench, subjects, answers)
    return Judgement(
        tuple(TensorVerdict(name, **vars(answer)) for name, answer in answers.items() if answer),
        frozenset(s.name for s in (*plan.steps, *(s.step for s in subjects)) if is_touched(s)),
        _config_differences(plan, merged),
        plan.warnings,
        notes_of_another_base(adapters, base, quantization),
    )


def _decoded(base: Checkpoint, merged: Checkpoint, options: MergeOptions) -> str | None:
    """Return the dtype that a base's weights were decoded to for a merged model."""
    in_gguf = merged.container == GGUF
    return decoded_to(base, options) if in_gguf else decoded_like(base, merged)


def _refuse_packed(merged: Checkpoint) -> None:
    try:
        quantized = see_through(merged)[1] is not None
    except InputError:  # in a way that is not known, or not whole
        quantized = True
    if quantized:
        raise UnsupportedError(
            "the merged model is quantized, and its packed bytes are not weights",
            where=merged.source, expected="a receipt that says how they were rounded",
            hint="Verify the 16-bit model that it was made from",
        )  # fmt: skip


def is_touched(step: Step) -> bool:
    """Whether an adapter has a say in a tensor."""
    return bool(step.segments or step.patches) or step.source_adapter is not None


def _find(plan: Plan, places: Places) -> tuple[dict[str, Diagnosis | None], list[_Subject]]:
    """Find every tensor; return what needs no look at its numbers, and what does."""
    answers: dict[str, Diagnosis | None] = {}
    subjects: list[_Subject] = []

    def add(step: Step, place: Place | str) -> None:
        answer = _unfit(step, place) if isinstance(place, Place) else _nowhere(place)
        answers[step.name] = answer
        if answer is None and isinstance(place, Place):
            subjects.append(_Subject(replace(step, dtype=place.dtype), place))

    found = {step.name: places.find(step) for step in plan.steps}
    for step in plan.steps:
        add(step, found[step.name])
    steps = {step.name: step for step in plan.steps}
    for other in places.extra(found.values(), steps):
        if isinstance(other, str):
            answers[other] = Diagnosis("extra", note=_stray(other))
        else:
            add(other, whole(places.merged.tensors[other.name]))
    return answers, subjects


def _nowhere(reason: str) -> Diagnosis:
    if reason:
        return Diagnosis("unjudged", note=reason)
    return Diagnosis("absent", note="the merged model does not have it")


def _stray(name: str) -> str:
    if ".lora_" in name:
        return "a factor of an adapter, which a merged model does not have"
    return "the merge has no such tensor"


def _unfit(step: Step, place: Place) -> Diagnosis | None:
    """Return why a tensor cannot be compared by its numbers; None if it can."""
    if place.shape != step.shape:
        note = f"it is {list(place.shape)}, and the merge {list(step.shape)}"
        return Diagnosis("shape", note=note)
    both = place.dtype in WORKING_DTYPES and step.dtype in WORKING_DTYPES
    if both or place.dtype == step.dtype:
        return None
    note = f"it is stored as {place.dtype}, and the merge is {step.dtype}"
    return Diagnosis("unjudged", note=note)


def _config_differences(plan: Plan, merged: Checkpoint) -> tuple[str, ...]:
    """Return what the config has to say of ties and the vocabulary, and does not."""
    found = []
    for path, value in plan.config_updates.items():
        here: object = merged.config
        for key in path.split("."):
            here = here.get(key) if isinstance(here, dict) else None
        if path.rpartition(".")[2] in _DECISIVE and merged.config is not None and here != value:
            found.append(f"{path} is {here}, and the merge makes it {value}")
    return tuple(found)


_DECISIVE = ("tie_word_embeddings", "vocab_size")


def _find_swapped(
    bench: _Bench, subjects: Sequence[_Subject], answers: dict[str, Diagnosis | None]
) -> None:
    """Among tensors that are something else, find those that hold what belongs to another."""
    plain = [s for s in subjects if s.step.coded is None and s.step.made is None]
    odd = [s for s in plain if _is_odd(answers[s.step.name])]
    if not 2 <= len(odd) <= _MOST_SWAPPED:
        return
    samples = [(subject.step, *bench.sample(subject)) for subject in odd]
    for step, has, _ in samples:
        owners = [
            other.name
            for other, _, due in samples
            if other.shape == step.shape and other is not step and _alike(has, due)
        ]
        if owners:
            note = f"it holds what belongs to {owners[0]}"
            answers[step.name] = Diagnosis("swapped", note=note)


def _is_odd(answer: Diagnosis | None) -> bool:
    return answer is not None and answer.verdict in ("other", "changed", "another-adapter")


def _alike(has: Floats, due: Floats) -> bool:
    """Whether two samples are the same but for rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.linalg.norm(has - due) <= 0.02 * np.linalg.norm(due))


# -- one tensor ------------------------------------------------------------------------------------


class _Bench:
    """Does steps of the merge again; each thread has one, and all share everything but memory."""

    def __init__(
        self, plan: Plan, files: FilePool, base: Checkpoint, adapters: Sequence[Adapter],
        options: MergeOptions,
    ) -> None:  # fmt: skip
        self._files, self._base, self._plan = files, base, plan
        self._adapters, self._options = adapters, options
        # A merge holds a tile and its result; here the merged model's and the base's come on top.
        tile_bytes = max(plan.tile_bytes // 2 // 4096, 1) * 4096
        self._context = PlanContext(
            plan, files, FactorStore(files, FACTOR_CACHE), FileSource(files),
            tile_bytes=tile_bytes, checks=False,
        )  # fmt: skip
        self._gate = MemoryGate(factor_room(plan))
        self._memory, self._beside = TileMemory(), list[TileMemory]()
        self._solo: dict[int, dict[str, Step]] = {}
        self._lock = threading.Lock()  # over ``_solo``: each plan is made once, while others wait

    def of_thread(self) -> _Bench:
        """Return the same bench with memory of its own, for one thread."""
        own = copy(self)
        own._memory, own._beside = TileMemory(), []
        return own

    def judge(self, subject: _Subject) -> Diagnosis:
        """Return what is to be said of one tensor."""
        with self._gate.holding(subject.step.factor_bytes):
            same, spread = self._compare(subject)
            self._context.finish(subject.step)
            if same:
                return Diagnosis("exact", 0.0)
            coded = subject.step.coded is not None or subject.step.made is not None
            if subject.step.dtype not in WORKING_DTYPES or coded:
                verdict = "other" if self._is_touched(subject.step) else "changed"
                return Diagnosis(verdict, note="its bytes are others")  # type: ignore[arg-type]
            return self._diagnose(subject, spread)

    def _is_touched(self, step: Step) -> bool:
        """Whether an adapter has a say in a tensor, or in the weight that it is a part of."""
        return is_touched(step if step.made is None else self._context.codes_of(step.made))

    def _diagnose(self, subject: _Subject, spread: float) -> Diagnosis:
        answer = self._in_dtype(subject, subject.place.dtype, spread)
        if answer.verdict in FINE or subject.place.dtype != "F32":
            return answer
        for dtype in ("BF16", "F16"):  # computed in it, and widened for the file
            with contextlib.suppress(_TooWideError):
                narrow = self._in_dtype(subject, dtype, spread)
                if narrow.verdict in FINE:
                    note = f"rounded to {DTYPES[dtype].config_name} before it was stored"
                    return replace(narrow, verdict="rounding", note=note)
        return answer

    def _in_dtype(self, subject: _Subject, dtype: str, spread: float) -> Diagnosis:
        """Return what is to be said of a tensor if it was computed in a dtype.

        Raises:
            _TooWideError: it holds values that the dtype cannot.
        """
        step = subject.step
        origin = self._origin(step)
        found = self._measure(subject, origin, spread, dtype)
        facts = Facts(
            is_touched(step),
            origin is not None and dtype not in (origin.dtype, "F32"),
            0.1 if any(delta.magnitude is not None for delta in step.deltas) else 0.0,
            self._other_scales(step),
        )
        if not facts.touched:
            return untouched(facts, found)
        return touched(facts, found, self._shares(subject, origin, dtype))

    def _other_scales(self, step: Step) -> tuple[tuple[float, str], ...]:
        if not step.deltas or len(step.adapters) != 1:
            return ()
        delta, adapter = step.deltas[0], self._adapters[step.deltas[0].adapter]
        settings = adapter.settings
        root = math.sqrt(settings.r) if settings.use_rslora else settings.r
        plain = adapter.weight * settings.lora_alpha / root / (delta.scale or 1.0)
        return (
            *other_scales(
                delta.scale, delta.rank, settings.lora_alpha, adapter.weight,
                rslora=settings.use_rslora,
            ),
            (plain, "the config's r and alpha were taken for the patterns' own"),
        )  # fmt: skip

    def _origin(self, step: Step) -> TensorSpec | None:
        """Return the base's tensor that a step's is measured against, None if there is none."""
        if step.source_adapter is None:
            return step.source
        spec = self._base.tensors.get(step.name)
        alike = spec is not None and spec.shape == step.shape and spec.dtype in WORKING_DTYPES
        return spec if alike else None

    # -- passes over a tensor --------------------------------------------------------------------

    def _done(self, step: Step, memory: TileMemory | None = None) -> Iterator[_DoneTile]:
        """Do a step, tile by tile.

        Args:
            step: the step; its dtype is that of the result.
            memory: the step's own, where several are done side by side.
        """
        work, memory = self._context.work_of(step), memory or self._memory
        for tile in self._context.tiles_of(step):
            result = memory.take("result", tile.write)
            yield _DoneTile(tile, result, work.run(tile, memory, result))
        if step.made is None:  # of a weight that is made, other tensors may be to come
            work.math.release()

    def _compare(self, subject: _Subject) -> tuple[bool, float]:
        """Return whether a tensor is the merge, bit for bit, and the delta's root mean square."""
        sums, same = np.zeros(4, np.float64), True
        for made in self._done(subject.step):
            sums += made.done.sums
            stored = self._stored(subject, made.tile.write_at, made.tile.write)
            same = same and _same_bytes(made.result, stored)
        squares = float(sums[1]) / max(subject.step.source.numel, 1)
        return same, math.sqrt(squares) if math.isfinite(squares) else 0.0

    def sample(self, subject: _Subject) -> tuple[Floats, Floats]:
        """Return the first elements of what a tensor holds, and of what it should hold."""
        if subject.step.dtype not in WORKING_DTYPES:
            return np.zeros(0, np.float32), np.ones(1, np.float32)
        made = next(self._done(replace(subject.step, dtype="F32")))
        has = self._stored_weights(subject, made.tile).floats()[:_SAMPLE]
        return has.copy(), made.result.view(np.float32)[:_SAMPLE].copy()

    def _measure(
        self, subject: _Subject, origin: TensorSpec | None, spread: float, dtype: str
    ) -> Agreement:
        found, step = Agreement(), subject.step
        care = Care(
            adapters=max(len(set(step.adapters)), 1),
            rank=max((delta.rank for delta in step.deltas), default=1),
            roundings=_roundings(step, origin, dtype),
            spread=spread,
        )
        for made in self._done(replace(step, dtype="F32")):
            merged = made.result.view(np.float32)
            weight = self._weight(step, origin, made)
            stored = _narrowed(self._stored_weights(subject, made.tile), dtype)
            found.take(weight, stored, merged, care)
        return found

    def _weight(self, step: Step, origin: TensorSpec | None, made: _DoneTile) -> Weights:
        """Return the base's weights of a tile; the merged ones where the base has none."""
        if origin is None or made.tile.kind == "append":
            return Weights.of_floats(made.result.view(np.float32))
        if origin == step.source:
            return Weights.of_bytes(made.done.raw, origin.dtype)
        at, count = made.tile.write_at // _F32_BYTES, made.tile.write // _F32_BYTES
        raw = self._memory.take("origin", count * origin.itemsize)
        self._files.read_into(origin, at * origin.itemsize, raw.data)
        return Weights.of_bytes(raw, origin.dtype)

    def _stored(self, subject: _Subject, offset: int, nbytes: int) -> Bytes:
        raw = self._memory.take("stored", nbytes)
        subject.place.read(self._files, offset, raw)
        return raw

    def _stored_weights(self, subject: _Subject, tile: Tile) -> Weights:
        """Return what the merged model has where a float32 result has a tile."""
        size = DTYPES[subject.place.dtype].bits // 8
        at, count = tile.write_at // _F32_BYTES, tile.write // _F32_BYTES
        return Weights.of_bytes(self._stored(subject, at * size, count * size), subject.place.dtype)

    # -- several adapters ------------------------------------------------------------------------

    def _shares(self, subject: _Subject, origin: TensorSpec | None, dtype: str) -> Shares | None:
        """Return how much of each adapter's delta a tensor holds; None where it cannot be said."""
        numbers = tuple(dict.fromkeys(subject.step.adapters))
        if len(numbers) < 2 or origin is None or subject.step.patches:
            return None
        steps = [self._alone(number).get(subject.step.name) for number in numbers]
        alone = [replace(step, dtype="F32") for step in steps if step is not None]
        cuts = [list(self._context.tiles_of(step)) for step in alone]
        if len(alone) < len(numbers) or any(step.source != origin for step in alone):
            return None
        if any(cut != cuts[0] for cut in cuts):
            return None
        fit = Fit(len(alone), KINDS[dtype])
        self._beside += [TileMemory() for _ in alone[len(self._beside) :]]
        together = map(self._done, alone, self._beside)
        for pieces in zip(*together, strict=True):
            weight = Weights.of_bytes(pieces[0].done.raw, origin.dtype).floats()
            stored = self._stored_weights(subject, pieces[0].tile).floats()
            fit.take(weight, stored, [made.result.view(np.float32) for made in pieces])
        labels = tuple(self._adapters[number].label for number in numbers)
        solved = fit.solve()
        return None if solved is None else Shares(solved[0], labels, solved[1])

    def _alone(self, number: int) -> dict[str, Step]:
        """Return the steps of a merge of one adapter alone."""
        with self._lock:
            if number not in self._solo:
                try:
                    plan = make_plan(
                        self._base, [self._adapters[number]], self._options, None,
                        quantization=self._plan.quantization,
                    )  # fmt: skip
                    self._solo[number] = {step.name: step for step in plan.steps}
                except RegraftError:  # it only fits together with the others
                    self._solo[number] = {}
            return self._solo[number]


_F32_BYTES = 4


_DORA_ROUNDINGS = 4
"""A tool that works in 16 bits rounds norms, factors, and their product with the weight."""


def _roundings(step: Step, origin: TensorSpec | None, dtype: str) -> int:
    """Return how often the weight may have been rounded besides, on its way to a dtype."""
    dora = any(delta.magnitude is not None for delta in step.deltas)
    converted = origin is not None and origin.dtype != dtype
    return converted + _DORA_ROUNDINGS * dora + any(delta.is_residual for delta in step.deltas)


class _TooWideError(Exception):
    """A tensor holds values that a dtype cannot."""


def _narrowed(stored: Weights, dtype: str) -> Weights:
    """Return weights in a dtype that can hold them.

    Raises:
        _TooWideError: it cannot.
    """
    if stored.kind == KINDS[dtype]:
        return stored
    narrow = Weights.of_bytes(np.empty(2 * stored.x32.size, np.uint8), dtype)
    narrow.take(stored, np.zeros(4, np.float64))
    if not np.array_equal(narrow.floats(), stored.x32, equal_nan=True):
        raise _TooWideError
    return narrow


@dataclass(frozen=True)
class _DoneTile:
    """A tile that was done: its place, its result's bytes, and what else came of it."""

    tile: Tile
    result: Bytes
    done: Computed


def _same_bytes(one: Bytes, other: Bytes) -> bool:
    words = one.size // 8 * 8
    fast = np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64))
    return fast and np.array_equal(one[words:], other[words:])
