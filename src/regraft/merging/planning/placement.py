"""From an adapter's factors to deltas on a base's stored tensors: shapes, slices, orientation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from regraft.adapters.expert_layout import BY_EXPERT, FLAT, UNKNOWN, WAY_ON
from regraft.adapters.model import Adapter, LoraTarget
from regraft.adapters.settings import RESAVE
from regraft.deltas.views import ONE, Delta, Feature, Origin, Select, View, matrix_view
from regraft.errors import Problem
from regraft.merging.inputs.base_index import BaseIndex, ResolvedName, StoredPart
from regraft.merging.inputs.expert_stacks import StackOrientation
from regraft.names import Piece
from regraft.tensors import WORKING_DTYPES, TensorSpec

MAX_EXPERTS = 2**16
"""Far above any model; each takes a delta of its own in the plan."""

Rows = tuple[int, int]


class Misfit(Exception):  # noqa: N818  (not an error of the user's: it is collected, then raised)
    """One target that does not fit the base; carries the problem to report."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class FactorSizes:
    """The sizes in a pair of factors.

    Attributes:
        out: output features.
        inputs: input features, all kernel positions of a convolution included.
        kernel: sizes of a convolution's kernel, () otherwise.
        rank: r.
        experts: how many experts' factors are stacked; 1 for an ordinary layer.
        by_expert: whether columns of a stack's B lie expert by expert, as Unsloth packs them;
            PEFT's lie the expert fastest.
    """

    out: int
    inputs: int
    kernel: tuple[int, ...]
    rank: int
    experts: int
    by_expert: bool = False


@dataclass(frozen=True)
class Placement:
    """How a target meets one stored tensor.

    Attributes:
        adapter: number of the adapter.
        owner: the adapter.
        target: its target.
        key: the name under which rank and alpha are looked up.
        by_parameter: whether ``target_parameters`` selected it; such a matrix is never transposed.
        orientation: what is known of the way that the adapter's square stacks lie.
    """

    adapter: int
    owner: Adapter
    target: LoraTarget
    key: str
    by_parameter: bool = False
    orientation: StackOrientation | None = None

    @property
    def scale(self) -> float:
        """Scale of the delta: computed in float64, rounded to float32 once.

        Raises:
            Misfit: float32 cannot hold it.
        """
        exact = self.owner.settings.scale_of(self.key, self.owner.weight)
        if abs(exact) > float(np.finfo(np.float32).max):
            raise Misfit(
                Problem("the adapter's scale is too large", self.where(), "a float32",
                        f"{exact:g}", "Mend lora_alpha in adapter_config.json, or the weight")
            )  # fmt: skip
        return float(np.float32(exact))

    @property
    def origin(self) -> Origin:
        """Whose its deltas are."""
        own = float(np.float32(self.owner.settings.scale_of(self.key)))
        return Origin(self.key, own, self.owner.weight)

    @property
    def feature(self) -> Feature:
        """What the delta is called."""
        return "lora" if self.target.magnitude is None else "dora"

    def where(self) -> str:
        """Name the adapter and module for a message."""
        return f"{self.owner.label}: {self.key}"


def _of_grouped(target: LoraTarget) -> tuple[str, str]:
    """Return what is wrong with the factors of a grouped convolution, and the way on."""
    odd = "DoRA" if target.magnitude is not None else "lora_bias" if target.b_bias else None
    if odd is not None:
        return f"{odd} on a grouped convolution is not supported", (
            f"Serve it with PEFT, or train without {odd} or without this layer"
        )
    what = "the adapter of a grouped convolution can be attached, not merged"
    return what, "Attach it with regraft.attach(model, adapter)"


def read_factors(place: Placement, stacked: bool) -> FactorSizes:
    """Check the factors' shapes against each other and the settings' rank.

    Raises:
        Misfit: they contradict each other.
    """
    a, b = place.target.a.shape, place.target.b.shape
    rank = place.owner.settings.rank_of(place.key)
    wanted = "A of (r, in) and B of (out, r), r from the config"
    flat_b = len(b) == 2 or (len(b) > 2 and set(b[2:]) == {1})
    if len(a) < 2 or not flat_b or (len(b) > 2 and len(b) != len(a)) or a[0] != b[1]:
        grouped = len(a) == len(b) > 2 and 0 < b[1] < a[0] and a[0] % b[1] == 0
        if grouped:
            what, hint = _of_grouped(place.target)
            raise Misfit(Problem(what, place.where(), wanted, f"{a}, {b}", hint))
        raise Misfit(Problem("factors do not fit each other", place.where(), wanted, f"{a}, {b}"))
    experts, left_over = divmod(a[0], rank)
    if left_over or (experts != 1 and not stacked):
        raise Misfit(
            Problem("the factors' rank is not the config's", place.where(), f"r = {rank}",
                    f"r = {a[0]}", "Fix r or rank_pattern in adapter_config.json")
        )  # fmt: skip
    by_expert = experts > 1 and _is_packed_by_expert(place)
    return FactorSizes(b[0], math.prod(a[1:]), tuple(a[2:]), rank, experts, by_expert)


