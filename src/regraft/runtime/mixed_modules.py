"""A module's forward pass for a batch whose rows have different weights.

It runs once for each mix of adapters, on that mix's rows. Along which axes the rows lie is said by
the module's class, argument by argument; a module of a class that does not say is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regraft.runtime.row_axes import Axis, is_of_transformers, unknown_rows

Arguments = Mapping[str, Any]
"""What a module is called with, by name."""

Groups = Callable[[int], list[tuple[int, list[int]]]]
"""Gives each mix with its places along an axis of a length."""


@dataclass(frozen=True)
class Layout:
    """Along which axes a module's rows lie.

    Attributes:
        axis: what is known of the main argument's.
        main: the argument that says how long the axis is.
        inputs: axes by the name of the argument; what is not named has no rows.
        outputs: of what comes out: one for all tensors, or one for each of a tuple.
        blocks: all rows lie so many times along the axis, one time after the other.
    """

    axis: Axis
    main: str
    inputs: Mapping[str, int]
    outputs: int | tuple[int, ...] = 0
    blocks: int = 1


def layout_of(module: nn.Module, axis: Axis, given: Arguments) -> Layout:
    """Return along which axes a module's rows lie.

    Args:
        module: the module.
        axis: what is known of its place in the model.
        given: what it is called with.

    Raises:
        UnsupportedError: it is not known.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module, axis, given)
    if isinstance(module, nn.RNNBase):
        return _of_recurrent(module, axis, given)
    if type(module).__name__ == "Llama4TextExperts" and is_of_transformers(module):
        return _of_all_experts(module, axis, given)
    if _is_given_routes(module, given):
        return _by_first_axis(replace(axis, doubt=None), given)
    if any(isinstance(each, _BatchNorm) and each.training for each in module.modules()):
        raise unknown_rows(axis.path, "all rows are normalized together in training")
    if is_of_transformers(module) or type(module).__module__.startswith(
        ("torch.nn", "transformers")
    ):
        return _by_first_axis(axis, given)
    raise unknown_rows(axis.path, f"{type(module).__name__} is not a class whose axes are known")


def _of_attention(module: nn.MultiheadAttention, axis: Axis, given: Arguments) -> Layout:
    at = 0 if module.batch_first else 1
    if given["query"].dim() != 3:
        raise unknown_rows(axis.path, "its input has no axis for rows")
    inputs = dict.fromkeys(("query", "key", "value"), at) | {"key_padding_mask": 0}
    if isinstance(given.get("attn_mask"), Tensor) and given["attn_mask"].dim() == 3:
        inputs["attn_mask"] = 0  # heads of a row together
    return Layout(replace(axis, number=at, by_class=True), "query", inputs, (at, 0))


def _of_recurrent(module: nn.RNNBase, axis: Axis, given: Arguments) -> Layout:
    at = 0 if module.batch_first else 1
    if not isinstance(given["input"], Tensor) or given["input"].dim() != 3:
        raise unknown_rows(axis.path, "its input is packed, or has no axis for rows")
    axis = replace(axis, number=at, by_class=True)
    return Layout(axis, "input", {"input": at, "hx": 1}, (at, 1))


def _of_all_experts(module: Any, axis: Axis, given: Arguments) -> Layout:
    """Llama 4 gives every expert all tokens, one expert after the other."""
    return Layout(replace(axis, doubt=None), "hidden_states", {"hidden_states": 0},
                  blocks=int(module.num_experts))  # fmt: skip


def _is_given_routes(module: nn.Module, given: Arguments) -> bool:
    """Whether a stack of experts is given all tokens, and for each the experts that it goes to."""
    tensors = [each for each in given.values() if isinstance(each, Tensor)]
    alike = all(each.dim() == 2 and each.shape[0] == tensors[0].shape[0] for each in tensors)
    named = type(module).__name__.endswith("Experts") and is_of_transformers(module)
    return named and alike and len(tensors) == 3


def _by_first_axis(axis: Axis, given: Arguments) -> Layout:
    """Take what is as long as the first tensor; refuse what cannot be taken apart."""
    main = next((name for name, value in given.items() if isinstance(value, Tensor)), None)
    if main is None or not given[main].dim():
        raise unknown_rows(axis.path, "its input has no axis for rows")
    length = given[main].shape[axis.number]
    inputs = {main: axis.number}
    for name, value in given.items():
        for each in value if isinstance(value, tuple | list) else (value,):
            if name == main or each is None or isinstance(each, bool | int | float | str):
                continue
            if not isinstance(each, Tensor) or tuple(each.shape[:2]) == (length, length):
                raise unknown_rows(axis.path, f"its argument {name} cannot be taken apart")
            if each.dim() and each.shape[0] == length:
                inputs[name] = 0
    return Layout(axis, main, inputs, axis.number)


