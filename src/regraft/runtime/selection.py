"""What answers: one mix of adapters for all rows of a batch, or one for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import UsageError
from regraft.runtime.layers.grouped import GroupedLora
from regraft.runtime.layers.operations import Operations
from regraft.runtime.layers.quick import quick_dtype
from regraft.runtime.layers.steps import Dora, LowRank, Step, run, scaled
from regraft.runtime.mixed_replacement import MixedReplacement

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
        before_repeats: the rows as they were before ``generate`` made several of each. An encoder
            sees these, and the decoder after it those.
    """

    distinct: tuple[Selection | None, ...]
    of_row: tuple[int, ...]
    before_repeats: Rows | None = None
    _after: dict[str, Any] = field(default_factory=dict)
    _proved: set[Any] = field(default_factory=set)

    def after(self, path: str, module: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        """Return a module's output with each row's steps done to it; None for none."""
        fitting = self.fitting(x.shape[0])
        if fitting is not self:
            return fitting.after(path, module, x, out)
        found = self._after.get(path)
        if found is None:
            found = self._make(path)
        return found(module, x, out) if found.wanted else None

    def fitting(self, length: int) -> Rows:
        """Return the rows that an axis of a length has: those before repeats, or after."""
        other = self.before_repeats
        if other is None or length == 1 or length % len(self.of_row) == 0:
            return self
        return other if length % len(other.of_row) == 0 else self

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _make(self, path: str) -> MixedSteps:
        found = self._after[path] = MixedSteps(self, path)
        return found

    def instead(self, path: str) -> Any | None:
        """Return what is called in the place of a module's forward pass, or None."""
        if not any(each is not None and each.instead(path) for each in self.distinct):
            return None
        return MixedReplacement(self, path, self._proved)

    def check(self, batch: int) -> None:
        """Refuse a batch of another length.

        Raises:
            UsageError: it has more or fewer rows than were named.
        """
        other = self.before_repeats
        if batch != len(self.of_row) and (other is None or batch != len(other.of_row)):
            raise wrong_length(batch, len(self.of_row))

    def forget(self) -> None:
        """Let go of what was computed from the mixes, because they have changed."""
        self._after.clear()
        self._proved.clear()

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
    """The steps of one module for a batch whose rows have different mixes.

    Low-rank steps on linear layers, DoRA's included, are computed for all rows together; whatever
    else there is, mix by mix.
    """

    def __init__(self, rows: Rows, path: str) -> None:
        self._rows, self._path = rows, path
        self._steps = [
            None if each is None else each.operations.steps.get(path) for each in rows.distinct
        ]
        self._single = [steps[0] if steps and len(steps) == 1 else None for steps in self._steps]
        inner = [step.delta if isinstance(step, Dora) else step for step in self._single]
        alike = [_goes_together(s, i) for s, i in zip(self._steps, inner, strict=True)]
        self._alike = all(alike)
        self._dropout = any(isinstance(step, LowRank) and step.dropout > 0 for step in inner)
        self._trained = any(step is not None and is_trained(step) for step in self._single)
        self._together: dict[tuple[torch.dtype, torch.device], Together] = {}
        self.wanted = any(steps is not None for steps in self._steps)

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with each row's steps done to it."""
        count = len(self._rows.of_row)
        if x.shape[0] == 1 and count > 1:  # what is the same for all rows, such as positions
            x = x.expand(count, *x.shape[1:])
            out = out.expand(count, *out.shape[1:]).contiguous()
        if x.shape[0] % count:
            raise wrong_length(x.shape[0], count)
        if self._alike and not (self._dropout and module.training):
            return self._group(x, out)(module, x, out)
        return self._by_mix(module, x, out)

    def _group(self, x: Tensor, out: Tensor) -> Together:
        if self._trained and torch.is_grad_enabled():
            return Together(self._single, self._rows.of_row, None, out.device)
        dtype = quick_dtype(x, out)
        found = self._together.get((dtype, out.device))
        return self._make(dtype, out.device) if found is None else found

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _make(self, dtype: torch.dtype, device: torch.device) -> Together:
        found = Together(self._single, self._rows.of_row, dtype, device)
        self._together[dtype, device] = found
        return found

    def _by_mix(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        result = out.clone()
        for number, places in self._rows.groups(x.shape[0]):
            selection = self._rows.distinct[number]
            if selection is None or self._steps[number] is None:
                continue
            index = torch.tensor(places, device=out.device)
            part = selection.after(self._path, module, x[index], out[index])
            if part is not None:
                result = result.index_copy(0, index, part)
        return result


def _goes_together(steps: Sequence[Step] | None, inner: Step | None) -> bool:
    """Whether a mix has nothing to do, or one low-rank step on all channels of a linear layer."""
    if steps is None:
        return True
    return isinstance(inner, LowRank) and inner.rows is None and inner.kind.in_place


def is_trained(step: Step) -> bool:
    """Whether a low-rank step's factors are being trained."""
    inner = step.delta if isinstance(step, Dora) else step
    return isinstance(inner, LowRank) and inner.factors.trained


class Together:
    """One low-rank step for each row of a batch, or none, computed for all rows at once.

    Args:
        steps: the different steps; None for none.
        of_row: which of them each row has.
        dtype: of the computation; None for that of the factors.
        device: where the layer computes.
    """

    def __init__(
        self, steps: Sequence[Step | None], of_row: Sequence[int], dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        pairs: list[tuple[Tensor, Tensor]] = []
        number, doras = dict[int, int](), dict[int, Dora]()
        for at, step in enumerate(steps):
            if isinstance(step, Dora):
                doras[at] = step
            inner = step.delta if isinstance(step, Dora) else step
            if isinstance(inner, LowRank):
                number[at] = len(pairs)
                pairs.append(_scaled(inner, dtype, device))
        rows = [number.get(of) for of in of_row]
        self._count = len(of_row)
        self._grouped = GroupedLora(pairs, rows)
        self._doras = [(row, doras[of]) for row, of in enumerate(of_row) if of in doras]
        self._dora_rows = torch.tensor([row for row, _ in self._doras], device=device)

    def __call__(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with each row's step done to it."""
        shape = out.shape
        if shape[0] != self._count:  # rows that were flattened into tokens
            x = x.reshape(self._count, -1, *x.shape[1:])
            out = out.reshape(self._count, -1, *shape[1:])
        out = self._grouped(x, out)
        if self._doras:
            out = self._with_factors(module, out)
        return out.reshape(shape)

    def _with_factors(self, module: nn.Module, out: Tensor) -> Tensor:
        """Scale the channels of the rows that have DoRA; the bias is not scaled."""
        factors = torch.stack([dora.factor(out.device) for _, dora in self._doras])
        factors = factors.reshape(len(self._doras), *(1,) * (out.dim() - 2), -1)
        kind, mine = self._doras[0][1].delta.kind, out.index_select(0, self._dora_rows)
        grown = scaled(module, kind, mine, factors)
        return out.index_copy(0, self._dora_rows, grown.to(out.dtype))


def _scaled(
    step: LowRank, dtype: torch.dtype | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    a, b = step.factors.on(device)
    a, b = (a, b) if dtype is None else (a.to(dtype), b.to(dtype))
    return a, b * step.scale
