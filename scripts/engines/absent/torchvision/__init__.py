"""Stands in for torchvision, which does not run beside a CPU's torch; nothing of it is called.

vLLM's classes that see import it, also in the processes that it starts to look at them.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

__version__ = "0.28.0"

_BELOW = ("transforms", "transforms.v2", "transforms.functional", "transforms.v2.functional",
          "io", "ops", "models")  # fmt: skip


class _Absent(ModuleType):
    """A module that is imported by name and of which nothing is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> Any:
        return _mock(name)


def _mock(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()


def __getattr__(name: str) -> Any:
    return _mock(name)


for _name in (f"{__name__}.{below}" for below in _BELOW):
    sys.modules[_name] = _Absent(_name)
