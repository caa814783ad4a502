"""A module's forward pass for a batch whose rows have different weights.

It runs once for each mix of adapters, on that mix's rows. Along which axes the rows lie is said by
the module's class, argument by argument; a module of a class that does not say is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regraft.errors import UnsupportedError
from regraft.runtime.forward.hooks import tensors_in
from regraft.runtime.model.row_axes import Axis, is_of_transformers, unknown_rows

Arguments = Mapping[str, Any]
"""What a module is called with, by name."""

Axes = int | tuple[int, ...]
"""One axis for all that comes out, or one for each part of a tuple."""

Run = Callable[[Arguments], Any]
"""Runs a module on arguments by name."""

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
    outputs: Axes = 0
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
        return _of_all_experts(module, axis)
    if _is_given_routes(module, given):
        return _by_first_axis(replace(axis, doubt=None), given)
    if any(isinstance(each, _BatchNorm) and each.training for each in module.modules()):
        raise unknown_rows(axis.path, "all rows are normalized together in training")
    if (
        axis.path == ""
        or is_of_transformers(module)
        or type(module).__module__.startswith(("torch.nn", "transformers"))
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
    return Layout(replace(axis, number=at), "query", inputs, (at, 0))


def _of_recurrent(module: nn.RNNBase, axis: Axis, given: Arguments) -> Layout:
    at = 0 if module.batch_first else 1
    if not isinstance(given["input"], Tensor) or given["input"].dim() != 3:
        raise unknown_rows(axis.path, "its input is packed, or has no axis for rows")
    axis = replace(axis, number=at)
    return Layout(axis, "input", {"input": at, "hx": 1}, (at, 1))


def _of_all_experts(module: Any, axis: Axis) -> Layout:
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
    main = next(
        (name for name, value in given.items() if next(tensors_in(value), None) is not None), None
    )
    first = None if main is None else next(tensors_in(given[main]))
    if main is None or first is None or not first.dim():
        raise unknown_rows(axis.path, "its input has no axis for rows")
    for name, value in given.items():
        if any(not _is_separable(each, first) for each in _leaves(value)):
            raise unknown_rows(axis.path, f"its argument {name} cannot be taken apart")
    return Layout(axis, main, dict.fromkeys(given, 0))


def _is_separable(value: Any, first: Tensor) -> bool:
    """Whether an argument certainly has rows, or certainly has none."""
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    length = first.shape[0]
    is_alike = value.shape == first.shape and not value.is_floating_point()
    return value is first or is_alike or tuple(value.shape[:2]) != (length, length)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what a structure of dicts, lists and tuples holds."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


class Split:
    """A call taken apart into the rows of each mix, and put together again.

    Args:
        layout: along which axes rows lie.
        groups: each mix with its places along the axis.
        given: the call's arguments, by name.
    """

    def __init__(
        self, layout: Layout, groups: Sequence[tuple[int, list[int]]], given: Arguments
    ) -> None:
        device = next(tensors_in(given[layout.main])).device
        self._layout, self._given = layout, given
        self._groups = [(number, torch.tensor(at, device=device)) for number, at in groups]
        order = [place for _, places in groups for place in places]
        self._length, self._back = len(order), torch.tensor(order, device=device).argsort()

    def run(self, run: Callable[[int, Arguments], Any]) -> Any:
        """Return what ``run(number of the mix, its arguments)`` gives, for all rows.

        Raises:
            UnsupportedError: what comes out does not have the rows that went in.
        """
        parts, layout = [], self._layout
        for number, index in self._groups:
            taken = {
                name: _take(value, layout, name, self._length, index)
                for name, value in self._given.items()
            }
            parts.append(run(number, taken))
            _check_part(parts[-1], layout, len(index))
        return _join(parts, layout.outputs, self._back, layout.blocks)


def split_of(
    axis: Axis, groups: Groups, check: Callable[[Axis, Sequence[int]], None], module: nn.Module,
    given: Arguments,
) -> Split:  # fmt: skip
    """Return a call of a module, taken apart.

    Args:
        axis: what is known of the module's place in the model.
        groups: gives each mix's places.
        check: refuses a shape whose rows are not known.
        module, given: what is called.

    Raises:
        UnsupportedError: it is not known which row its inputs belong to.
        UsageError: the rows cannot be those that were named.
    """
    layout = layout_of(module, axis, given)
    at = layout.inputs[layout.main]
    shape = list(next(tensors_in(given[layout.main])).shape)
    shape[at] //= layout.blocks
    check(layout.axis, shape)
    return Split(layout, groups(shape[at]), given)


def prove(path: str, split: Split, module: nn.Module, given: Arguments, run: Run) -> None:
    """Refuse a module whose rows do not answer by themselves what they answer together.

    Args:
        path, module: the module.
        split: the call, taken apart.
        given: the call's arguments.
        run: gives the module's answer with one mix of adapters, or none, for all rows.

    Raises:
        UnsupportedError: the answers differ, or the rows cannot be run by themselves.
    """
    with torch.no_grad():
        together = run(given)
        try:
            apart = split.run(lambda _number, taken: run(taken))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise _inseparable(path, module, f"{type(error).__name__}: {error}"[:200]) from None
    if not _agree(apart, together):
        raise _inseparable(path, module, "another answer for the rows by themselves")


def _inseparable(path: str, module: nn.Module, found: str) -> UnsupportedError:
    return UnsupportedError(
        "the rows of the batch cannot be taken apart in this module",
        where=path or type(module).__name__, found=found,
        expected=f"inputs of {type(module).__name__} with the rows along one axis",
        hint="Run the batch once for each adapter: with adapters.using(name)",
    )  # fmt: skip


def _agree(apart: Any, together: Any) -> bool:
    """Whether two outputs are the same but for the rounding of sums in another order."""
    if isinstance(apart, Tensor) and isinstance(together, Tensor):
        if apart.shape != together.shape:
            return False
        if not apart.is_floating_point():
            return bool(torch.equal(apart, together))
        size = float(together.abs().max()) if together.numel() else 0.0
        tolerance = max(1e-4, 8 * torch.finfo(together.dtype).eps) * max(size, 1e-30)
        return bool(((apart - together).abs() <= tolerance).all())
    if isinstance(apart, Mapping) and isinstance(together, Mapping):
        return all(_agree(apart[key], together[key]) for key in together)
    if isinstance(apart, tuple | list) and isinstance(together, tuple | list):
        return all(map(_agree, apart, together))
    return bool(apart is None or apart == together)


def by_name(module: nn.Module, args: Sequence[Any], kwargs: Arguments) -> dict[str, Any]:
    """Return a call's arguments by name, those that come by their place first."""
    signature = inspect.signature(type(module).forward).parameters.values()
    names = [each.name for each in signature if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
    names += [f"argument {at}" for at in range(len(names), len(args))]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _take(value: Any, layout: Layout, name: str, length: int, index: Tensor) -> Any:
    """Return a group's rows of an argument; what has no rows is for all."""
    if name not in layout.inputs:
        return value
    if isinstance(value, Mapping):
        taken = {key: _take(each, layout, name, length, index) for key, each in value.items()}
        return taken if type(value) is dict else type(value)(**taken)
    if isinstance(value, tuple | list):
        return type(value)(_take(each, layout, name, length, index) for each in value)
    at = layout.inputs[name]
    if not isinstance(value, Tensor) or value.dim() <= at:
        return value
    if value.shape[at] % length or not value.shape[at]:
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
        if isinstance(value, Tensor):
            fits = value.dim() > at and value.shape[at] == places * layout.blocks
        else:
            fits = value is None or isinstance(value, bool | int | str)
        if not fits:
            raise unknown_rows(layout.axis.path, "what comes out does not have its input's rows")


def _with_axes(value: Any, axes: Axes) -> list[tuple[Any, int]]:
    """Return what an output holds, each with its axis."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        return [(value, axes if isinstance(axes, int) else axes[0])]
    pairs = zip(value, _each(axes, len(value)), strict=True)
    return [pair for one, at in pairs for pair in _with_axes(one, at)]


def _each(axes: Axes, count: int) -> Sequence[int]:
    return [axes] * count if isinstance(axes, int) else axes[:count]


def _join(parts: Sequence[Any], axes: Axes, back: Tensor, blocks: int) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        named = {k: _join([part[k] for part in parts], axes, back, blocks) for k in first}
        return named if type(first) is dict else type(first)(**named)
    if isinstance(first, tuple | list):
        each = zip(zip(*parts, strict=True), _each(axes, len(first)), strict=True)
        return type(first)(_join(one, at, back, blocks) for one, at in each)
    if not isinstance(first, Tensor):
        return first
    at = axes if isinstance(axes, int) else axes[0]
    if blocks == 1:
        return torch.cat(list(parts), at).index_select(at, back)
    runs = torch.cat([part.unflatten(at, (blocks, -1)) for part in parts], at + 1)
    return runs.index_select(at + 1, back).flatten(at, at + 1)
