"""The plan of a merge: one step per output tensor, known before any weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adapters.model import Adapter
from regraft.deltas.matrix_units import Units
from regraft.deltas.views import Delta, RowPatch, View
from regraft.deltas.whole import whole_of
from regraft.formats.checkpoint import Checkpoint
from regraft.merging.files.receipt import Action
from regraft.merging.inputs.dequantized_view import GGUF, Quantization
from regraft.merging.options import KEEP, ElementMethod
from regraft.merging.planning.base_drift import TrainedOn
from regraft.quant.weight import Decoder, QuantizedWeight
from regraft.tensors import TensorSpec, nbytes_of

if TYPE_CHECKING:
    from regraft.quant.making import Maker


@dataclass(frozen=True)
class Segment:
    """A range of rows of a stored weight and the deltas that fall on all of it, in order.

    Attributes:
        rows: the range.
        deltas: the deltas.
        method: how they become one; None for their sum.
    """

    rows: tuple[int, int]
    deltas: tuple[Delta, ...]
    method: ElementMethod | None = None


@dataclass(frozen=True)
class Made:
    """A weight that is put into a format, of which a step writes one stored tensor.

    Attributes:
        name, shape: the weight's.
        role: which of its stored tensors; ``codes`` for its codes.
        maker: the format.
        weight: how the finished weight is stored.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    maker: Maker
    weight: QuantizedWeight

    @property
    def scale_bytes(self) -> int:
        """What its scales take in memory meanwhile."""
        outputs = self.maker.outputs(self.name, self.shape)
        scales = [math.prod(o.shape) for o in outputs if o.role in ("absmax", "scales")]
        return SCALE_BYTES * sum(scales)


