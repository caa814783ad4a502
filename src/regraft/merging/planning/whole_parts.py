"""Whole tensors of an adapter on a base that stores them in parts."""

from __future__ import annotations

from regraft.deltas.views import RowPatch, matrix_view
from regraft.merging.inputs.base_index import BaseIndex, ResolvedName, StoredPart
from regraft.tensors import TensorSpec


def whole_part(
    spec: TensorSpec, found: ResolvedName, held: StoredPart, index: BaseIndex
) -> TensorSpec | None:
    """Return the part of an adapter's whole tensor that replaces one stored tensor.

    A stack of experts that the base keeps one by one is cut into them; None where the two are laid
    out in ways that no contiguous part connects.
    """
    wanted, stored = found.piece, held.piece
    if stored.unsupported or wanted.unsupported or stored.transposed or stored.chunks > 1:
        return None
    same = (wanted.expert, wanted.part, wanted.parts) == (stored.expert, stored.part, stored.parts)
    if same and wanted.chunks == 1:
        return spec
    if wanted.expert is not None or wanted.parts > 1 or wanted.chunks > 1 or stored.axis != 0:
        return None
    if 0 in (held.spec.shape or (0,)):
        return None
    rows = held.spec.shape[0]
    start = index.part_offset(wanted.parameter, stored) if stored.parts > 1 else 0
    total = index.part_total(wanted.parameter, stored)
    if stored.expert is not None:
        start += stored.expert * total
        total *= spec.shape[0]
    if spec.numel != total * held.spec.numel // rows or spec.shape[-1:] != held.spec.shape[-1:]:
        return None
    row_bytes = held.spec.numel // rows * spec.itemsize
    name = f"{spec.name}[rows {start}:{start + rows}]"
    return TensorSpec(
        name, spec.dtype, held.spec.shape, spec.path, spec.start + start * row_bytes,
        rows * row_bytes,
    )  # fmt: skip


def expert_row(
    number: int, spec: TensorSpec, found: ResolvedName, held: StoredPart
) -> RowPatch | None:
    """Return the row of a stack of biases that an adapter's bias of one expert replaces, if any.

    Args:
        number: the adapter's.
        spec: its tensor.
        found: what its name means.
        held: the base's tensor.
    """
    expert, shape = found.piece.expert, held.spec.shape
    if expert is None or held.piece.expert is not None or len(shape) != 2:
        return None
    if spec.shape != shape[1:] or expert >= shape[0]:
        return None
    return RowPatch(number, (expert,), matrix_view(spec, 1, spec.numel))
