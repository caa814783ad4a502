"""Comparing adapters by what they add to a model: s B A of each module, whatever the factors are.

Two sets of factors can stand for one delta: of other ranks, scales, signs or dtypes. So products
are compared, by their triangular factors (:mod:`regraft.deltas.ranks.reduction`): nothing has the
size of a weight. The inner product of s B A and s' B' A' is s s' times the sum of the elements of
(B^T B') * (A A'^T), which are r by r'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.deltas.ranks.blas_threads import one_thread
from regraft.deltas.ranks.reduction import difference_norm, product_norm
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.files.reading import FilePool
from regraft.progress import Progress, ProgressMeter
from regraft.shrinking.factors import own_products, read_stored
from regraft.shrinking.targets import Pair, read_pairs
from regraft.tensors import TensorSpec
from regraft.verifying.diffing.report import DeltaChange, finite

_Value = TypeVar("_Value")

_EXACT = 1e-12
"""Relative distance of products that are the same but for the rounding of float64."""

_DORA = (
    "with DoRA, the figures are those of the deltas; the magnitudes, by which the sum of weight "
    "and delta is scaled, are compared as tensors"
)


@dataclass(frozen=True)
class Deltas:
    """Two adapters, compared.

    Attributes:
        changed: modules whose deltas differ, those that are farthest apart first.
        same: number of modules whose deltas are the same.
        x: tensors of X that are no factors, by a key that both sides have for the same thing.
        y: likewise of Y.
        notes: what to say of the comparison.
    """

    changed: tuple[DeltaChange, ...]
    same: int
    x: Mapping[str, TensorSpec]
    y: Mapping[str, TensorSpec]
    notes: tuple[str, ...]


def compare_deltas(x: AdapterFiles, y: AdapterFiles, progress: Progress | None) -> Deltas:
    """Compare two adapters by their deltas.

    Raises:
        RegraftError: one is not read as an adapter; or something of it could not be read.
    """
    one, other = read_adapter(x), read_adapter(y)
    ours, theirs = ({p.name: p for p in read_pairs(each)} for each in (one, other))
    prefixes = _prefixes(ours, theirs)
    notes = [_note(prefixes)] if prefixes else []
    theirs = {_renamed(name, prefixes): replace(p, name=name) for name, p in theirs.items()}
    changed = _changed(ours, theirs, progress)
    if any(pair.target.magnitude for pair in (*ours.values(), *theirs.values())):
        notes.append(_DORA)
    return Deltas(
        tuple(sorted(changed, key=_distance, reverse=True)),
        len({*ours, *theirs}) - len(changed),
        _others(one, x, None),
        _others(other, y, prefixes),
        tuple(notes),
    )


# -- names -----------------------------------------------------------------------------------------


def _prefixes(x: Mapping[str, Pair], y: Mapping[str, Pair]) -> tuple[str, str] | None:
    """Return what X's and Y's names begin with, if that alone keeps all of them apart; else None.

    Versions of transformers call the same layers ``model.layers``, ``language_model.model.layers``
    and so on. It is taken for the same only if every name of the smaller side has its counterpart
    then, of the same sizes, and there is one way to do it.
    """
    if x.keys() & y.keys() or min(len(x), len(y)) < 2:
        return None
    if len(x) <= len(y):  # of the smaller side each has its counterpart
        found = {_split(next(iter(x)).split("."), name.split(".")) for name in y}
    else:
        found = {_split(name.split("."), next(iter(y)).split(".")) for name in x}
    fitting = [pair for pair in found if pair is not None and _fits(pair, x, y)]
    return fitting[0] if len(fitting) == 1 else None


def _split(x: Sequence[str], y: Sequence[str]) -> tuple[str, str] | None:
    """Return what is before the longest common end of two names; None where that has a number."""
    same = 0
    while same < min(len(x), len(y)) and x[-1 - same] == y[-1 - same]:
        same += 1
    starts = x[: len(x) - same], y[: len(y) - same]
    if not same or any(part.isdigit() for start in starts for part in start):
        return None
    one, other = ("".join(f"{part}." for part in start) for start in starts)
    return one, other


def _fits(prefixes: tuple[str, str], x: Mapping[str, Pair], y: Mapping[str, Pair]) -> bool:
    if not all(name.startswith(prefixes[1]) for name in y):
        return False
    renamed = {_renamed(name, prefixes): pair for name, pair in y.items()}
    both = renamed.keys() & x.keys()
    alike = all(_sizes(x[name]) == _sizes(renamed[name]) for name in both)
    return alike and len(both) == min(len(x), len(y))


def _renamed(name: str, prefixes: tuple[str, str] | None) -> str:
    """Return X's name of what Y calls ``name``."""
    if prefixes is None or not name.startswith(prefixes[1]):
        return name
    return prefixes[0] + name.removeprefix(prefixes[1])