def run_mixed(
    axis: Axis, groups: Groups, check: Callable[[Axis, Sequence[int]], None], module: nn.Module,
    given: Arguments, run: Callable[[int, Arguments], Any],
) -> Any:  # fmt: skip
    """Run a module once for each mix, on its own rows.

    Args:
        axis: what is known of the module's place in the model.
        groups: gives each mix's places.
        check: refuses a shape whose rows are not known.
        module, given: what is called.
        run: runs it for a mix.

    Raises:
        UnsupportedError: it is not known which row its inputs belong to.
        UsageError: the rows cannot be those that were named.
    """
    layout = layout_of(module, axis, given)
    main, at = given[layout.main], layout.inputs[layout.main]
    shape = list(main.shape)
    shape[at] //= layout.blocks
    check(layout.axis, shape)
    parts, order = [], list[int]()
    for number, places in groups(shape[at]):
        index = torch.tensor(places, device=main.device)
        order += places
        taken = {
            name: _take(value, layout, name, shape[at], index) for name, value in given.items()
        }
        parts.append(run(number, taken))
        _check_part(parts[-1], layout, len(places))
    back = torch.tensor(order, device=main.device).argsort()
    return _join(parts, layout.outputs, back, layout.blocks)


def by_name(module: nn.Module, args: Sequence[Any], kwargs: Arguments) -> dict[str, Any]:
    """Return a call's arguments by name.

    Raises:
        TypeError: the call does not fit the module.
    """
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    names = list(signature.parameters.values())
    given: dict[str, Any] = {}
    for parameter in names[1:]:
        if parameter.name in bound:
            value = bound[parameter.name]
            is_rest = parameter.kind is inspect.Parameter.VAR_KEYWORD
            given |= value if is_rest else {parameter.name: value}
    return given


def _take(value: Any, layout: Layout, name: str, length: int, index: Tensor) -> Any:
    """Return a group's rows of an argument; what has no rows is for all."""
    if name not in layout.inputs:
        return value
    if isinstance(value, tuple | list):
        return type(value)(_take(each, layout, name, length, index) for each in value)
    at = layout.inputs[name]
    if not isinstance(value, Tensor) or value.dim() <= at or value.shape[at] == 1 != length:
        return value
    if layout.blocks > 1:
        return (
            value.unflatten(at, (layout.blocks, length))
            .index_select(at + 1, index)
            .flatten(at, at + 1)
        )
    many = value.shape[at] // length  # attention masks: heads of a row together
    spread = index.unsqueeze(1) * many + torch.arange(many, device=index.device)
    return value.index_select(at, spread.reshape(-1))


def _check_part(part: Any, layout: Layout, places: int) -> None:
    """Refuse an output that does not have the rows that went in."""
    for value, at in _with_axes(part, layout.outputs):
        if isinstance(value, Tensor) and (
            value.dim() <= at or value.shape[at] != places * layout.blocks
        ):
            raise unknown_rows(
                layout.axis.path, "what comes out does not have the rows of its input"
            )


def _with_axes(value: Any, axes: int | tuple[int, ...]) -> list[tuple[Any, int]]:
    """Return the tensors of an output, each with its axis."""
    if not isinstance(value, tuple):
        return [(value, axes if isinstance(axes, int) else axes[0])]
    each = [axes] * len(value) if isinstance(axes, int) else axes
    return [pair for one, at in zip(value, each, strict=True) for pair in _with_axes(one, at)]


def _join(parts: Sequence[Any], axes: int | tuple[int, ...], back: Tensor, blocks: int) -> Any:
    if isinstance(parts[0], tuple):
        each = [axes] * len(parts[0]) if isinstance(axes, int) else axes
        joined = zip(zip(*parts, strict=True), each, strict=True)
        return tuple(_join(one, at, back, blocks) for one, at in joined)
    at = axes if isinstance(axes, int) else axes[0]
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if blocks == 1:
        return torch.cat(list(parts), at).index_select(at, back)
    runs = torch.cat([part.unflatten(at, (blocks, -1)) for part in parts], at + 1)
    return runs.index_select(at + 1, back).flatten(at, at + 1)
