"""The command line: a thin layer over the Python API.

Nothing heavy is imported before the command that needs it runs, so that ``regraft --help`` starts
at once. :mod:`regraft.cli.output` is the only module that prints.
"""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line on ``sys.argv`` and exit with the command's code."""
    from regraft.cli.app import app

    app.main(prog_name="regraft")
    raise AssertionError("the command group always exits")