def _note(prefixes: tuple[str, str]) -> str:
    one, other = (f"{prefix}..." for prefix in prefixes)
    return f"modules go by other names: {one} of X is taken for {other} of Y"


def _others(
    adapter: Adapter, files: AdapterFiles, prefixes: tuple[str, str] | None
) -> dict[str, TensorSpec]:
    """Return the tensors that are no factors, by what they are."""
    keys = {whole.spec.name: whole.parameter for whole in adapter.whole}
    keys |= {rows.spec.name: f"{rows.module} {rows.indices}" for rows in adapter.token_rows}
    for target in adapter.targets:
        inner = ".base_layer" * target.depth
        for kind, spec in (("magnitude", target.magnitude), ("bias of B", target.b_bias)):
            if spec is not None:
                keys[spec.name] = f"{target.module}{inner} {kind}"
    factors = {spec.name for target in adapter.targets for spec in (target.a, target.b)}
    return {
        _renamed(keys.get(name, name), prefixes): spec
        for name, spec in files.tensors.items()
        if name not in factors
    }


# -- products --------------------------------------------------------------------------------------


def _changed(
    x: Mapping[str, Pair], y: Mapping[str, Pair], progress: Progress | None
) -> list[DeltaChange]:
    """Return how the deltas of two sides differ, where they do."""
    names = list(dict.fromkeys((*x, *y)))
    total = sum(_nbytes(pair) for side in (x, y) for pair in side.values())
    meter, found = ProgressMeter(progress, "compare", total), []
    with FilePool() as files, one_thread(), np.errstate(all="ignore"):
        for name in names:
            change = _compared(name, x.get(name), y.get(name), files)
            found += [change] if change is not None else []
            meter.add(sum(_nbytes(side[name]) for side in (x, y) if name in side), name)
    return found


def _compared(name: str, x: Pair | None, y: Pair | None, files: FilePool) -> DeltaChange | None:
    """Return how the deltas of one module differ; None if they do not.

    A side that does not adapt the module has a delta of zero there.
    """
    change = DeltaChange(
        name,
        layers=_of_both(x, y, lambda pair: str(pair.layer)),
        ranks=_of_both(x, y, lambda pair: pair.rank),
        scales=_of_both(x, y, lambda pair: pair.scale),
        dtypes=_of_both(x, y, _dtypes),
        sizes=_of_both(x, y, _sizes),
    )
    if x is not None and y is not None:
        return _measured(change, x, y, files) if _sizes(x) == _sizes(y) else change
    norms = [finite(_norm(pair, files)) if pair is not None else 0.0 for pair in (x, y)]
    alone = norms[1] if x is None else norms[0]
    return replace(change, norms=(norms[0], norms[1]), delta_norm=alone)


def _of_both(
    x: Pair | None, y: Pair | None, of: Callable[[Pair], _Value]
) -> tuple[_Value | None, _Value | None]:
    return of(x) if x is not None else None, of(y) if y is not None else None


def _measured(change: DeltaChange, x: Pair, y: Pair, files: FilePool) -> DeltaChange | None:
    ours, theirs = read_stored(files, x), read_stored(files, y)
    norms_x, norms_y, apart, inner = [], [], [], 0.0
    for (b, a), (other_b, other_a) in zip(
        own_products(x, ours), own_products(y, theirs), strict=True
    ):
        b, other_b = x.scale * b, y.scale * other_b
        norms_x.append(product_norm(b, a))
        norms_y.append(product_norm(other_b, other_a))
        equal = np.array_equal(b, other_b) and np.array_equal(a, other_a)
        apart.append(0.0 if equal else difference_norm(b, a, other_b, other_a))
        inner += float(((b.T @ other_b) * (a @ other_a.T)).sum())
    norm_x, norm_y, distance = (math.hypot(*each) for each in (norms_x, norms_y, apart))
    if distance <= _EXACT * max(norm_x, norm_y):
        return None
    cosine = inner / norm_x / norm_y if norm_x and norm_y else None
    return replace(
        change,
        norms=(finite(norm_x), finite(norm_y)),
        delta_norm=finite(distance),
        cosine=finite(cosine),
    )


def _norm(pair: Pair, files: FilePool) -> float:
    stored = read_stored(files, pair)
    norms = (product_norm(b, a) for b, a in own_products(pair, stored))
    return abs(pair.scale) * math.hypot(*norms)


def _sizes(pair: Pair) -> tuple[int, ...]:
    """Return the experts, the outputs and the inputs of a delta."""
    return pair.sizes.experts, pair.sizes.out, pair.sizes.inputs


def _nbytes(pair: Pair) -> int:
    return pair.target.a.nbytes + pair.target.b.nbytes


def _dtypes(pair: Pair) -> str:
    return "/".join(dict.fromkeys((pair.target.a.dtype, pair.target.b.dtype)))


def _distance(change: DeltaChange) -> float:
    """Return what to sort by: what could not be measured comes first."""
    return math.inf if change.relative is None else change.relative
