"""Libraries that are not always there, and that talk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from regraft.errors import MissingExtraError

_INSTALL = {
    "accelerate": "pip install accelerate",
    "bitsandbytes": "pip install bitsandbytes",
    "gguf": "pip install 'regraft[gguf]'",
}
"""How to install what the extra of torch does not bring."""


def require(*names: str, why: str, where: str = "") -> None:
    """Make sure that packages are installed; they are not imported.

    Args:
        names: of the packages, as they are imported.
        why: what needs them, as the beginning of a sentence.
        where: the option that asks for it, if one does.

    Raises:
        MissingExtraError: some are not.
    """
    missing = [name for name in names if find_spec(name) is None]
    if not missing:
        return
    commands = dict.fromkeys(_INSTALL.get(n, "pip install 'regraft[torch]'") for n in missing)
    raise MissingExtraError(
        f"{why} needs {' and '.join(missing)}", where=where,
        hint=f"Run {' and '.join(commands)}",
    )  # fmt: skip


@contextmanager
def quieted(remarks: Any, verbosity: int = logging.CRITICAL) -> Iterator[None]:
    """Hide transformers' bars, and its remarks below a level of :mod:`logging`.

    Args:
        remarks: ``transformers.utils.logging``; whoever has transformers hands it in.
        verbosity: the level.
    """
    before, bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity(verbosity)
    remarks.disable_progress_bar()
    try:
        yield
    finally:
        remarks.set_verbosity(before)
        if bars:
            remarks.enable_progress_bar()
