"""The model card of a shrunk adapter: its own rank and size, and how far off it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.formats.files.inside import read_whole
from regraft.formats.files.reading import typed_os_errors
from regraft.merging.files.front_matter import read_metadata
from regraft.merging.files.markup import code
from regraft.runtime.saving.card import adapter_card, is_made
from regraft.shrinking.report import ShrinkReport
from regraft.tensors import TensorSpec

_TITLE = "## Shrunk by regraft"
_LARGEST = 2**20
"""Bytes of a card; what is larger is nobody's text, and goes along as it is."""

_SECTION = re.compile(rf"\n+{_TITLE}\n.*?(?=\n#+ |\Z)", re.DOTALL)


def shrunk_card(
    name: str, card: Path | None, config: Mapping[str, Any], specs: Sequence[TensorSpec],
    report: ShrinkReport,
) -> bytes | None:  # fmt: skip
    """Return a shrunk adapter's README.md; None where the old one goes along as it is.

    A card that a program made gives way to a new one, with the licence and language of the old. One
    that a person wrote stays, and gets a section that says what was done.

    Args:
        name: of the folder to make, or its path.
        card: the adapter's, if it has one.
        config: the new ``adapter_config.json``.
        specs: the new tensors.
        report: what was done.

    Raises:
        AccessError: the old card cannot be read.
    """
    old = ""
    if card is not None:
        with typed_os_errors(card):
            if card.stat().st_size > _LARGEST:
                return None
        old = read_whole(card).decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    section = f"\n\n{_TITLE}\n\n{_said(report)}\n"
    if not old or is_made(old):
        inherited = read_metadata(card.parent).fields if card is not None else {}
        old = adapter_card(name, config, specs, inherited=inherited)
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
            f"the farthest, {code(worst.name)}, by {worst.error:.2%}."
        )
    return "\n".join(said)


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"{low}" if low == high else f"{low} to {high}"
