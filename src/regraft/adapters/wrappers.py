"""Names of modules without what training wraps around them.

torch.compile, FSDP, activation checkpointing and DistributedDataParallel put a module around
another one, whose name then stands in the names of all tensors below.
"""

from __future__ import annotations

import re

PREFIX = "base_model.model."
"""PEFT's prefix before every name in an adapter."""

_SEGMENTS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_SEGMENT = re.compile(rf"(?:(?<=\.)|^)(?:{_SEGMENTS})(?:\.|$)")
_IN_EXPRESSION = re.compile(rf"(?:{_SEGMENTS})\\?\.")
_PARALLEL = "module."


def unwrapped(name: str) -> str:
    """Return a tensor's or module's name without wrappers, and without PEFT's prefix.

    A leading ``module.`` is DistributedDataParallel's only where PEFT's prefix follows it.
    """
    name = _SEGMENT.sub("", name)
    return name.removeprefix(_PARALLEL * name.startswith(_PARALLEL + PREFIX)).removeprefix(PREFIX)


def expression_unwrapped(text: str) -> str:
    """Return a name or regular expression of a config without wrappers."""
    return _IN_EXPRESSION.sub("", text)
