"""The names of the methods, for whoever lists them without computing anything."""

from __future__ import annotations

METHOD_NAMES = (
    "sum",
    "cat",
    "svd",
    "knots",
    "tsv",
    "iso",
    "core_space",
    "compress_then_merge",
    "ties",
    "dare",
    "dare_ties",
    "della",
    "breadcrumbs",
    "magnitude_prune",
    "peft_linear",
    "peft_ties",
    "peft_magnitude_prune",
)
"""As in :data:`regraft.deltas.methods.registry.METHODS`, in its order."""