def _is_packed_by_expert(place: Placement) -> bool:
    """Whether columns of B lie expert by expert.

    Raises:
        Misfit: the config does not say, and there are adapters of both kinds.
    """
    layout = place.owner.settings.b_layout_of(place.key)
    if layout == UNKNOWN:
        raise Misfit(
            Problem("it cannot be told how B packs its experts: adapters of Unsloth have two ways",
                    place.where(), f"{FLAT} in adapter_config.json", "none", WAY_ON)
        )  # fmt: skip
    return layout == BY_EXPERT


def check_storage(place: Placement, spec: TensorSpec) -> None:
    """Refuse a stored tensor whose elements a delta cannot be added to.

    Raises:
        Misfit: its dtype is not a working dtype.
    """
    if spec.dtype not in WORKING_DTYPES:
        raise Misfit(
            Problem(f"cannot add a delta to {spec.dtype}", f"{place.where()} -> {spec.name}",
                    " or ".join(WORKING_DTYPES), spec.dtype,
                    "Dequantize or convert the base to one of these first")
        )  # fmt: skip


def embedding_delta(place: Placement, spec: TensorSpec) -> Delta:
    """Return the delta of an adapted embedding (vocab, dim): s (B A)^T.

    Raises:
        Misfit: the sizes differ.
    """
    check_storage(place, spec)
    factors = read_factors(place, stacked=False)
    if spec.shape != (factors.inputs, factors.out):
        raise Misfit(_wrong_shape(place, spec, (factors.inputs, factors.out)))
    return Delta(
        adapter=place.adapter,
        feature=place.feature,
        rows=(0, factors.inputs),
        rank=factors.rank,
        scale=place.scale,
        left=matrix_view(place.target.a, factors.rank, factors.inputs, transpose=True),
        right=matrix_view(place.target.b, factors.out, factors.rank, transpose=True),
        magnitude=_magnitude(place, factors.out, None),
        by_column=True,
    )


def linear_deltas(
    place: Placement, found: ResolvedName, held: StoredPart, index: BaseIndex
) -> list[Delta]:
    """Return the deltas of one target on one stored tensor.

    Raises:
        Misfit: shapes differ, or the tensor is stored in a way regraft does not take apart.
    """
    spec, stored = held.spec, held.piece
    check_storage(place, spec)
    if len(spec.shape) < 2:
        raise Misfit(_wrong_shape(place, spec, place.target.a.shape))
    if stored.unsupported or found.piece.unsupported:
        raise Misfit(_no_inverse(place, spec, stored.unsupported or found.piece.unsupported))
    stacked = found.piece.expert is None and (stored.expert is not None or len(spec.shape) == 3)
    factors = read_factors(place, stacked=stacked)
    if found.piece.expert is None and stored.expert is not None:
        if place.target.magnitude is not None:
            raise Misfit(dora_on_stack(place))
        return [_of_one_expert(place, factors, held, index)]
    if factors.kernel or len(spec.shape) != 3:
        return [_of_matrix(place, factors, found.piece, held, index)]
    if found.piece.expert is not None:
        return [_on_one_expert(place, factors, found.piece, spec)]
    if place.target.magnitude is not None:
        raise Misfit(dora_on_stack(place))
    return _on_all_experts(place, factors, spec, _is_known_transposed(found.piece, index))


def _of_matrix(
    place: Placement, factors: FactorSizes, wanted: Piece, held: StoredPart, index: BaseIndex
) -> Delta:
    """A plain weight, a convolution, a slice of a fused weight, or a part of a fused target."""
    spec, stored = held.spec, held.piece
    rows, columns = spec.shape[0], math.prod(spec.shape[1:])
    apart = wanted.expert is not None and stored.expert is not None
    if not apart and _is_transposed(place, factors, wanted, held, index):
        return _delta(place, factors, (0, rows), None, transposed=True)
    kept = _kept_rows(place, factors, wanted, held, index)
    at = _slot(rows, stored.chunk, stored.chunks) if stored.chunks > 1 else (0, rows)
    fits = (at[1] - at[0], columns) == (kept[1] - kept[0], factors.inputs)
    if not fits or (factors.kernel and spec.shape[2:] != factors.kernel):
        raise Misfit(_wrong_shape(place, spec, (factors.out, *place.target.a.shape[1:])))
    return _delta(place, factors, at, kept)


