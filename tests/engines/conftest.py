"""What the tests of engines share."""

from cli.conftest import run

__all__ = ["run"]
