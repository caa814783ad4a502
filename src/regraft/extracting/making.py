"""The new adapter's tensors: factors found one weight after the other, and kept in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from regraft.adapters.dialects.form import LoraModule, Moved, PlainAdapter, as_stored
from regraft.deltas.rounding import encode
from regraft.errors import NumericError, Problem
from regraft.extracting.differences import Difference, Sides, read_values
from regraft.extracting.fitting import Fit, Wanted, factors_of, fitted
from regraft.extracting.pairing import TensorPair
from regraft.extracting.report import ExtractedModule
from regraft.formats.files.reading import typed_os_errors
from regraft.progress import ProgressMeter
from regraft.tensors import DTYPES, TensorSpec, nbytes_of

PIECE = 2**22
"""Values that are compared at a time."""


@dataclass
class Extracted:
    """What was found so far.

    Attributes:
        modules: the adapter's modules.
        whole: tensors that take the place of the base's, by parameter.
        records: one for each module.
        left_out: changed tensors that were not asked for.
        unchanged: how many tensors are the base's.
        not_finite: tensors whose difference is no finite number.
    """

    modules: list[LoraModule] = field(default_factory=list)
    whole: dict[str, Moved] = field(default_factory=dict)
    records: list[ExtractedModule] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unchanged: int = 0
    not_finite: list[str] = field(default_factory=list)

    def plain(self, base: str | None, task_type: str | None) -> PlainAdapter:
        """Return the adapter."""
        targeted = {module.name for module in self.modules}
        return PlainAdapter(
            modules=tuple(self.modules),
            whole={_inside(name, targeted): tensor for name, tensor in self.whole.items()},
            base=base,
            task_type=task_type,
        )


def _inside(name: str, targeted: set[str]) -> str:
    """Return a parameter's name as PEFT has it: a bias of a module with factors is wrapped."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if leaf == "bias" and module in targeted else name


class Spool:
    """A file that factors are kept in until the adapter is written."""

    def __init__(self, path: Path) -> None:
        """Make an empty file."""
        self._path = path
        with typed_os_errors(path):
            path.write_bytes(b"")
        self._at = 0

    def put(self, name: str, values: np.ndarray, dtype: str) -> Moved:
        """Keep values, float32, in a dtype that holds them."""
        raw = encode(values, dtype).tobytes()
        with typed_os_errors(self._path), self._path.open("ab") as file:
            file.write(raw)
        spec = TensorSpec(name, dtype, values.shape, self._path, self._at, len(raw))
        self._at += len(raw)
        return as_stored(spec)


def extracted(
    pairs: Sequence[TensorPair], sides: Sides, wanted: Wanted, dtype: str, seed: int,
    chosen: Callable[[str], bool], spool: Spool, told: ProgressMeter,
) -> Extracted:  # fmt: skip
    """Return the adapter of all pairs.

    Args:
        pairs: the tensors of both models.
        sides: what they are read from.
        wanted: how good factors have to be.
        dtype: what factors are stored in, as safetensors calls it.
        seed: of the range finder.
        chosen: whether a module is asked for.
        spool: keeps the factors.
        told: told of the bytes that are done.

    Raises:
        NumericError: a difference is NaN or infinite; lists every tensor.
    """
    found = Extracted()
    for pair in pairs:
        if pair.role == "whole":
            _take_whole(pair, sides, chosen, found)
        else:
            _take_factors(pair, sides, wanted, dtype, seed, chosen, spool, found)
        told.add(pair.tuned.nbytes, pair.name)
    if found.not_finite:
        raise NumericError(list(map(_no_numbers, found.not_finite)))
    _complete(pairs, sides, found)
    return found


def _no_numbers(name: str) -> Problem:
    return Problem(
        "one of the models holds NaN or infinity", name, "finite numbers",
        "a difference that is none", "Use models whose weights are finite numbers",
    )  # fmt: skip


def _take_whole(
    pair: TensorPair, sides: Sides, chosen: Callable[[str], bool], found: Extracted
) -> None:
    if not pair.is_resized and _alike(pair, sides):
        found.unchanged += 1
    elif not chosen(pair.parameter.rpartition(".")[0]):
        found.left_out.append(pair.name)
    else:
        # Every name of it: PEFT replaces one side of a tie alone.
        for parameter in (pair.parameter, *pair.shared_by):
            found.whole[parameter] = _all_of(pair.tuned, sides)


def _alike(pair: TensorPair, sides: Sides) -> bool:
    assert pair.base is not None  # one without a base's is resized
    for first in range(0, pair.tuned.numel, PIECE):
        count = min(PIECE, pair.tuned.numel - first)
        one = read_values(sides.tuned, pair.tuned, first, count)
        other = read_values(sides.base, pair.base, first, count)
        if not np.array_equal(one, other, equal_nan=True):
            return False
    return True


