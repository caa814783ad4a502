"""What answers: one mix of adapters for all rows of a batch, or one for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import UsageError
from regraft.runtime.operations import Operations
from regraft.runtime.steps import run

Named = tuple[tuple[str, float], ...]
"""Adapters by name with their weights, in their order."""


@dataclass(eq=False)
class Selection:
    """One mix of adapters, which answers for all rows.

    Attributes:
        names: the adapters and their weights.
        operations: what they do.
    """

    names: Named
    operations: Operations

    def after(self, path: str, module: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        """Return a module's output with the adapters' steps done to it; None for none."""
        steps = self.operations.steps.get(path)
        return None if steps is None else run(steps, module, x, out)

    def instead(self, path: str) -> Any | None:
        """Return what is called in the place of a module's forward pass, or None."""
        return self.operations.replacements.get(path)

    def check(self, batch: int) -> None:
        """Accept any batch."""


@dataclass(eq=False)
class Rows:
    """A mix of adapters for each row of a batch.

    Attributes:
        distinct: the different mixes; None stands for no adapter.
        of_row: which of them each row has.
    """

    distinct: tuple[Selection | None, ...]
    of_row: tuple[int, ...]
    _after: dict[str, Any] = field(default_factory=dict)

    def after(self, path: str, module: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        """Return a module's output with each row's steps done to it; None for none."""
        found = self._after.get(path)
        if found is None:
            found = self._after[path] = MixedSteps(self, path)
        return found(module, x, out) if found.wanted else None

    def instead(self, path: str) -> Any | None:
        """Return what is called in the place of a module's forward pass, or None."""
        if not any(each is not None and each.instead(path) for each in self.distinct):
            return None
        return MixedReplacement(self, path)

    def check(self, batch: int) -> None:
        """Refuse a batch of another length.

        Raises:
            UsageError: it has more or fewer rows than were named.
        """
        if batch != len(self.of_row):
            raise wrong_length(batch, len(self.of_row))

    def groups(self, length: int) -> list[tuple[int, list[int]]]:
        """Return each mix with the places that it has along an axis of a length.

        Raises:
            UsageError: the axis cannot be that of the rows.
        """
        places = self.places(length)
        return [
            (number, [at for at, of in enumerate(places) if of == number])
            for number in range(len(self.distinct))
            if number in places
        ]

    def places(self, length: int) -> list[int]:
        """Return the mix of each place along an axis that has all of a row's places together.

        Raises:
            UsageError: the axis cannot be that of the rows.
        """
        each, rest = divmod(length, len(self.of_row))
        if rest or not each:
            raise wrong_length(length, len(self.of_row))
        return [of for of in self.of_row for _ in range(each)]


def wrong_length(batch: int, rows: int) -> UsageError:
    """Return the error for a batch whose rows are not those that were named."""
    return UsageError(
        "the batch does not have as many rows as adapters were named", where="rows()",
        expected=f"{rows} rows", found=f"a batch of {batch}",
        hint="Name one adapter (or None) for each row; where generate() makes several rows of one "
        "(num_beams, num_return_sequences), say so: rows(names, repeats=num_beams)",
    )  # fmt: skip


class MixedSteps:
    """The steps of one module for a batch whose rows have different mixes."""

    def __init__(self, rows: Rows, path: str) -> None:
        self._rows, self._path = rows, path
        self.wanted = any(
            each is not None and path in each.operations.steps for each in rows.distinct
        )

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with each row's steps done to it."""
        if x.shape[0] == 1 and len(self._rows.of_row) > 1:
            count = len(self._rows.of_row)  # what is the same for all rows, such as positions
            x, out = x.expand(count, *x.shape[1:]), out.expand(count, *out.shape[1:])
        return self._by_group(module, x, out)

    def _by_group(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        result = out.clone()
        for number, places in self._rows.groups(x.shape[0]):
            selection = self._rows.distinct[number]
            if selection is None or self._path not in selection.operations.steps:
                continue
            index = torch.tensor(places, device=out.device)
            part = selection.after(self._path, module, x[index], out[index])
            if part is not None:
                result = result.index_copy(0, index, part)
        return result


class MixedReplacement:
    """A module's forward pass for a batch whose rows have different weights."""

    def __init__(self, rows: Rows, path: str) -> None:
        self._rows, self._path = rows, path

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module once for each mix, on its own rows."""
        first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        axis = batch_axis(module)
        length = first.shape[axis]
        if length == 1 and len(self._rows.of_row) > 1:
            count = len(self._rows.of_row)
            args = tuple(_expand(v, axis, count) for v in args)
            kwargs = {k: _expand(v, axis, count) for k, v in kwargs.items()}
            length = count
        parts, order = [], list[int]()
        for number, places in self._rows.groups(length):
            index = torch.tensor(places, device=first.device)
            order += places
            taken = [_take(v, axis, length, index) for v in args]
            named = {k: _take(v, axis, length, index) for k, v in kwargs.items()}
            parts.append(self._run(number, module, taken, named))
        back = torch.tensor(order, device=first.device).argsort()
        return _join(parts, axis, back)

    def _run(self, number: int, module: nn.Module, args: Sequence[Any], kwargs: Any) -> Any:
        selection = self._rows.distinct[number]
        found = selection.instead(self._path) if selection is not None else None
        if found is not None:
            return found(module, *args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


def batch_axis(module: nn.Module) -> int:
    """Return the axis of a module's inputs that has one place per row (or several)."""
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        return 1
    return 0


def _expand(value: Any, axis: int, count: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() <= axis or value.shape[axis] != 1:
        return value
    return value.repeat_interleave(count, axis)


def _take(value: Any, axis: int, length: int, index: Tensor) -> Any:
    """Return a group's rows of an input; what has no rows is for all."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    for each in dict.fromkeys((axis, 0)):
        if value.dim() > each and value.shape[each] == length:
            return value.index_select(each, index)
        if value.dim() > each and length and value.shape[each] % length == 0:
            many = value.shape[each] // length  # attention masks: heads of a row together
            spread = (index.unsqueeze(1) * many + torch.arange(many, device=index.device)).reshape(
                -1
            )
            return value.index_select(each, spread)
    return value


def _join(parts: Sequence[Any], axis: int, back: Tensor) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), axis).index_select(axis, back)
    if isinstance(parts[0], tuple):
        axes = [axis, *[0] * (len(parts[0]) - 1)]  # attention: the weights have rows first
        joined = (
            _join(each, at, back) for each, at in zip(zip(*parts, strict=True), axes, strict=True)
        )
        return tuple(joined)
    return parts[0]
