"""regraft: merge LoRA adapters into checkpoints of language models, verify it, take it back.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regraft._version import __version__

if TYPE_CHECKING:
    from regraft.adapters.lora_config import LoraConfig
    from regraft.api import merge, plan
    from regraft.combining.report import CombineReport
    from regraft.combining.verb import combine
    from regraft.converting import convert, dequantize, quantize
    from regraft.digesting import DigestReport, digest
    from regraft.engines.checking import check
    from regraft.errors import (
        AccessError,
        AdapterError,
        BaseMismatchWarning,
        BusyError,
        ChangedError,
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
    from regraft.exporting.report import ExportReport
    from regraft.exporting.verb import export
    from regraft.extracting.report import ExtractReport
    from regraft.extracting.verb import extract
    from regraft.inspection import Inspection, inspect
    from regraft.merging.files.leftovers import Leftover
    from regraft.merging.files.receipt import Receipt
    from regraft.merging.planning.plan import Plan
    from regraft.merging.planning.report import CheckReport, UnmergeReport
    from regraft.probing.report import ProbeReport
    from regraft.probing.verb import probe
    from regraft.progress import ProgressEvent
    from regraft.runtime.attaching import attach, handle_of
    from regraft.runtime.handle import Adapters as Adapters
    from regraft.runtime.merged_loading import load_merged
    from regraft.runtime.saving.save import save
    from regraft.runtime.store.cache import AdapterCache, CacheStats
    from regraft.shrinking.report import ShrinkReport
    from regraft.shrinking.verb import shrink
    from regraft.translating import AdapterConversion
    from regraft.undoing import clean, swap, unmerge
    from regraft.verifying.diffing.diff import diff
    from regraft.verifying.diffing.report import DiffReport
    from regraft.verifying.report import VerifyReport
    from regraft.verifying.verify import verify

_HOME = {
    "merge": "regraft.api",
    "plan": "regraft.api",
    "check": "regraft.engines.checking",
    "probe": "regraft.probing.verb",
    "ProbeReport": "regraft.probing.report",
    "inspect": "regraft.inspection",
    "Inspection": "regraft.inspection",
    "ProgressEvent": "regraft.progress",
    "Plan": "regraft.merging.planning.plan",
    "Receipt": "regraft.merging.files.receipt",
    "CheckReport": "regraft.merging.planning.report",
    "UnmergeReport": "regraft.merging.planning.report",
    "Leftover": "regraft.merging.files.leftovers",
    "convert": "regraft.converting",
    "dequantize": "regraft.converting",
    "quantize": "regraft.converting",
    "digest": "regraft.digesting",
    "DigestReport": "regraft.digesting",
    "AdapterConversion": "regraft.translating",
    "unmerge": "regraft.undoing",
    "swap": "regraft.undoing",
    "clean": "regraft.undoing",
    "verify": "regraft.verifying.verify",
    "diff": "regraft.verifying.diffing.diff",
    "export": "regraft.exporting.verb",
    "ExportReport": "regraft.exporting.report",
    "save": "regraft.runtime.saving.save",
    "LoraConfig": "regraft.adapters.lora_config",
    "shrink": "regraft.shrinking.verb",
    "combine": "regraft.combining.verb",
    "CombineReport": "regraft.combining.report",
    "extract": "regraft.extracting.verb",
    "ExtractReport": "regraft.extracting.report",
    "load_merged": "regraft.runtime.merged_loading",
    "attach": "regraft.runtime.attaching",
    "handle_of": "regraft.runtime.attaching",
    "Adapters": "regraft.runtime.handle",
    "AdapterCache": "regraft.runtime.store.cache",
    "CacheStats": "regraft.runtime.store.cache",
    "DiffReport": "regraft.verifying.diffing.report",
    "ShrinkReport": "regraft.shrinking.report",
    "VerifyReport": "regraft.verifying.report",
    **dict.fromkeys(
        (
            "AccessError",
            "AdapterError",
            "BaseMismatchWarning",
            "BusyError",
            "ChangedError",
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

# ``Adapters`` is public too, but not listed: ``from regraft import *`` must not load torch.
__all__ = [  # noqa: RUF022  (grouped: verbs, what they return, errors)
    "merge",
    "unmerge",
    "swap",
    "convert",
    "dequantize",
    "quantize",
    "plan",
    "check",
    "verify",
    "probe",
    "inspect",
    "diff",
    "shrink",
    "combine",
    "extract",
    "export",
    "digest",
    "clean",
    "load_merged",
    "attach",
    "handle_of",
    "LoraConfig",
    "AdapterCache",
    "CacheStats",
    "save",
    "AdapterConversion",
    "CheckReport",
    "CombineReport",
    "DiffReport",
    "DigestReport",
    "ExportReport",
    "ExtractReport",
    "Inspection",
    "Leftover",
    "Plan",
    "ProbeReport",
    "ProgressEvent",
    "Receipt",
    "ShrinkReport",
    "UnmergeReport",
    "VerifyReport",
    "AccessError",
    "AdapterError",
    "BusyError",
    "ChangedError",
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
    "BaseMismatchWarning",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "Adapters"])