def _kept_rows(
    place: Placement, factors: FactorSizes, wanted: Piece, held: StoredPart, index: BaseIndex
) -> Rows:
    """Return the rows of the target's delta that fall on a stored tensor."""
    if wanted.chunks > 1:
        return _slot(factors.out, wanted.chunk, wanted.chunks)
    if held.piece.parts > 1 and wanted.parts == 1:
        if index.part_total(wanted.parameter, held.piece) != factors.out:
            raise Misfit(_wrong_shape(place, held.spec, (factors.out, factors.inputs)))
        start = index.part_offset(wanted.parameter, held.piece)
        return (start, start + held.spec.shape[0])
    return (0, factors.out)


def _slot(rows: int, number: int, count: int) -> Rows:
    each = rows // count
    return (number * each, (number + 1) * each)


def _is_transposed(
    place: Placement, factors: FactorSizes, wanted: Piece, held: StoredPart, index: BaseIndex
) -> bool:
    """Whether the stored matrix is (in, out), as transformers' Conv1D keeps it."""
    shape = held.spec.shape
    sliced = held.piece.parts > 1 or held.piece.chunks > 1
    if len(shape) != 2 or factors.kernel or sliced or place.by_parameter:
        return held.piece.transposed and not sliced
    normal, flipped = (factors.out, factors.inputs), (factors.inputs, factors.out)
    if normal == flipped == shape:
        known = index.is_conv1d(wanted.parameter.removesuffix(".weight"))
        conv1d = place.owner.settings.fan_in_fan_out if known is None else known
        return conv1d != held.piece.transposed
    return shape == flipped and shape != normal


def _of_one_expert(
    place: Placement, factors: FactorSizes, held: StoredPart, index: BaseIndex
) -> Delta:
    """A stacked target meets a checkpoint that keeps one matrix (or half) per expert."""
    spec, piece = held.spec, held.piece
    if piece.axis != 0 or (piece.transposed and piece.parts > 1):
        raise Misfit(_no_inverse(place, spec, "Transpose"))
    expert = piece.expert or 0
    if factors.experts <= expert:
        raise Misfit(_wrong_shape(place, spec, (factors.out, factors.inputs)))
    start = index.part_offset(piece.parameter, piece) if piece.parts > 1 else 0
    sizes = (index.part_total(piece.parameter, piece), spec.shape[1])
    in_stack = (sizes[1], sizes[0]) if piece.transposed else sizes
    known = piece.transposed or _is_known_transposed(piece, index)
    transposed = _stack_is_transposed(place, factors, in_stack, known)
    if transposed is None:
        raise Misfit(_wrong_shape(place, spec, (factors.out, factors.inputs)))
    transposed = transposed != piece.transposed
    kept = (start, start + spec.shape[0])
    at = (0, spec.shape[0])
    return _expert_delta(place, factors, expert, at, kept, transposed=transposed)


def _on_one_expert(
    place: Placement, factors: FactorSizes, wanted: Piece, spec: TensorSpec
) -> Delta:
    """Place a target that is one expert's matrix in a checkpoint that stacks all experts."""
    _, height, width = spec.shape
    expert = wanted.expert or 0
    if expert < spec.shape[0] and _expert_is_transposed(place, factors, wanted, spec):
        return _delta(
            place, factors, (expert * height, (expert + 1) * height), None, transposed=True
        )
    start = wanted.part * factors.out if wanted.parts > 1 else 0
    fits = height == factors.out * wanted.parts and width == factors.inputs
    if not fits or expert >= spec.shape[0]:
        raise Misfit(_wrong_shape(place, spec, (factors.out, factors.inputs)))
    at = expert * height + start
    return _delta(place, factors, (at, at + factors.out), (0, factors.out))


def _expert_is_transposed(
    place: Placement, factors: FactorSizes, wanted: Piece, spec: TensorSpec
) -> bool:
    """Whether a stack keeps one expert's matrix (in, out).

    Raises:
        Misfit: the matrix is square, and the model is not known.
    """
    normal, flipped = (factors.out, factors.inputs), (factors.inputs, factors.out)
    if normal == flipped == spec.shape[1:] and wanted.check_shape:
        raise Misfit(
            Problem("it cannot be told whether the base keeps these square experts transposed",
                    f"{place.where()} -> {spec.name}", "a model that regraft knows",
                    "an unknown one", "Give the base's config.json, with its architectures")
        )  # fmt: skip
    fits = wanted.parts == 1 and spec.shape[1:] == flipped
    return fits and (normal != flipped or wanted.transposed)


