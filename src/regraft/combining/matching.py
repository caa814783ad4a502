"""Which modules of several adapters belong together, and what else they bring along."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.adapters.dialects.form import Kind, LoraModule, Moved
from regraft.combining.inputs import Inputs, OpenedAdapter
from regraft.deltas.methods.form import Factors
from regraft.deltas.methods.registry import Method
from regraft.deltas.rounding import decode
from regraft.errors import MismatchError, Problem, UnsupportedError
from regraft.formats.files.reading import FilePool
from regraft.formats.problems import capped

_EXTRACT = (
    "Merge each such adapter into its base (`regraft merge`); `regraft extract` makes a plain one "
    "of what it did"
)


@dataclass(frozen=True)
class Part:
    """What one adapter has for a module.

    Attributes:
        adapter: its number.
        module: its factors.
        weight: the user's factor.
    """

    adapter: int
    module: LoraModule
    weight: float


@dataclass(frozen=True)
class Group:
    """One module, and what each adapter that has it does to it.

    Attributes:
        name: the module's.
        kind: what kind of layer it is.
        parts: one for each adapter that has it.
    """

    name: str
    kind: Kind
    parts: tuple[Part, ...]

    @property
    def experts(self) -> int:
        """How many matrices are stacked; 1 for an ordinary layer."""
        return self.parts[0].module.a.shape[0] if self.kind == "experts" else 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of a delta: output features, and input features with a kernel's."""
        return _sizes(self.parts[0].module)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each adapter that has it."""
        return tuple(part.module.rank for part in self.parts)


def _sizes(module: LoraModule) -> tuple[int, int]:
    if module.kind == "experts":
        return module.b.shape[1], module.a.shape[2]
    return module.b.shape[0], math.prod(module.a.shape[1:])


def matched(inputs: Inputs, method: str, known: Method) -> list[Group]:
    """Return the modules of all adapters, each with the adapters that have it.

    Raises:
        MismatchError: modules of one name have other shapes, or no two adapters have one in common.
        UnsupportedError: a module has what cannot be combined by the method.
    """
    found: dict[str, list[Part]] = defaultdict(list)
    for number, adapter in enumerate(inputs.adapters):
        for module in adapter.plain.modules:
            found[module.name].append(Part(number, module, adapter.weight))
    groups = [Group(name, parts[0].module.kind, tuple(parts)) for name, parts in found.items()]
    _check_shapes(groups, inputs)
    _check_common(groups, inputs)
    problems = [p for group in groups for p in _not_combined(group, method, known, inputs)]
    if problems:
        raise UnsupportedError(capped(problems, inputs.adapters[0].files.root))
    return groups


def _check_shapes(groups: Sequence[Group], inputs: Inputs) -> None:
    problems = [
        Problem(
            "modules of one name have other shapes: the adapters are for other bases", group.name,
            _shape_of(group.parts[0], inputs), _shape_of(part, inputs),
            "Combine adapters of one base",
        )
        for group in groups
        for part in group.parts[1:]
        if _shape(part.module) != _shape(group.parts[0].module)
    ]  # fmt: skip
    if problems:
        raise MismatchError(capped(problems, inputs.adapters[0].files.root))


def _shape(module: LoraModule) -> tuple[object, ...]:
    kernel = module.a.shape[2:] if module.kind == "convolution" else ()
    experts = module.a.shape[0] if module.kind == "experts" else 1
    return module.kind, *_sizes(module), kernel, experts


def _shape_of(part: Part, inputs: Inputs) -> str:
    out, columns = _sizes(part.module)
    return f"{part.module.kind} ({out}, {columns}) in {inputs.labels[part.adapter]}"


def _check_common(groups: Sequence[Group], inputs: Inputs) -> None:
    """Refuse adapters of which one shares no module with any other, unless a base vouches for them.

    Raises:
        MismatchError: there is one.
    """
    if len(inputs.adapters) == 1 or inputs.base is not None:
        return
    shared = {part.adapter for group in groups if len(group.parts) > 1 for part in group.parts}
    problems = [
        Problem(
            "the adapter has no module in common with the others", inputs.labels[number],
            f"some of {_some(groups, lambda n, own=number: n != own)}",
            f"only {_some(groups, lambda n, own=number: n == own)}",
            "Are they of one base? If so, say which: --base BASE",
        )
        for number in range(len(inputs.adapters))
        if number not in shared
    ]  # fmt: skip
    if problems:
        raise MismatchError(capped(problems, inputs.adapters[0].files.root))


def _some(groups: Sequence[Group], of: object) -> str:
    names = [g.name for g in groups if any(of(part.adapter) for part in g.parts)]  # type: ignore[operator]
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _not_combined(group: Group, method: str, known: Method, inputs: Inputs) -> Iterator[Problem]:
    """Yield what of a module cannot be combined by a method."""
    for part in group.parts:
        where = f"{inputs.labels[part.adapter]}: {group.name}"
        if part.module.magnitude is not None:
            yield Problem(
                "DoRA's delta needs the base, and is of no low rank", where,
                "modules without a magnitude vector", "one with it", _EXTRACT,
            )  # fmt: skip
        if part.module.bias is not None and not known.exact:
            yield Problem(
                f"a bias of B has no meaning for the method {method}", where,
                "modules without one (lora_bias)", "one with it", "Choose --method sum, svd or cat",
            )  # fmt: skip
    if known.equal_ranks and len({*group.ranks}) > 1:
        yield Problem(
            f"the method {method} adds factors, which takes one rank", group.name,
            f"r = {group.ranks[0]}", ", ".join(f"r = {rank}" for rank in group.ranks),
            "Choose --method sum or svd, which add the deltas themselves",
        )  # fmt: skip


# -- factors ---------------------------------------------------------------------------------------


class NotFinite(Exception):  # noqa: N818  (collected, and raised as one typed error)
    """Factors that hold NaN or infinity, by their names."""

    def __init__(self, problems: Mapping[str, Problem]) -> None:
        super().__init__(", ".join(problems))
        self.problems = problems


def factors_of(group: Group, files: FilePool) -> Iterator[list[Factors]]:
    """Yield the factors of all adapters, of each expert; of other layers once.

    Raises:
        NotFinite: some are no finite numbers.
    """
    read = [(part, *_both(part.module, files)) for part in group.parts]
    bad = {
        f"{tensor.sources[0].path}: {tensor.sources[0].name}": _not_finite(tensor, values)
        for part, b, a in read
        for tensor, values in ((part.module.a, a), (part.module.b, b))
        if not np.isfinite(values).all()
    }
    if bad:
        raise NotFinite(bad)
    for expert in range(group.experts):
        yield [Factors(b[expert], a[expert], part.module.scale, part.weight) for part, b, a in read]


def _not_finite(tensor: Moved, values: np.ndarray) -> Problem:
    source, count = tensor.sources[0], int(values.size - np.count_nonzero(np.isfinite(values)))
    return Problem(
        "the adapter holds NaN or infinity", f"{source.path}: {source.name}", "finite numbers",
        f"{count} of {values.size} values are not",
        "Its training diverged; use an earlier checkpoint",
    )  # fmt: skip


def _both(module: LoraModule, files: FilePool) -> tuple[np.ndarray, np.ndarray]:
    """Return B (experts, out, r) and A (experts, r, in) in float64."""
    out, columns = _sizes(module)
    b, a = (values_of(tensor, files).astype(np.float64) for tensor in (module.b, module.a))
    return b.reshape(-1, out, module.rank), a.reshape(-1, module.rank, columns)


def values_of(tensor: Moved, files: FilePool) -> np.ndarray:
    """Return a tensor's values as float32, in its shape."""
    raw = tensor.bits(files).reshape(-1).view(np.uint8)
    return decode(raw, tensor.dtype).reshape(tensor.shape)


