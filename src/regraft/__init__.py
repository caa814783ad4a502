"""regraft: merge LoRA adapters into the checkpoints of language models, and look into both.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regraft._version import __version__

if TYPE_CHECKING:
    from regraft.api import check, merge, plan
    from regraft.errors import (
        AccessError,
        AdapterError,
        DiskSpaceError,
        EnvironmentShortfall,
        FormatError,
        InputError,
        MemoryCapError,
        MismatchError,
        MissingExtraError,
        NumericError,
        OutputExistsError,
        Problem,
        RegraftError,
        UnsupportedError,
        UsageError,
    )
    from regraft.inspection import Inspection, inspect
    from regraft.merging.events import ProgressEvent
    from regraft.merging.plan import Plan
    from regraft.merging.receipt import Receipt
    from regraft.merging.report import CheckReport

_HOME = {
    "merge": "regraft.api",
    "plan": "regraft.api",
    "check": "regraft.api",
    "inspect": "regraft.inspection",
    "Inspection": "regraft.inspection",
    "ProgressEvent": "regraft.merging.events",
    "Plan": "regraft.merging.plan",
    "Receipt": "regraft.merging.receipt",
    "CheckReport": "regraft.merging.report",
    **dict.fromkeys(
        (
            "AccessError",
            "AdapterError",
            "DiskSpaceError",
            "EnvironmentShortfall",
            "FormatError",
            "InputError",
            "MemoryCapError",
            "MismatchError",
            "MissingExtraError",
            "NumericError",
            "OutputExistsError",
            "Problem",
            "RegraftError",
            "UnsupportedError",
            "UsageError",
        ),
        "regraft.errors",
    ),
}

__all__ = [  # noqa: RUF022  (grouped: verbs, what they return, errors)
    "merge",
    "plan",
    "check",
    "inspect",
    "CheckReport",
    "Inspection",
    "Plan",
    "ProgressEvent",
    "Receipt",
    "AccessError",
    "AdapterError",
    "DiskSpaceError",
    "EnvironmentShortfall",
    "FormatError",
    "InputError",
    "MemoryCapError",
    "MismatchError",
    "MissingExtraError",
    "NumericError",
    "OutputExistsError",
    "Problem",
    "RegraftError",
    "UnsupportedError",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