def _all_of(spec: TensorSpec, sides: Sides) -> Moved:
    """Return a tensor of the fine-tuned model as it is; of a quantized one, its values."""
    if not spec.is_virtual:
        return as_stored(spec)

    def move() -> np.ndarray:
        raw = np.empty(nbytes_of(spec.dtype, spec.shape), np.uint8)
        sides.tuned.read(spec, 0, raw)
        return raw.view(f"<u{DTYPES[spec.dtype].bits // 8}").reshape(spec.shape)

    return Moved(spec.dtype, spec.shape, (), move)


def _complete(pairs: Sequence[TensorPair], sides: Sides, found: Extracted) -> None:
    """Add what travels with a replaced module: PEFT replaces all its tensors or none."""
    modules = {name.rpartition(".")[0] for name in found.whole if name.endswith(".weight")}
    for pair in pairs:
        module = pair.parameter.rpartition(".")[0]
        if pair.role == "whole" and module in modules and pair.parameter not in found.whole:
            found.whole[pair.parameter] = _all_of(pair.tuned, sides)
            found.unchanged -= 1


# -- factors ---------------------------------------------------------------------------------------


def _take_factors(
    pair: TensorPair, sides: Sides, wanted: Wanted, dtype: str, seed: int,
    chosen: Callable[[str], bool], spool: Spool, found: Extracted,
) -> None:  # fmt: skip
    matrices, rows, columns = pair.matrices
    wanted_here = chosen(pair.module)
    fits, squares, uncertain = list[Fit | None](), [], 0.0
    for number in range(matrices):
        difference = Difference(pair, number, sides)
        square, unsure = difference.survey()
        squares.append(square)
        uncertain += unsure
        fits.append(fitted(difference, wanted, seed) if _counts(square, wanted_here) else None)
        difference.release()
    if not all(map(math.isfinite, squares)):
        found.not_finite.append(pair.name)
        return
    if not any(squares):
        found.unchanged += 1
        return
    if not wanted_here:
        found.left_out.append(pair.name)
        return
    rank = max(fit.rank for fit in fits if fit is not None)
    made = [factors_of(fit, rank, dtype) if fit is not None else None for fit in fits]
    lefts = [each.left if each else np.zeros((rows, rank), np.float32) for each in made]
    rights = [each.right if each else np.zeros((rank, columns), np.float32) for each in made]
    errors = [each.error_norm for each in made if each is not None]
    found.modules.append(_module(pair, rank, lefts, rights, dtype, spool))
    found.records.append(
        ExtractedModule(
            pair.module, pair.role, rank, math.sqrt(sum(squares)), math.hypot(*errors),
            math.sqrt(uncertain),
        )
    )  # fmt: skip


def _counts(square: float, wanted: bool) -> bool:
    """Whether a difference of this squared norm is to be fitted."""
    return wanted and math.isfinite(square) and square > 0


def _module(
    pair: TensorPair, rank: int, lefts: Sequence[np.ndarray], rights: Sequence[np.ndarray],
    dtype: str, spool: Spool,
) -> LoraModule:  # fmt: skip
    """Return a module with its factors, in the layout of its kind of layer."""
    a, b = _laid_out(pair, lefts, rights)
    kinds = {"linear": "linear", "conv1d": "linear", "convolution": "convolution"}
    kind = kinds.get(pair.role, pair.role)
    stored_a, stored_b = (
        spool.put(f"{pair.module}.{side}", values, dtype) for side, values in (("A", a), ("B", b))
    )
    return LoraModule(pair.module, rank, 1.0, stored_a, stored_b, kind)  # type: ignore[arg-type]


def _laid_out(
    pair: TensorPair, lefts: Sequence[np.ndarray], rights: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B; weights that are stored (in, out) take the transposed factors."""
    if pair.role == "experts":
        return np.stack(rights), np.stack(lefts)
    left, right = lefts[0], rights[0]
    if pair.role in ("conv1d", "embedding"):
        return np.ascontiguousarray(left.T), np.ascontiguousarray(right.T)
    if pair.role == "convolution":
        rank, kernel = right.shape[0], pair.tuned.shape[1:]
        ones = (1,) * (len(kernel) - 1)
        return right.reshape(rank, *kernel), left.reshape(left.shape[0], rank, *ones)
    return right, left


def chosen_by(modules: Sequence[str] | None) -> Callable[[str], bool]:
    """Return whether a module is asked for: by its name, or the end of it, as PEFT selects."""
    if not modules:
        return lambda _: True
    ends = tuple(f".{module}" for module in modules)
    return lambda name: f".{name}".endswith(ends)


def unmatched(modules: Sequence[str] | None, pairs: Sequence[TensorPair]) -> Iterator[str]:
    """Yield the names that were asked for and that no module has."""
    names = [f".{pair.module}" for pair in pairs] + [
        f".{pair.parameter.rpartition('.')[0]}" for pair in pairs
    ]
    for module in modules or ():
        if not any(name.endswith(f".{module}") for name in names):
            yield module
