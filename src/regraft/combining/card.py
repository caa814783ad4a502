"""The model card of a combined adapter: of which ones it was made, how, and how far off it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regraft.combining.report import CombineReport
from regraft.merging.files.card import title_of
from regraft.merging.files.markup import code
from regraft.runtime.saving.card import adapter_card
from regraft.tensors import TensorSpec

_TITLE = "## Combined by regraft"


def combined_card(
    name: str, config: Mapping[str, Any], specs: Sequence[TensorSpec], report: CombineReport
) -> bytes:
    """Return the README.md of a combined adapter.

    Args:
        name: of the folder to make, or its path.
        config: its ``adapter_config.json``.
        specs: its tensors.
        report: what was done.
    """
    text = adapter_card(name, config, specs).rstrip("\n")
    return f"{text}\n\n{_TITLE}\n\n{_said(report)}\n".encode()


def _said(report: CombineReport) -> str:
    """Return what was done, in sentences."""
    told = "".join(f", {name} {value}" for name, value in report.options.items())
    parts = [
        f"- {code(title_of(adapter, 'adapter'))} with the weight {weight:g}"
        for adapter, weight in zip(report.adapters, report.weights, strict=True)
    ]
    head = f"One adapter of {len(parts)}, by the method {code(report.method)}{told}:"
    end = (
        f"All its deltas together are off by {report.error:.2%} of their norm from what the method "
        "gives, rounding included."
    )
    return "\n".join([head, "", *parts, "", end])
