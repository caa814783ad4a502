"""What the tests of engines share."""

import contextlib

import pytest

from cli.conftest import run

__all__ = ["run"]

with contextlib.suppress(pytest.skip.Exception):  # without peft, the tests that use it are skipped
    from faithful.conftest import workshop

    __all__ += ["workshop"]
