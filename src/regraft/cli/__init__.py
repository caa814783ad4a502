"""The command line: a thin layer over the Python API.

Nothing heavy is imported before the command that needs it runs, so that ``regraft --help`` starts
at once. :mod:`regraft.cli.output` is the only module that prints.
"""

from __future__ import annotations

import gc
from typing import NoReturn

_OBJECTS = 50_000
"""New objects after which Python looks for cycles among them; it is 700 by default."""


def main() -> NoReturn:
    """Run the command line on ``sys.argv`` and exit with the command's code."""
    # Modules make objects that stay. To search them for cycles some hundred times takes a tenth of
    # a short command's time, and to search them once more at its end another fifth.
    gc.set_threshold(_OBJECTS)
    from regraft.cli.app import app

    try:
        app.main(prog_name="regraft")
    finally:
        gc.freeze()
    raise AssertionError("the command group always exits")
