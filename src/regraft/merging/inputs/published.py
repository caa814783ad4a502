"""A base whose experts are stored apart, as the layout that its class reads.

gpt-oss in 4 bits, as Unsloth saves it, has a linear layer for each expert, and another one in the
router. Merged out, the class of transformers would find neither. So the single experts of a stack
are seen as the stack, which has no bytes of its own:
:mod:`regraft.merging.inputs.stacking` reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from regraft.errors import MismatchError, Problem
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.problems import capped
from regraft.merging.inputs.dequantized_view import Quantization, Stack
from regraft.merging.inputs.single_experts import WAY_OUT, as_slice, unwrapped
from regraft.names import NameMap, Piece
from regraft.tensors import VIRTUAL, WORKING_DTYPES, TensorSpec, nbytes_of

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""How configs call the number of experts."""


@dataclass(frozen=True)
class _Slice:
    """A tensor of the base, and which part of a stack it is."""

    piece: Piece
    spec: TensorSpec

    @property
    def expert(self) -> int:
        return self.piece.expert or 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has in the stack."""
        shape = self.spec.shape
        return shape[::-1] if self.piece.transposed else shape


def published(
    base: Checkpoint, quantization: Quantization, names: NameMap
) -> tuple[Checkpoint, Quantization]:
    """Return a quantized base with its single experts as the stacks that its class reads.

    Args:
        base: its plain weights.
        quantization: how it is quantized.
        names: of the class that is to read it; other classes than it knows keep their layout.

    Raises:
        MismatchError: experts are apart and do not make up their stacks; lists all that is wrong.
    """
    names = names.for_names(base.tensors)
    slices = _slices(base, names)
    if not slices:
        return base, quantization
    problems = [*_lacking(base, names, slices)]
    for parameter, found in slices.items():
        problems += _unfit(base, parameter, found)
    if problems:
        raise MismatchError(capped(problems, base.root))
    stacks = {name: _stack(name, found) for name, found in slices.items()}
    stacks |= _unwrapped(base, names)
    return _laid_out(base, stacks), replace(quantization, stacks=stacks)


def _slices(base: Checkpoint, names: NameMap) -> dict[str, list[_Slice]]:
    """Return the experts that are stored apart, by their stack."""
    found: dict[str, list[_Slice]] = defaultdict(list)
    for name, spec in base.tensors.items():
        piece = as_slice(names, name)
        if piece is not None and names.pieces(name) == (Piece(name),):
            found[piece.parameter].append(_Slice(piece, spec))
    return found


def _lacking(
    base: Checkpoint, names: NameMap, slices: Mapping[str, list[_Slice]]
) -> Iterator[Problem]:
    """Yield the parameters that modules with experts apart do not have in any way."""
    for module in sorted({name.rpartition(".")[0] for name in slices}):
        for leaf in names.expert_parameters(module):
            name = f"{module}.{leaf}"
            if name not in slices and name not in base.tensors:
                yield _problem(base, name, "these parameters of its experts", "nothing")


def _unfit(base: Checkpoint, name: str, found: list[_Slice]) -> list[Problem]:
    """Return why slices do not make up a stack: experts lack, are there twice or differ."""
    problems = []
    experts, count = sorted(each.expert for each in found), _count(base)
    wanted = list(range(len(found) if count is None else count))
    if experts != wanted:
        problems.append(
            _problem(base, name, f"experts 0 to {len(wanted) - 1}, each once", _some(experts))
        )
    if name in base.tensors:
        problems.append(_problem(base, name, "single experts or a stack of them", "both"))
    kinds = sorted({f"{each.spec.dtype} {list(each.spec.shape)}" for each in found})
    if len(kinds) > 1:
        problems.append(_problem(base, name, "one shape and dtype", ", ".join(kinds[:4])))
    axes = 1 if name.endswith("_bias") else 2
    spec = found[0].spec
    if spec.dtype not in WORKING_DTYPES or len(spec.shape) != axes or found[0].piece.check_shape:
        expected = f"{' or '.join(WORKING_DTYPES)} of {axes} axes, of a layout that is known"
        problems.append(_problem(base, name, expected, kinds[0]))
    return problems


def _count(base: Checkpoint) -> int | None:
    """Return how many experts the config says there are; None where it does not."""
    config = base.config or {}
    text = config.get("text_config")
    for said in (text if isinstance(text, Mapping) else {}, config):
        for key in _COUNTS:
            if type(said.get(key)) is int:
                return int(said[key])
    return None


def _problem(base: Checkpoint, name: str, expected: str, found: str) -> Problem:
    what = "the base stores experts apart, and they do not make up the stack that the class reads"
    return Problem(what, f"{base.source}: {name}", expected, found, WAY_OUT)


def _some(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:8]))
    return shown + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")


def _stack(name: str, found: list[_Slice]) -> Stack:
    ordered = sorted(found, key=lambda each: each.expert)
    first = ordered[0]
    spec = _virtual(name, first.spec, (len(ordered), *first.shape))
    return Stack(spec, tuple(each.spec for each in ordered), first.piece.transposed)


def _unwrapped(base: Checkpoint, names: NameMap) -> dict[str, Stack]:
    """Return the layers whose weight is stored as that of a linear layer in them."""
    found = {}
    for name, spec in base.tensors.items():
        plain = unwrapped(names, name)
        if plain is not None and plain not in base.tensors:
            found[plain] = Stack(_virtual(plain, spec, spec.shape), (spec,), transposed=False)
    return found


def _virtual(name: str, like: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, like.dtype, shape, like.path, VIRTUAL, nbytes_of(like.dtype, shape))


def _laid_out(base: Checkpoint, stacks: Mapping[str, Stack]) -> Checkpoint:
    """Return a base with each stack where its first member stands."""
    owner = {spec.name: name for name, stack in stacks.items() for spec in stack.members}
    shards, tensors = [], dict[str, TensorSpec]()
    for shard in base.shards:
        seen = dict.fromkeys(owner.get(name, name) for name in shard.tensors)
        here = tuple(name for name in seen if name not in tensors)
        for name in here:
            tensors[name] = stacks[name].spec if name in stacks else base.tensors[name]
        shards.append(replace(shard, tensors=here))
    return replace(base, shards=tuple(s for s in shards if s.tensors), tensors=tensors)
