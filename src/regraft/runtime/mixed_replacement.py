"""A module's forward pass for a batch whose rows have different weights.

The module is run once for each mix of adapters, on the rows of that mix. That is right only where
the inputs hold the rows along a known axis, and where no row's output depends on another row. Most
modules have the batch first; some are known to have it elsewhere. Whether it is so is tried out: on
the base's own weights, the rows taken apart have to give what they give together. What does not is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regraft.errors import RegraftError, UnsupportedError


class RowsLike(Protocol):
    """What is asked of the rows."""

    @property
    def distinct(self) -> Sequence[Any]: ...

    @property
    def of_row(self) -> Sequence[int]: ...

    def groups(self, length: int) -> list[tuple[int, list[int]]]: ...

    def fitting(self, length: int) -> RowsLike: ...


@dataclass(frozen=True)
class Layout:
    """Where a module's tensors have the rows of the batch.

    Attributes:
        axis: of the first input and the first output.
        others: of further inputs and outputs.
        blocks: so many blocks, one after the other along the axis, have all rows each.
    """

    axis: int = 0
    others: int = 0
    blocks: int = 1


def layout_of(module: nn.Module) -> Layout:
    """Return where a module has its rows, as far as its class tells; first for all others."""
    if isinstance(module, nn.MultiheadAttention):
        return Layout(0 if module.batch_first else 1)
    if isinstance(module, nn.RNNBase):
        return Layout(0 if module.batch_first else 1, others=1)
    if type(module).__name__ == "Llama4TextExperts":  # (experts * tokens, hidden), see its forward
        return Layout(blocks=int(module.num_experts))
    return Layout()


class MixedReplacement:
    """The forward pass of one module, row by row.

    Args:
        rows: the rows.
        path: the module's path.
        proved: layouts of inputs for which the rows were found to be apart; shared and added to.
    """

    def __init__(self, rows: RowsLike, path: str, proved: set[Any]) -> None:
        self._rows, self._path, self._proved = rows, path, proved

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module once for each mix, on its own rows.

        Raises:
            UsageError: the inputs have another number of rows.
            UnsupportedError: it cannot be told which part of the inputs is which row.
        """
        layout = layout_of(module)
        first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        rows, length = self._rows, first.shape[layout.axis] // layout.blocks
        if length == 1 and len(rows.of_row) > 1:
            length = len(rows.of_row)
            args = tuple(_expand(v, layout.axis, length) for v in args)
            kwargs = {k: _expand(v, layout.axis, length) for k, v in kwargs.items()}
        groups = rows.fitting(length).groups(length)
        split = _Split(layout, length, groups, first.device)
        self._prove(split, module, args, kwargs, first)
        return split.run(lambda n, a, k: self._run(n, module, a, k), args, kwargs)

    def _prove(
        self, split: _Split, module: nn.Module, args: Any, kwargs: Any, first: Tensor
    ) -> None:
        """Try out, once for each kind of input, whether rows taken apart answer as together.

        Not while a module is trained (dropout would differ) or compiled: there what was tried
        before, or the layout of the class, has to do.
        """
        kind = (self._path, first.dim(), split.length == len(self._rows.of_row))
        if kind in self._proved or module.training or torch.compiler.is_compiling():
            return
        forward = type(module).forward
        with torch.no_grad():
            try:
                apart = split.run(lambda _n, a, k: forward(module, *a, **k), args, kwargs)
                together = forward(module, *args, **kwargs)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise self._refused(module, f"{type(error).__name__}: {error}") from None
        if not _agree(apart, together):
            raise self._refused(module, "another answer for the rows by themselves")
        self._proved.add(kind)

    def _refused(self, module: nn.Module, found: str) -> RegraftError:
        return UnsupportedError(
            "the rows of the batch cannot be taken apart in this module", where=self._path,
            expected=f"inputs of {type(module).__name__} with the rows along one axis",
            found=found[:200],
            hint="Run the batch once for each adapter: with adapters.using(name)",
        )  # fmt: skip

    def _run(self, number: int, module: nn.Module, args: Sequence[Any], kwargs: Any) -> Any:
        selection = self._rows.distinct[number]
        found = selection.instead(self._path) if selection is not None else None
        if found is not None:
            return found(module, *args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


class _Split:
    """Inputs taken apart by mixes, and outputs put together again.

    Attributes:
        length: places along the axis of the rows, in one block.
    """

    def __init__(
        self, layout: Layout, length: int, groups: Sequence[tuple[int, list[int]]],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._layout, self.length = layout, length
        self._groups = [(number, torch.tensor(at, device=device)) for number, at in groups]
        order = [place for _, places in groups for place in places]
        self._back = torch.tensor(order, device=device).argsort()

    def run(self, run: Any, args: Sequence[Any], kwargs: Any) -> Any:
        """Return what ``run(number of the mix, args, kwargs)`` gives, for all rows."""
        parts = []
        for number, index in self._groups:
            taken = [self._take(v, i, index) for i, v in enumerate(args)]
            named = {
                k: self._take(v, i, index) for i, (k, v) in enumerate(kwargs.items(), len(args))
            }
            parts.append(run(number, taken, named))
        return self._join(parts, self._layout.axis)

    def _take(self, value: Any, position: int, index: Tensor) -> Any:
        """Return a group's rows of an input; what has no rows is for all."""
        if isinstance(value, tuple):
            return tuple(self._take(each, position, index) for each in value)
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if self._layout.blocks > 1:
            return self._of_blocks(value, index)
        axis = self._layout.axis if not position else self._layout.others
        for each in dict.fromkeys((axis, self._layout.axis, 0)):
            if value.dim() > each and value.shape[each] == self.length:
                return value.index_select(each, index)
            if value.dim() > each and self.length and value.shape[each] % self.length == 0:
                many = value.shape[each] // self.length  # attention masks: heads of a row together
                steps = torch.arange(many, device=index.device)
                spread = (index.unsqueeze(1) * many + steps).reshape(-1)
                return value.index_select(each, spread)
        return value

    def _of_blocks(self, value: Tensor, index: Tensor) -> Tensor:
        if value.shape[0] != self._layout.blocks * self.length:
            return value
        apart = value.reshape(self._layout.blocks, self.length, *value.shape[1:])
        return apart.index_select(1, index).reshape(-1, *value.shape[1:])

    def _join(self, parts: Sequence[Any], axis: int) -> Any:
        if isinstance(parts[0], Tensor):
            return self._joined(list(parts), axis)
        if isinstance(parts[0], tuple):
            axes = [axis, *[self._layout.others] * (len(parts[0]) - 1)]
            return tuple(
                self._join(each, at)
                for each, at in zip(zip(*parts, strict=True), axes, strict=True)
            )
        return parts[0]

    def _joined(self, parts: list[Tensor], axis: int) -> Tensor:
        blocks = self._layout.blocks
        if blocks == 1:
            return torch.cat(parts, axis).index_select(axis, self._back)
        apart = [part.reshape(blocks, -1, *part.shape[1:]) for part in parts]
        joined = torch.cat(apart, 1).index_select(1, self._back)
        return joined.reshape(-1, *joined.shape[2:])


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
    if isinstance(apart, tuple) and isinstance(together, tuple):
        return all(map(_agree, apart, together))
    return apart is None or apart == together


def _expand(value: Any, axis: int, count: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() <= axis or value.shape[axis] != 1:
        return value
    return value.repeat_interleave(count, axis)