def _on_all_experts(
    place: Placement, factors: FactorSizes, spec: TensorSpec, known: bool | None
) -> list[Delta]:
    """A stacked target meets a stacked tensor (experts, d1, d2)."""
    experts, height, _ = spec.shape
    if experts > MAX_EXPERTS:
        raise Misfit(
            Problem("the base claims too many experts", f"{place.where()} -> {spec.name}",
                    f"at most {MAX_EXPERTS}", str(experts), "Do not trust this file")
        )  # fmt: skip
    transposed = _stack_is_transposed(place, factors, (spec.shape[1], spec.shape[2]), known)
    if factors.experts != experts or transposed is None:
        raise Misfit(_wrong_shape(place, spec, (factors.experts, factors.out, factors.inputs)))
    return [
        _expert_delta(
            place, factors, e, (e * height, (e + 1) * height), (0, height), transposed=transposed
        )
        for e in range(experts)
    ]


def _stack_is_transposed(
    place: Placement, factors: FactorSizes, sizes: tuple[int, int], known: bool | None
) -> bool | None:
    """Whether experts of ``sizes`` are stored (in, out); None when the sizes fit neither way.

    Args:
        place: the target.
        factors: its sizes.
        sizes: of one expert's matrix in the stack.
        known: whether the module is known to store (in, out); None if not known.

    Raises:
        Misfit: they fit both ways, and nothing tells which one is meant.
    """
    normal, flipped = (factors.out, factors.inputs), (factors.inputs, factors.out)
    if normal != flipped or normal != sizes or place.orientation is None:
        return {normal: False, flipped: True}.get(sizes)
    found = place.orientation.of_square(known)
    if found is None:
        raise Misfit(place.orientation.refused(place.where()))
    return found


def _is_known_transposed(piece: Piece, index: BaseIndex) -> bool | None:
    return index.is_transposed(piece.parameter.rpartition(".")[0])


def stack_orientation(place: Placement, found: ResolvedName, index: BaseIndex) -> Iterator[bool]:
    """Yield whether a target's stack is stored (in, out), if its sizes alone tell.

    Raises:
        Misfit: its factors contradict each other.
    """
    if found.piece.expert is not None or not found.held:
        return
    held = found.held[0]
    if held.piece.expert is None and len(held.spec.shape) != 3:
        return
    factors = read_factors(place, stacked=True)
    if held.piece.expert is None:
        sizes = (held.spec.shape[1], held.spec.shape[2])
    else:
        sizes = (index.part_total(held.piece.parameter, held.piece), held.spec.shape[-1])
    if held.piece.transposed and held.piece.expert is not None:
        sizes = (sizes[1], sizes[0])
    if factors.out != factors.inputs and set(sizes) == {factors.out, factors.inputs}:
        yield sizes == (factors.inputs, factors.out)


def _expert_delta(
    place: Placement,
    factors: FactorSizes,
    expert: int,
    at: Rows,
    kept: Rows,
    *,
    transposed: bool = False,
) -> Delta:
    """One expert's delta. A is (experts * r, in), expert by expert; B is (out, r * experts), the
    expert fastest (PEFT's ParamWrapper.get_delta_weight), or slowest as Unsloth packs it."""
    a, r, e = place.target.a, factors.rank, factors.experts
    a_rows = (r * expert, r * (expert + 1))
    if transposed:
        left = View(a, (r * e, factors.inputs), (a_rows, kept), (r, kept[1] - kept[0]), True)
        right = _b_of_expert(place, factors, expert, (0, factors.out), transpose=True)
    else:
        left = _b_of_expert(place, factors, expert, kept)
        right = View(a, (r * e, factors.inputs), (a_rows, None), (r, factors.inputs))
    return Delta(place.adapter, "lora", at, r, place.scale, left, right)


def _b_of_expert(
    place: Placement, factors: FactorSizes, expert: int, kept: Rows, *, transpose: bool = False
) -> View:
    """Return rows of one expert's B, (rows, r)."""
    r, e, rows = factors.rank, factors.experts, kept[1] - kept[0]
    axes: tuple[Select, ...] = (kept, expert, None) if factors.by_expert else (kept, None, expert)
    shape = (factors.out, e, r) if factors.by_expert else (factors.out, r, e)
    return View(place.target.b, shape, axes, (rows, r), transpose)


