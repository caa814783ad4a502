"""What answers: one mix of adapters for all rows of a batch, or one for each row."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.runtime.forward import scopes
from regraft.runtime.forward.choices import listed
from regraft.runtime.forward.hooks import tensors_in
from regraft.runtime.forward.layers.grouped import GroupedLora
from regraft.runtime.forward.layers.operations import Operations
from regraft.runtime.forward.layers.quick import quick_dtype
from regraft.runtime.forward.layers.steps import Dora, LowRank, Step, scaled
from regraft.runtime.forward.mixed_modules import by_name, prove, split_of
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.row_axes import (
    Axis,
    axis_of,
    doubt_of_images,
    is_in_backward,
    is_of_transformers,
    unknown_rows,
    wrong_length,
)

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
        if steps is None:
            return None
        for step in steps:
            out = step(module, x, out)
        return out

    def instead(self, path: str) -> Callable[..., Any] | None:
        """Return what is called in the place of a module's forward pass, or None."""
        return self.operations.replacements.get(path)

    def check(self, batch: int, given: Mapping[str, Any] | None = None) -> None:
        """Accept any batch."""

    def done(self) -> None:
        """Note that a call of the model is over."""

    def adapter_names(self) -> list[str]:
        """Return the adapters."""
        return [name for name, _ in self.names]

    def scope_name(self) -> str:
        """Return what messages call a scope in which these adapters answer."""
        return f"the scope of {listed(self.names)}"


UNCALLED = "the model is not called as a whole"
"""Why nothing is known of images where a part of a model is called by itself."""


class Call(threading.local):
    """What is known of the call of the model that runs in this thread.

    Attributes:
        batch: its rows.
        images: why it is not known which row each image belongs to; None where it is.
    """

    batch: int = 1
    images: str | None = UNCALLED


