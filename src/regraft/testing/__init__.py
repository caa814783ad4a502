"""Helpers for tests of code that reads, merges or writes adapters; public, not part of the core.

:mod:`regraft.testing.zoo` makes tiny random base models of many architectures,
:mod:`regraft.testing.adapters` makes adapters on them with PEFT and computes what the live adapter
model answers. Both need the ``demo`` extra (torch, transformers, peft); importing this package does
not, because the names below are resolved on first use.

:mod:`regraft.testing.hostile` gives regraft files and folders that were changed at random.
Of it only :mod:`regraft.testing.hostile.pickles` needs an extra: torch reads the same files.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ARCHITECTURES": "zoo",
    "Architecture": "zoo",
    "example_inputs": "zoo",
    "load_base": "zoo",
    "logits": "zoo",
    "make_base": "zoo",
    "cast_adapter": "adapters",
    "live_logits": "adapters",
    "live_model": "adapters",
    "make_adapter": "adapters",
}

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "cast_adapter",
    "example_inputs",
    "live_logits",
    "live_model",
    "load_base",
    "logits",
    "make_adapter",
    "make_base",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
