"""Verbs that write a model and return its receipt: done with a progress line, and told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.merging.files.receipt import Receipt


def write_model(
    output: Output, verb: Callable[..., Receipt], arguments: dict[str, Any], *, deltas: bool = False
) -> None:
    """Write a model, and print what became of it.

    Args:
        output: prints, as text or as JSON.
        verb: of regraft's Python functions the one to call; it takes ``progress``.
        arguments: what else it takes; ``max_memory`` is the cap that the summary speaks of.
        deltas: adapters were merged: the JSON names those that changed next to nothing.
    """
    with output.progress() as progress:
        receipt = verb(**arguments, progress=progress)
    tell_receipt(output, receipt, arguments["max_memory"], deltas=deltas)


def tell_receipt(output: Output, receipt: Receipt, cap: str, *, deltas: bool = False) -> None:
    """Print what became of a model; see :func:`write_model`."""
    from regraft.cli.texts import receipt as receipt_text

    output.warn(receipt.warnings)
    more = {"quiet": receipt.quiet} if deltas else {}
    text = receipt_text.render(receipt, cap=cap)
    output.data(receipt.to_json() | more, text)