def _delta(
    place: Placement, factors: FactorSizes, at: Rows, kept: Rows | None, *, transposed: bool = False
) -> Delta:
    a, b, r = place.target.a, place.target.b, factors.rank
    if transposed:
        left = matrix_view(a, r, factors.inputs, transpose=True)
        right = matrix_view(b, factors.out, r, transpose=True)
    else:
        left = matrix_view(b, factors.out, r, keep=kept)
        right = matrix_view(a, r, factors.inputs)
    magnitude = _magnitude(place, factors.out, kept)
    return Delta(
        place.adapter, place.feature, at, r, place.scale, left, right, magnitude, transposed
    )


def _magnitude(place: Placement, out: int, kept: Rows | None) -> View | None:
    spec = place.target.magnitude
    if spec is None:
        return None
    if spec.numel != out:
        raise Misfit(
            Problem("DoRA's magnitude vector has the wrong size", place.where(), f"{out} values",
                    str(spec.shape))
        )  # fmt: skip
    return matrix_view(spec, out, 1, keep=kept)


def bias_delta(place: Placement, found: ResolvedName, spec: TensorSpec) -> Delta:
    """Return the delta of ``lora_bias`` on a bias: scale * b; of one expert, on its row of a stack.

    Raises:
        Misfit: the sizes differ.
    """
    check_storage(place, spec)
    b_bias = place.target.b_bias
    assert b_bias is not None
    expert = found.piece.expert
    if expert is not None and spec.shape[1:] == b_bias.shape and expert < spec.shape[0]:
        row = matrix_view(b_bias, 1, b_bias.numel)
        return Delta(place.adapter, "lora-bias", (expert, expert + 1), 1, place.scale, ONE, row)
    if spec.shape != b_bias.shape:
        raise Misfit(_wrong_shape(place, spec, b_bias.shape))
    left = matrix_view(b_bias, spec.numel, 1)
    return Delta(place.adapter, "lora-bias", (0, spec.numel), 1, place.scale, left, ONE)


def residual_delta(place: Placement, delta: Delta, spec: TensorSpec) -> Delta | None:
    """Return the delta that PiSSA or OLoRA took out of the base, to go before the adapter's own.

    Both begin by factoring W (PEFT's pissa_init and olora_init) and train on W - s B0 A0, rounded
    to the base's dtype. The factors are found again from W when the step is done.

    Raises:
        Misfit: the target is not the whole of one stored tensor, so its W cannot be factored.
    """
    init = str(place.owner.settings.init_lora_weights).lower()
    if place.target.kind == "embedding":
        return None  # PEFT starts these from zero, whatever the initialization
    for method in ("pissa", "olora"):
        if init.startswith(method):
            if not _is_all_of(delta, spec):
                raise Misfit(
                    Problem(f"{method} on a part of a stored tensor cannot be recomputed",
                            f"{place.where()} -> {spec.name}", hint=RESAVE)
                )  # fmt: skip
            scale = float(np.float32(-place.owner.settings.scale_of(place.key)))
            feature: Feature = "pissa" if method == "pissa" else "olora"
            return Delta(delta.adapter, feature, delta.rows, delta.rank, scale, None, None, None,
                         delta.by_column)  # fmt: skip
    return None


def _is_all_of(delta: Delta, spec: TensorSpec) -> bool:
    """Whether a delta has all rows of its target, and they are all of the stored tensor."""
    left, right = delta.left, delta.right
    if left is None or right is None or len(left.shape) != 2:
        return False
    uncut = left.matrix == left.shape and right.matrix == right.shape
    return uncut and left.result[0] * right.result[1] == spec.numel


def dora_on_stack(place: Placement) -> Problem:
    """Return the refusal of DoRA's magnitudes on a stack of experts."""
    return Problem(
        "DoRA on a stack of experts cannot be merged", place.where(),
        hint="PEFT does not train it either; was the config edited?",
    )  # fmt: skip


def _wrong_shape(place: Placement, spec: TensorSpec, needed: tuple[int, ...]) -> Problem:
    hint = "Is this the base the adapter was trained on?"
    if len(needed) == len(spec.shape) == 2 and needed[1] == spec.shape[1]:
        hint = (
            "If the vocabulary grew in training, save the adapter with the embeddings in "
            "modules_to_save, or resize the base first"
        )
    return Problem(
        "the adapter was made for another shape",
        f"{place.where()} -> {spec.name}",
        f"{spec.shape} (base)",
        f"{needed} (adapter)",
        hint,
    )


def _no_inverse(place: Placement, spec: TensorSpec, operation: str) -> Problem:
    return Problem(
        f"the base stores this weight through transformers' {operation}, which regraft does not "
        "take apart",
        f"{place.where()} -> {spec.name}",
        hint="Load the base with transformers and save it again as it is in memory "
        "(save_original_format=False), then merge into that",
    )
