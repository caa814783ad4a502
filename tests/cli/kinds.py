"""Types of the fixtures."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from click.testing import Result

Run = Callable[..., Result]
"""Runs the command line in this process."""

Launch = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs Python in a process of its own."""

FakeApi = Callable[..., None]
"""Puts functions in the place of those of the API."""
