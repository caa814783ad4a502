"""The model card of an extracted adapter: out of what it came, and what it lacks."""

from __future__ import annotations

from pathlib import Path

from regraft.adapters.dialects.as_peft import config_of, tensors_of
from regraft.adapters.dialects.form import PlainAdapter
from regraft.extracting.report import ExtractReport
from regraft.runtime.saving.card import adapter_card
from regraft.tensors import TensorSpec

_TITLE = "## Extracted by regraft"


def extracted_card(place: str, plain: PlainAdapter, report: ExtractReport) -> bytes:
    """Return the README.md of an extracted adapter.

    Args:
        place: the folder to make.
        plain: the adapter; stacks of experts are left out of the counts.
        report: how it was made.
    """
    shown = [module for module in plain.modules if module.kind != "experts"]
    counted = PlainAdapter(tuple(shown), plain.whole, base=plain.base, task_type=plain.task_type)
    specs = [
        TensorSpec(name, tensor.dtype, tensor.shape, Path(place), 0, tensor.nbytes)
        for name, tensor in tensors_of(counted).items()
    ]
    text = adapter_card(place, config_of(counted), specs).rstrip("\n")
    said = (
        f"It was extracted from a fine-tuned model: the leading singular triples of what each of "
        f"{len(report.modules)} weights adds to its base. All of them together are off by "
        f"{report.error:.2%} of the difference."
    )
    return f"{text}\n\n{_TITLE}\n\n{said}\n".encode()
