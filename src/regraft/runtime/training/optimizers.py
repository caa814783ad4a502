"""Optimizers whose parameters are not what would be trained: refused before their first step.

A model with adapters attached has none of their parameters. Whoever builds an optimizer from the
model, as transformers' Trainer does when it gets the model itself, builds one of nothing: losses
and gradients are computed, and no value ever changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regraft.errors import MismatchError, Problem, UsageError


class Trained(Protocol):
    """What has trainable parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield them by name."""


_watched: list[Callable[[], Iterable[Trained]]] = []
_checked: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
"""The state that an optimizer had when it was checked: another one, if it was loaded."""


def watch_optimizers(handles: Callable[[], Iterable[Trained]]) -> None:
    """See to it that every optimizer is looked at before it steps; again does nothing.

    Args:
        handles: gives what is to be trained.
    """
    if not _watched:
        _watched.append(handles)
        register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Refuse an optimizer without parameters, or with the state of other ones.

    Raises:
        UsageError: it has no parameters, while adapters have gradients.
        MismatchError: its state has the shapes of other parameters.
    """
    if _checked.get(optimizer) is optimizer.state:
        return
    handles = list(_watched[0]())
    if not any(group["params"] for group in optimizer.param_groups):
        if any(p.grad is not None for handle in handles for _, p in handle.named_parameters()):
            raise without_parameters()
        return
    problems = [each for handle in handles for each in _misfits(optimizer, handle)]
    if problems:
        raise MismatchError(problems)
    _checked[optimizer] = optimizer.state


def without_parameters() -> UsageError:
    """Return the error of an optimizer that would train nothing."""
    return UsageError(
        "the optimizer has no parameters, so the adapters that are attached would not be trained",
        where="optimizer.step()", expected="the adapter's parameters", found="none",
        hint="Give Trainer handle.for_trainer() instead of the model; in a loop of your own build "
        "the optimizer from handle.parameters()",
    )  # fmt: skip


def _misfits(optimizer: Optimizer, handle: Trained) -> Iterator[Problem]:
    """Yield the adapter's parameters whose state is another parameter's, by its shapes."""
    for name, parameter in handle.named_parameters():
        state = optimizer.state.get(parameter, {}) if optimizer.state else {}
        for key, value in state.items():
            shape = getattr(value, "shape", None)
            if key in ("exp_avg", "exp_avg_sq") and shape is not None and shape != parameter.shape:
                yield Problem(
                    "the optimizer's state is of another parameter", name,
                    f"{key} of shape {list(parameter.shape)}", f"{list(shape)}",
                    "Go on from a checkpoint that was saved with this adapter's config, or begin "
                    "with a new optimizer",
                )  # fmt: skip
                break