@dataclass(frozen=True)
class Step:
    """How one tensor of the output is made.

    Attributes:
        name: its name in the output.
        action: what is done, for the receipt.
        source: the tensor it is made from, the base's or an adapter's.
        source_adapter: the adapter ``source`` belongs to; None for the base.
        dtype: safetensors dtype of the result.
        shape: shape of the result; more rows than the source if ``patches`` append some.
        segments: ranges of rows in ascending order that cover the weight; empty for none.
        patches: rows to replace afterwards.
        coded: the quantized weight whose codes the result is; it keeps its scales. None for a
            result of plain values.
        made: the weight that is put into a format, if the result is a part of one.
        retyped: whether the blocks of ``coded`` are of another type than the base's.
    """

    name: str
    action: Action
    source: TensorSpec
    source_adapter: int | None
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    patches: tuple[RowPatch, ...] = ()
    coded: QuantizedWeight | None = None
    made: Made | None = None
    retyped: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        source = self.source
        if source.dtype == self.dtype and source.shape == self.shape:
            return source.nbytes
        return nbytes_of(self.dtype, self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the source as its deltas (or patches) see it.

        Of a convolution everything but the output channel is one axis; a stack of experts'
        matrices is one matrix of all their rows; a vector is a column.
        """
        if self.made is not None:
            width = self.made.shape[-1]
            return (self.source.numel // width, width)
        if self.coded is not None and isinstance(self.coded.codec, Decoder):
            rows = self.coded.shape[0]
            return (rows, self.source.numel // rows)
        columns = [delta.right.result[1] for delta in self.deltas if delta.right is not None]
        columns += [patch.values.result[1] for patch in self.patches]
        width = columns[0] if columns else max(self.source.numel, 1)
        return (self.source.numel // width, width)

    @property
    def is_invertible(self) -> bool:
        """Whether the base's tensor is computed back from the result, with what is kept of it."""
        named = self.source.name == self.name or self.coded is not None
        own = self.source_adapter is None and named
        made = self.made is not None or self.retyped
        # Of norms in GGUF that were stored with a constant added, too few digits are left.
        shifted = self.coded is not None and getattr(self.coded.codec, "added", 0.0) != 0.0
        return own and not (made or shifted) and bool(self.segments or self.patches)

    @property
    def is_copy(self) -> bool:
        """Whether the result is a stored tensor's bytes as they are."""
        computed = self.segments or self.patches or self.coded or self.made
        return not (computed or self.source.is_virtual) and self.source.dtype == self.dtype

    @property
    def stored(self) -> TensorSpec:
        """The stored tensor that it is made from: of a weight that stays quantized, its codes."""
        return self.source if self.coded is None else self.coded.codes

    @property
    def codes_of(self) -> QuantizedWeight | None:
        """The weight whose codes the result is, kept or made; None if it is none."""
        if self.made is not None:
            return self.made.weight if self.made.role == "codes" else None
        return self.coded

    @property
    def only_scales(self) -> bool:
        """Whether the result is a small tensor of a weight that is made, such as its scales.

        Its source is named, and read by the step of the codes.
        """
        return self.made is not None and self.codes_of is None

    @property
    def units(self) -> Units:
        """How what an undo keeps of the source is cut; tiles are cut between units."""
        height, width = self.matrix
        edges = [edge for segment in self.segments for edge in segment.rows if edge != height]
        return Units.of(height, width, edges)

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """Every delta of every segment."""
        if not self.segments:
            return ()
        return tuple(delta for segment in self.segments for delta in segment.deltas)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of what is applied, each once."""
        names: list[str] = [delta.feature for delta in self.deltas]
        return tuple(dict.fromkeys(names + ["token-rows"] * bool(self.patches)))

    @property
    def scales(self) -> tuple[float, ...]:
        """The distinct scales, in order."""
        return tuple(scale for _, scale in self._distinct())

    @property
    def adapters(self) -> tuple[int, ...]:
        """The adapter of each of :attr:`scales`."""
        return tuple(adapter for adapter, _ in self._distinct())

    def _distinct(self) -> tuple[tuple[int, float], ...]:
        return tuple(dict.fromkeys((delta.adapter, delta.scale) for delta in self.deltas))

    @property
    def factor_bytes(self) -> int:
        """Upper bound of the memory its factors take while it is worked on."""
        if not (self.segments or self.patches or self.made):
            return 0
        views = {(v.spec.path, v.spec.name): v.spec for v in self._views() if v.spec is not None}
        widest = max((_packed_bytes(segment) for segment in self.segments), default=0)
        scales = self.made.scale_bytes if self.made is not None else 0
        raw = 4 * sum(spec.numel for spec in views.values())
        return raw + widest + _factorization_bytes(self) + scales

    @property
    def adapter_tensors(self) -> tuple[tuple[Path, str], ...]:
        """The adapters' tensors that it takes as factors, by file and name."""
        return tuple({(v.spec.path, v.spec.name): None for v in self._views() if v.spec})

    @property
    def paths(self) -> frozenset[Path]:
        """The files it reads."""
        return frozenset([self.source.path, *(v.spec.path for v in self._views() if v.spec)])

    def _views(self) -> list[View]:
        views = [v for d in self.deltas for v in (d.left, d.right, d.magnitude) if v is not None]
        return views + [patch.values for patch in self.patches]


SCALE_BYTES = 20
"""What a scale takes while a weight is put into a format: a few float32."""


def kept_name(step: Step) -> str:
    """Return the base's tensor that a step is made from, as receipt and patch call it."""
    return step.stored.name


_FACTORIZATIONS = {"pissa": (46, 28), "olora": (40, 0)}
"""Bytes that LAPACK takes per element of a weight, itself included, and per element of the square
of its shorter side; measured."""


def _factorization_bytes(step: Step) -> int:
    rows, columns = step.matrix
    square = min(rows, columns) ** 2
    sizes = [_FACTORIZATIONS[delta.feature] for delta in step.deltas if delta.is_residual]
    return max((each * rows * columns + more * square for each, more in sizes), default=0)


def _packed_bytes(segment: Segment) -> int:
    rows = segment.rows[1] - segment.rows[0]
    if segment.method is not None:  # the factors of whole modules
        sizes = [(sum(whole_of(delta).shape), delta.rank) for delta in segment.deltas]
        return sum(4 * size * rank for size, rank in sizes)
    total = 0
    for delta in segment.deltas:
        columns = delta.right.result[1] if delta.right is not None else rows
        total += 4 * (rows + columns) * (delta.rank + 1)
    return total


@dataclass(frozen=True)
class OutputShard:
    """One weights file of the output: its name and its tensors in order."""

    name: str
    steps: tuple[Step, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(step.nbytes for step in self.steps)


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do. Made by :func:`regraft.plan`; reads headers only.

    Attributes:
        base: the opened base.
        adapters: the adapters in the order they are added.
        shards: output files.
        config_updates: what changes in ``config.json``.
        options: the choices that decide the bytes.
        memory: estimated peak resident memory in bytes.
        threads: worker threads.
        tile_bytes: bytes of weights worked on at a time by one thread.
        warnings: what the user should know.
        disk: bytes needed and bytes free where the output goes.
        out: the output folder, if given.
        quantization: how the base is quantized; ``base`` then has its weights as plain ones.
        trained_on: the base that the adapters were trained on, if another one was named.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    shards: tuple[OutputShard, ...]
    config_updates: Mapping[str, Any]
    options: Mapping[str, Any]
    memory: int
    threads: int
    tile_bytes: int
    warnings: tuple[str, ...]
    disk: Mapping[str, int] = field(default_factory=dict)
    out: str | None = None
    quantization: Quantization | None = None
    trained_on: TrainedOn | None = None

    @property
    def stored(self) -> Checkpoint:
        """The base as it is on disk."""
        return self.base if self.quantization is None else self.quantization.stored

    @property
    def is_gguf(self) -> bool:
        """Whether the output is one GGUF file: a base in GGUF whose format is kept."""
        kept = self.options.get("quantize") == KEEP
        return kept and self.quantization is not None and self.quantization.method == GGUF

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Every step, in the order of the output's files."""
        return tuple(step for shard in self.shards for step in shard.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def disk_bytes(self) -> int:
        """Bytes of tensor data in the output, and what an undo may take beside it, estimated."""
        if not self.options.get("undo"):
            return self.nbytes
        of_name = {step.name: step for step in self.steps}
        kept = sum(_undo_bytes(spec, of_name.get(n)) for n, spec in self.stored.tensors.items())
        adapters = sum(path.stat().st_size for a in self.adapters for path in a.files)
        return self.nbytes + kept + adapters

    def totals(self) -> dict[str, int]:
        """Return counts and sizes for summaries."""
        actions = Counter(step.action for step in self.steps)
        adapter_bytes = {
            (v.spec.path, v.spec.name): v.spec.nbytes
            for step in self.steps
            for v in step._views()
            if v.spec is not None
        }
        return {
            "tensors": len(self.steps),
            "merged": actions["merge"],
            "copied": actions["copy"],
            "converted": actions["convert"],
            "replaced": actions["replace"],
            "added": actions["add"],
            "parameters": sum(map(self._parameters, self.steps)),
            "bytes_read": sum(map(self._read_bytes, self.steps)) + sum(adapter_bytes.values()),
            "bytes_written": self.nbytes,
        }

    def _parameters(self, step: Step) -> int:
        """Return the parameters of the model that a step writes: codes count, scales do not."""
        if step.codes_of is not None:
            return step.source.numel
        if step.made is not None:
            return 0
        owner = self.quantization.owners.get(step.name) if self.quantization is not None else None
        if self.quantization is None or owner is None or step.source.is_virtual:
            return math.prod(step.shape)
        weight = self.quantization.weights[owner]  # of which a part is copied
        return math.prod(weight.shape) if step.name == weight.codes.name else 0

    def _read_bytes(self, step: Step) -> int:
        """Return the bytes that a step reads of its source; of a quantized weight, its stored
        bytes.
        """
        if step.only_scales:
            return 0  # it was read for the codes
        if step.source.is_virtual and self.quantization is not None:
            return sum(spec.nbytes for spec in self.quantization.stored_of(step.source.name))
        return step.source.nbytes

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready objects."""
        return {
            "base": self.base.source,
            "quantized": list(self.quantization.formats) if self.quantization else [],
            "adapters": [{"source": a.source, "weight": a.weight} for a in self.adapters],
            "out": self.out,
            "dtype": self.options.get("dtype"),
            "shards": [
                {"name": s.name, "bytes": s.nbytes, "tensors": len(s.steps)} for s in self.shards
            ],
            "steps": [_step_json(step) for step in self.steps],
            "totals": self.totals(),
            "config_updates": dict(self.config_updates),
            "memory": self.memory,
            "threads": self.threads,
            "disk": dict(self.disk),
            "warnings": list(self.warnings),
        }


UNDO_SHARE = 0.03
"""Of a tensor whose dtype stays or grows, more than what an undo of usual deltas takes."""


CODED_SHARE = 0.2
"""Of the codes of a weight that stays quantized, more than what an undo usually takes."""


def _undo_bytes(original: TensorSpec, step: Step | None) -> int:
    """Return about what an undo keeps of a base's tensor, rather too much than too little."""
    if step is not None and step.made is not None:
        return original.nbytes
    if step is not None and step.retyped:
        return original.nbytes
    if step is not None and step.coded is not None:
        return int(CODED_SHARE * original.nbytes)
    if step is None or step.source_adapter is not None or step.source.name != step.name:
        return original.nbytes
    if step.dtype not in (original.dtype, "F32") or step.source.is_virtual:
        return original.nbytes
    return int(UNDO_SHARE * original.nbytes) if step.is_invertible else 0


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "action": step.action,
        "features": list(step.features),
        "scales": list(step.scales),
        "adapters": list(step.adapters),
        "dtype": step.dtype,
        "shape": list(step.shape),
        "source": step.source.name,
        "bytes": step.nbytes,
        "memory": step.factor_bytes,
    }
