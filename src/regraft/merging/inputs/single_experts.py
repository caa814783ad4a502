"""Checkpoints that store each expert under its own name, for models with one stack of experts.

gpt-oss in 4 bits has every expert as a linear layer, ``mlp.experts.gate_up_projs.3``, because
bitsandbytes quantizes no stacks; the published model has ``mlp.experts.gate_up_proj`` (experts, in,
out) and ``mlp.experts.gate_up_proj_bias`` (experts, out). Other programs say
``mlp.experts.3.gate_up_proj``. A linear layer's weight is (out, in), so it is the slice of a stack,
transposed where the stack is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from regraft.names import NameMap, Piece

_FORMS = (
    re.compile(r"(?P<module>.+)\.(?P<stack>\w+)s\.(?P<expert>\d{1,6})\.(?P<leaf>weight|bias)"),
    re.compile(r"(?P<module>.+)\.(?P<expert>\d{1,6})\.(?P<stack>\w+)\.(?P<leaf>weight|bias)"),
)


WAY_OUT = (
    "Merge into the model as it was published, or leave the base in its format, for the program "
    "that wrote it: --quantize keep"
)
"""What to do about experts that are stored in a layout that their class does not read."""


LINEAR = ".linear."
"""What a program that wraps a layer's weight in a linear layer puts into its name."""


def unwrapped(names: NameMap, name: str) -> str | None:
    """Return what a class calls a weight that another program keeps in a linear layer.

    The router of gpt-oss is one: ``mlp.router.linear.weight`` is ``mlp.router.weight``. None for
    all that the class has as it is called, and where neither is known.
    """
    known, plain = names.tensors, name.replace(LINEAR, ".", 1)
    if known is None or plain == name or names.has(name, known) or not names.has(plain, known):
        return None
    return plain if names.pieces(name) == (Piece(name),) else None


def stacks_of(name: str) -> Iterator[tuple[str, int]]:
    """Yield the stacks that a name may be a slice of, with the expert's number."""
    for form in _FORMS:
        if match := form.fullmatch(name):
            ending = "_bias" if match["leaf"] == "bias" else ""
            yield f"{match['module']}.{match['stack']}{ending}", int(match["expert"])


def as_slice(names: NameMap, name: str) -> Piece | None:
    """Return the slice of a stack that a base's tensor is by its name; None for other tensors.

    Args:
        names: of the model, which has to be known to keep such a stack.
        name: the tensor's.
    """
    for stack, expert in stacks_of(name) if names.has_experts else ():
        module, _, leaf = stack.rpartition(".")
        if leaf in names.expert_parameters(module):
            return piece_of(Piece(stack), expert, names.is_transposed(module))
    return None


def piece_of(stack: Piece, expert: int, is_transposed: bool | None) -> Piece:
    """Return one expert of a stack, as a linear layer has it.

    Args:
        stack: the stack's parameter.
        expert: the expert's number.
        is_transposed: whether the stack is (experts, in, out); None where its sizes have to tell,
            for which the piece has ``check_shape``.
    """
    if stack.parameter.endswith("_bias"):
        return replace(stack, expert=expert)
    unknown = is_transposed is None
    return replace(stack, expert=expert, transposed=bool(is_transposed), check_shape=unknown)