# -- tensors that replace the base's ---------------------------------------------------------------


@dataclass(frozen=True)
class Replaced:
    """What the adapters put in the place of the base's own tensors.

    Attributes:
        whole: tensors by their parameter.
        token_rows: row numbers and rows by the embedding's module.
    """

    whole: Mapping[str, Moved]
    token_rows: Mapping[str, tuple[tuple[int, ...], Moved]]


def replaced(inputs: Inputs, files: FilePool) -> Replaced:
    """Return what replaces tensors of the base: what one adapter has, or several have alike.

    Raises:
        UnsupportedError: adapters contradict each other, or one has a weight that is not 1; all of
            them at once.
    """
    problems = list[Problem]()
    whole: dict[str, tuple[int, Moved]] = {}
    rows: dict[str, tuple[int, tuple[tuple[int, ...], Moved]]] = {}
    for number, adapter in enumerate(inputs.adapters):
        for name, tensor in adapter.plain.whole.items():
            problems += _weighted(adapter, name)
            first = whole.setdefault(name, (number, tensor))
            if not _equal(first[1], tensor, files):
                problems.append(_contradiction(name, inputs, first[0], number))
        for name, found in adapter.plain.token_rows.items():
            problems += _weighted(adapter, f"{name} (token rows)")
            held = rows.setdefault(name, (number, found))
            if held[1][0] != found[0] or not _equal(held[1][1], found[1], files):
                problems.append(_contradiction(f"{name} (token rows)", inputs, held[0], number))
    if problems:
        raise UnsupportedError(capped(problems, inputs.adapters[0].files.root))
    return Replaced(
        {name: tensor for name, (_, tensor) in whole.items()},
        {name: found for name, (_, found) in rows.items()},
    )


def _weighted(adapter: OpenedAdapter, name: str) -> list[Problem]:
    if adapter.weight == 1:
        return []
    return [
        Problem(
            "a tensor that takes the place of the base's cannot be weighted",
            f"{adapter.label}: {name}", "the weight 1", f"{adapter.weight:g}",
            "Leave the weight out, or an adapter without replaced tensors (modules_to_save)",
        )
    ]  # fmt: skip


def _contradiction(name: str, inputs: Inputs, one: int, other: int) -> Problem:
    return Problem(
        "adapters put different values in the place of one tensor of the base", name,
        f"what {inputs.labels[one]} has", f"other values in {inputs.labels[other]}",
        "Choose one of them: only an adapter's delta can be combined, not a replaced tensor",
    )  # fmt: skip


def _equal(one: Moved, other: Moved, files: FilePool) -> bool:
    if one is other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return _digest(one, files) == _digest(other, files)


def _digest(tensor: Moved, files: FilePool) -> bytes:
    return hashlib.sha256(tensor.bits(files).data).digest()