@dataclass(eq=False)
class RowSelection:
    """A mix of adapters for each row of a batch.

    Attributes:
        distinct: the different mixes; None stands for no adapter.
        of_row: which of them each row has.
        base: the model.
        key: the handle's number.
        repeats: how many rows the model may make of each, one after the other.
        proved: modules whose rows were found not to depend on one another.
    """

    distinct: tuple[Selection | None, ...]
    of_row: tuple[int, ...]
    base: LiveBase
    key: int
    repeats: int = 1
    _after: dict[str, Any] = field(default_factory=dict)
    proved: set[str] = field(default_factory=set)
    _axes: dict[str, Axis] = field(default_factory=dict)
    _calls: Call = field(default_factory=Call)

    def after(self, path: str, module: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        """Return a module's output with each row's steps done to it; None for none."""
        if len(self.distinct) == 1:
            only = self.distinct[0]
            return None if only is None else only.after(path, module, x, out)
        found = self._after.get(path)
        if found is None:
            found = self._make(path)
        return found(module, x, out) if found.wanted else None

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _make(self, path: str) -> MixedSteps:
        found = self._after[path] = MixedSteps(self, path)
        return found

    def instead(self, path: str) -> Callable[..., Any] | None:
        """Return what is called in the place of a module's forward pass, or None."""
        if len(self.distinct) == 1:
            return None if self.distinct[0] is None else self.distinct[0].instead(path)
        if not path and not is_of_transformers(self.base.model):
            return MixedModel(self)
        if not any(each is not None and each.instead(path) for each in self.distinct):
            return None
        return MixedReplacement(self, path)

    def check(self, batch: int, given: Mapping[str, Any] | None = None) -> None:
        """Refuse a batch of another length, and note what a call says of its rows.

        Args:
            batch: its rows; those that were named, or as many times more as the model makes.
            given: what the model was called with; None for a part of it that is called by itself.

        Raises:
            UsageError: it has more or fewer rows than were named.
        """
        count = len(self.of_row)
        if batch not in (count, count * self.repeats):
            raise wrong_length(batch, count * self.repeats)
        self._calls.batch = batch
        if given is not None and len(self.distinct) > 1:
            self._calls.images = doubt_of_images(self.base.config or {}, given, batch)

    def done(self) -> None:
        """Forget what the call that is over said of its images."""
        self._calls.images = UNCALLED

    def adapter_names(self) -> list[str]:
        """Return the adapters of all rows, each once."""
        mixes = [each.adapter_names() for each in self.distinct if each is not None]
        return list(dict.fromkeys(name for names in mixes for name in names))

    def scope_name(self) -> str:
        """Return what messages call a scope of rows."""
        return "a scope of rows"

    def axis(self, path: str) -> Axis:
        """Return what is known of the rows in what a module is given."""
        found = self._axes.get(path)
        if found is None:
            found = self._axes[path] = axis_of(self.base, path)
        return found

    def check_shape(self, axis: Axis, shape: Sequence[int]) -> None:
        """Refuse an input of which it is not known where its rows are.

        Raises:
            UnsupportedError: it is not known.
            UsageError: its rows cannot be those that were named.
        """
        if axis.of_images and self._calls.images is not None and not is_in_backward():
            raise unknown_rows(axis.path, self._calls.images)
        axis.check(shape, len(self.of_row), self.repeats)

    def is_to_be_proved(self, path: str, module: nn.Module) -> bool:
        """Whether it is to be tried out that a module's rows do not depend on one another.

        Not in training, where dropout would differ, nor while compiling.
        """
        if path in self.proved or module.training or torch.compiler.is_compiling():
            return False
        return not isinstance(module, nn.MultiheadAttention | nn.RNNBase)

    def run(
        self, selection: Selection | None, path: str, module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """Run a module with one mix for all rows; of a whole model, all its layers."""
        found = selection.instead(path) if selection is not None else None
        forward = type(module).forward if found is None else found
        if path:
            return forward(module, *args, **kwargs)
        with scopes.scope(self.key, selection):
            output = forward(module, *args, **kwargs)
        if torch.is_grad_enabled():
            inner = {**scopes.current(), self.key: selection}
            scopes.remember_for_backward(tensors_in(output), inner)
        return output

    def spread(self, value: Any) -> Any:
        """Return ids that are the same for all rows, such as positions, for each row."""
        count = len(self.of_row)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != 1 or count == 1:
            return value
        batch = count if self.repeats == 1 else self._calls.batch
        return value.expand(batch, *value.shape[1:])

    def forget(self) -> None:
        """Let go of what was computed from the mixes, because they have changed."""
        self._after.clear()
        self.proved.clear()
        self._axes.clear()

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


class MixedSteps:
    """The steps of one module for a batch whose rows have different mixes.

    Low-rank steps on linear layers, DoRA's included, are computed for all rows together; whatever
    else there is, mix by mix.
    """

    def __init__(self, rows: RowSelection, path: str) -> None:
        self._rows, self._path, self._axis = rows, path, rows.axis(path)
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
        self._rows.check_shape(self._axis, x.shape)
        if self._axis.is_ids and x.shape[0] == 1:
            x = self._rows.spread(x)
            out = out.expand(x.shape[0], *out.shape[1:]).contiguous()
        if out.shape[0] != x.shape[0]:
            raise unknown_rows(self._path, "what comes out does not have its input's rows")
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


class MixedReplacement:
    """A module's forward pass for a batch whose rows have different weights."""

    def __init__(self, rows: RowSelection, path: str) -> None:
        self._rows, self._path = rows, path
        self._axis = rows.axis(path)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module once for each mix, on its own rows.

        Raises:
            UnsupportedError: it is not known which row its inputs belong to, or one row's answer
                depends on other rows.
            UsageError: the rows cannot be those that were named.
        """
        rows, given = self._rows, by_name(module, args, kwargs)
        if self._axis.is_ids:
            given = {name: rows.spread(value) for name, value in given.items()}

        def run(selection: Selection | None, taken: Mapping[str, Any]) -> Any:
            values = list(taken.items())
            ordered = [value for _, value in values[: len(args)]]  # names may be those of others
            return rows.run(selection, self._path, module, ordered, dict(values[len(args) :]))

        split = split_of(self._axis, rows.groups, rows.check_shape, module, given)
        if rows.is_to_be_proved(self._path, module):
            mixes = (None, next((each for each in rows.distinct if each is not None), None))
            for mix in dict.fromkeys(mixes):
                prove(self._path, split, module, given, functools.partial(run, mix))
            rows.proved.add(self._path)
        return split.run(lambda number, taken: run(rows.distinct[number], taken))


class MixedModel(MixedReplacement):
    """A whole model, run once for each mix: of its layers it is not known where their rows are."""

    def __init__(self, rows: RowSelection) -> None:
        self._rows, self._path, self._axis = rows, "", Axis("")

    __call__ = torch.compiler.disable(MixedReplacement.__call__)
