"""The files that a plan makes, and a digest of what it does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from regraft.formats.safetensors import build_header
from regraft.merging.planning.plan import Plan, Step
from regraft.quant.weight import QuantizedWeight


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
    """Return the files of a plan: safetensors, the tensors one after the other."""
    targets = []
    for shard in plan.shards:
        entries = [(step.name, step.dtype, step.shape) for step in shard.steps]
        header = build_header(entries, {"format": "pt"})
        offsets, at = [], len(header)
        for step in shard.steps:
            offsets.append(at)
            at += step.nbytes
        targets.append(Target(shard.name, at, ((0, header),), shard.steps, tuple(offsets)))
    return targets


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
