"""What hooks ask of whatever answers: one mix of adapters, or one for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Answer(Protocol):
    """What adapters do in one forward pass; see :mod:`regraft.runtime.forward.selection`."""

    def after(self, path: str, module: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        """Return a module's output as the adapters have it; None to leave it.

        Args:
            path: the module's name in the model.
            module: the module.
            x: what it was given.
            out: what it made of that.
        """

    def instead(self, path: str) -> Callable[..., Any] | None:
        """Return what is called in the place of a module's forward pass, or None.

        It is called with the module and with what the module was called with.
        """

    def check(self, batch: int, given: Mapping[str, Any] | None = None) -> None:
        """Look at a batch before the model runs.

        Args:
            batch: its rows.
            given: what the model was called with; None for a part of it that is called by itself.

        Raises:
            UsageError: it does not fit what answers.
        """

    def done(self) -> None:
        """Note that a call of the model is over."""

    def adapter_names(self) -> list[str]:
        """Return the adapters that answer, each once."""

    def scope_name(self) -> str:
        """Return what messages call a scope in which this answers."""
