"""The files that a plan makes, and a digest of what it does."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from regraft.formats.safetensors import build_header
from regraft.merging.files.direct_io import BLOCK
from regraft.merging.planning.plan import OutputShard, Plan, Step
from regraft.quant.weight import QuantizedWeight
from regraft.tensors import TensorSpec


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


Origin = Callable[[TensorSpec], TensorSpec | None]
"""Gives the tensor of a file whose bytes are those of a base's tensor; None where there is none."""


def as_it_is(spec: TensorSpec) -> TensorSpec | None:
    """Return a tensor of a base that is read from its own files."""
    return spec


def shared_bytes(targets: Iterable[Target], origin: Origin = as_it_is) -> int:
    """Return how many bytes of files to be made are whole blocks of files that are there.

    Args:
        targets: the files to be made.
        origin: where the bytes of the base's tensors are; an adapter's are in its own file.
    """
    total = 0
    for target in targets:
        for step, offset in zip(target.steps, target.offsets, strict=True):
            if step.is_copy:
                spec = origin(step.source) if step.source_adapter is None else step.source
                total += _whole_blocks(offset, step.nbytes, spec)
    return total


def _whole_blocks(offset: int, nbytes: int, spec: TensorSpec | None) -> int:
    """Return the bytes of a tensor that fill blocks, if they do so in the other file as well."""
    if spec is None or (spec.start - offset) % BLOCK:
        return 0
    return max((offset + nbytes) // BLOCK - -(-offset // BLOCK), 0) * BLOCK


def plan_digest(plan: Plan) -> str:
    """Return a digest of what a plan does to tensors, whatever files they lie in."""
    steps = sorted(plan.steps, key=lambda step: step.name)
    digest = hashlib.sha256()
    for step in steps:
        digest.update(json.dumps(_step(step), default=str).encode())
    return digest.hexdigest()


def _step(step: Step) -> list[Any]:
    coded = [] if step.coded is None else [_coded(step.coded)]
    coded += [] if step.made is None else [[step.made.name, step.made.role, repr(step.made.maker)]]
    return [
        step.name, step.action, step.dtype, step.shape, step.source.name, step.source.dtype,
        step.source.shape, step.source_adapter,
        [[segment.rows, [_delta(d) for d in segment.deltas]] for segment in step.segments],
        [[patch.adapter, patch.indices, _view(patch.values)] for patch in step.patches],
        *coded,
    ]  # fmt: skip


def _coded(weight: QuantizedWeight) -> list[Any]:
    return [weight.name, repr(weight.codec), weight.shape, weight.dtype]


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
