"""The model card of a shrunk adapter: its own rank and size, and how far off it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.formats.reading import read_whole, typed_os_errors
from regraft.merging.card import base_metadata
from regraft.merging.sidefiles import CARD
from regraft.runtime.saving.card import adapter_card, is_made
from regraft.shrinking.report import ShrinkReport
from regraft.tensors import TensorSpec

_TITLE = "## Shrunk by regraft"
_LARGEST = 2**20
"""Bytes of a card; what is larger is nobody's text, and goes along as it is."""

_SECTION = re.compile(rf"\n+{_TITLE}\n.*?(?=\n#+ |\Z)", re.DOTALL)


def shrunk_card(
    name: str, folder: Path, config: Mapping[str, Any], specs: Sequence[TensorSpec],
    report: ShrinkReport,
) -> bytes:  # fmt: skip
    """Return a shrunk adapter's README.md.

    A card that a program made gives way to a new one, with the licence and language of the old. One
    that a person wrote stays, and gets a section that says what was done.

    Args:
        name: of the folder to make, or its path.
        folder: the adapter's.
        config: the new ``adapter_config.json``.
        specs: the new tensors.
        report: what was done.

    Raises:
        AccessError: the old card cannot be read.
    """
    path = folder / CARD
    with typed_os_errors(path):
        if path.is_file() and path.stat().st_size > _LARGEST:
            return read_whole(path)
        there = read_whole(path) if path.is_file() else b""
        old = there.decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    section = f"\n\n{_TITLE}\n\n{_said(report)}\n"
    if not old or is_made(old):
        old = adapter_card(name, config, specs, inherited=base_metadata(folder))
    text = _SECTION.sub("", old).rstrip("\n") + section
    return text.encode("utf-8", "surrogateescape")


def _said(report: ShrinkReport) -> str:
    """Return what was done, in sentences."""
    said = [f"The factors are stored in {report.dtype}."]
    lower = [m for m in report.modules if m.rank_after < m.rank_before]
    if lower:
        before, after = (
            _span([getattr(m, which) for m in lower]) for which in ("rank_before", "rank_after")
        )
        said.append(
            f"The rank of {len(lower)} of {len(report.modules)} modules was cut: {before} -> "
            f"{after}."
        )
    if report.uniform:
        said.append("Every module's scale was multiplied into its B, and all have one rank.")
    worst = max(report.modules, key=lambda m: m.error, default=None)
    if worst is not None:
        said.append(
            f"All deltas together are off by {report.error:.2%} of their norm, rounding included; "
            f"the farthest, `{worst.name}`, by {worst.error:.2%}."
        )
    return "\n".join(said)


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"{low}" if low == high else f"{low} to {high}"
