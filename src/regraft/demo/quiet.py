"""Make the demo's libraries good guests: they talk over nobody and leave others their share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from regraft.libraries import quieted


def wait_asleep() -> None:
    """Let torch's threads sleep while they wait for each other; only works before its import.

    They spin by default, which on a machine that is busy makes a step several times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' bars and remarks, and warnings on what others call in each other.

    Errors are exceptions and pass untouched.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as remarks

    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)  # it misses a kernel that it can do without
    try:
        with quieted(remarks, logging.ERROR), warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.filterwarnings("ignore", category=kind, module="transformers|torch")
            yield
    finally:
        bitsandbytes.setLevel(level)
