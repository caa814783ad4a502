"""The files that a plan makes, and a digest of what it does."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from regraft.deltas.views import Origin
from regraft.formats.safetensors import build_header
from regraft.merging.files.direct_io import BLOCK, whole_blocks
from regraft.merging.planning.plan import OutputShard, Plan, Segment, Step
from regraft.quant.weight import QuantizedWeight
from regraft.tensors import TensorSpec

_ENCODER = json.JSONEncoder(default=str)


@dataclass(frozen=True)
class Target:
    """A weights file to be made.

    Attributes:
        name: its name in the folder.
        size: its bytes.
        pieces: what it holds besides tensors: offset and bytes.
        steps: its tensors.
        offsets: where each begins in the file.
    """

    name: str
    size: int
    pieces: tuple[tuple[int, bytes], ...]
    steps: tuple[Step, ...]
    offsets: tuple[int, ...]


def merge_targets(plan: Plan) -> list[Target]:
    """Return the files of a plan: safetensors, the tensors one after the other.

    Headers end in spaces, as many as it takes for tensors that are only copied to lie in a block of
    the disk as they do in the base's file: blocks that meet may be shared.
    """
    if plan.is_gguf:
        return [_gguf_target(plan)]
    targets = []
    for shard in plan.shards:
        entries = [(step.name, step.dtype, step.shape) for step in shard.steps]
        header = build_header(entries, {"format": "pt"}, **_beginning(shard))
        offsets, at = [], len(header)
        for step in shard.steps:
            offsets.append(at)
            at += step.nbytes
        targets.append(Target(shard.name, at, ((0, header),), shard.steps, tuple(offsets)))
    return targets


def _gguf_target(plan: Plan) -> Target:
    """Return the one GGUF file of a plan; what lies between its tensors are zeros."""
    from regraft.merging.planning.quantized.gguf_output import gguf_head  # which few plans need

    head, shard = gguf_head(plan, plan_digest(plan)), plan.shards[0]
    offsets = tuple(head.offsets[step.name] for step in shard.steps)
    return Target(shard.name, head.size, ((0, head.content),), shard.steps, offsets)


def _beginning(shard: OutputShard) -> dict[str, int]:
    """Return where the data of a file are to begin, as :func:`build_header` takes it.

    That is where in a block most bytes of large tensors that are only copied lie as they do in
    their own safetensors file. Where there are none, and where it would be no multiple of 8, data
    begin at the next multiple of 8.
    """
    meeting, at = Counter[int](), 0
    for step in shard.steps:
        large = step.nbytes >= 2 * BLOCK  # wherever it begins, it has a whole block
        if step.is_copy and large and step.source.path.suffix == ".safetensors":
            meeting[(step.source.start - at) % BLOCK] += step.nbytes
        at += step.nbytes
    best = max(meeting, key=lambda begin: (meeting[begin], -begin), default=None)
    return {} if best is None or best % 8 else {"align": BLOCK, "remainder": best}


OriginOf = Callable[[Step], TensorSpec | None]
"""Gives the tensor of a file that has the bytes a step copies; None where these are computed."""


@dataclass(frozen=True)
class Alike:
    """Bytes of a file to be made that lie in another file just so, with no other between them.

    Attributes:
        offset: where they begin in the file to be made.
        nbytes: how many.
        first: the tensor of the other file that they begin with.
    """

    offset: int
    nbytes: int
    first: TensorSpec


def own_source(step: Step) -> TensorSpec | None:
    """Return a step's source, where sources are read from their own files."""
    return step.source


def alike_ranges(target: Target, origin: OriginOf) -> list[Alike]:
    """Return what of a file lies in blocks as it does in files that are there, in order.

    Tensors that follow each other in both files are one range: a block that holds the end of one
    and the beginning of the next lies alike, too.
    """
    found: list[Alike] = []
    for step, offset in zip(target.steps, target.offsets, strict=True):
        spec = origin(step) if step.is_copy else None
        if spec is None or (spec.start - offset) % BLOCK:
            continue
        if found and _follows(found[-1], offset, spec):
            last = found.pop()
            found.append(Alike(last.offset, last.nbytes + step.nbytes, last.first))
        else:
            found.append(Alike(offset, step.nbytes, spec))
    return found


def _follows(last: Alike, offset: int, spec: TensorSpec) -> bool:
    """Whether a tensor comes right after a range, here and there."""
    there = last.first.path == spec.path and last.first.start + last.nbytes == spec.start
    return there and last.offset + last.nbytes == offset


def shared_bytes(targets: Iterable[Target], origin: OriginOf = own_source) -> int:
    """Return how many bytes of files to be made are whole blocks of files that are there."""
    alike = [each for target in targets for each in alike_ranges(target, origin)]
    return sum(last - first for first, last in (whole_blocks(a.offset, a.nbytes) for a in alike))


def plan_digest(plan: Plan) -> str:
    """Return a digest of what a plan does to tensors, whatever files they lie in."""
    steps = sorted(plan.steps, key=lambda step: step.name)
    digest = hashlib.sha256()
    for step in steps:
        digest.update(_ENCODER.encode(_step(step)).encode())
    return digest.hexdigest()


def _step(step: Step) -> list[Any]:
    coded = [] if step.coded is None else [_coded(step.coded)]
    coded += [] if step.made is None else [[step.made.name, step.made.role, repr(step.made.maker)]]
    return [
        step.name, step.action, step.dtype, step.shape, step.source.name, step.source.dtype,
        step.source.shape, step.source_adapter,
        [_segment(segment) for segment in step.segments],
        [[patch.adapter, patch.indices, _view(patch.values)] for patch in step.patches],
        *coded,
    ]  # fmt: skip


def _coded(weight: QuantizedWeight) -> list[Any]:
    return [weight.name, repr(weight.codec), weight.shape, weight.dtype]


def _segment(segment: Segment) -> list[Any]:
    deltas = [_delta(delta) for delta in segment.deltas]
    if segment.method is None:
        return [segment.rows, deltas]
    origins = [delta.origin and _origin(delta.origin) for delta in segment.deltas]
    method = segment.method
    told = [method.name, float(method.density).hex(), method.seed, origins]
    return [segment.rows, deltas, told]


def _origin(origin: Origin) -> list[str]:
    return [origin.module, float(origin.scale).hex(), float(origin.weight).hex()]


def _delta(delta: Any) -> list[Any]:
    views = [_view(view) for view in (delta.left, delta.right, delta.magnitude)]
    return [
        delta.adapter, delta.feature, delta.rows, delta.rank, float(delta.scale).hex(), views,
        delta.by_column,
    ]  # fmt: skip


def _view(view: Any) -> list[Any] | None:
    if view is None:
        return None
    name = view.spec and [view.spec.name, view.spec.dtype, view.spec.shape]
    return [name, view.shape, view.select, view.matrix, view.transpose]
