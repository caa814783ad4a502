"""The summary that the conversion of an adapter ends with, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.cli.text import pairs, percent, plural, seconds

if TYPE_CHECKING:
    from regraft.translating import AdapterConversion


def render(done: AdapterConversion) -> str:
    """Return the summary of an adapter that was written in another dialect."""
    rows = [
        ("adapter", done.adapter),
        ("dialect", f"{done.dialect} -> {done.to}"),
        ("modules", f"{done.modules}, {plural(done.tensors, 'tensor')}"),
        ("form", _form(done)),
        ("files", ", ".join(done.files)),
        ("time", seconds(done.seconds)),
    ]
    notes = "\n".join(f"note: {note}" for note in done.notes)
    return "\n\n".join(part for part in (pairs(rows), notes, f"written to {done.output}") if part)


def _form(done: AdapterConversion) -> str:
    """Return what became of scales and ranks, and what that cost."""
    if not done.uniform:
        return "as it was: every value stays"
    exact = "the same deltas, to the last bit"
    off = f"B is off by {percent(done.error)}, from its rounding to float32"
    return f"uniform: scales are in B, one rank; {off if done.error else exact}"
