"""Progress of the demo's training: a bar that the caller makes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO


class Bar(Protocol):
    """What shows how far a piece of work has come."""

    def advance(self, note: str) -> None:
        """Count one more step, and show a few words on it, such as its loss."""


Progress = Callable[[str, int], AbstractContextManager[Bar]]
"""Makes a bar from what is being done and its number of steps; the bar ends with the context."""


class _Silent:
    def advance(self, note: str) -> None:
        """Show nothing."""


@contextmanager
def silent(label: str, total: int) -> Iterator[Bar]:
    """Give a bar that shows nothing."""
    del label, total
    yield _Silent()


class _Terminal:
    def __init__(self, label: str, total: int, stream: TextIO) -> None:
        from tqdm import tqdm

        columns, rows = shutil.get_terminal_size()  # 80 x 24 where a terminal says 0 x 0
        self.bar = tqdm(
            desc=label, total=total, unit=" steps", file=stream, ncols=columns, nrows=rows
        )

    def advance(self, note: str) -> None:
        """Move the bar by one step and show ``note`` behind it."""
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(1)


def on_terminal(stream: TextIO) -> Progress:
    """Return what makes tqdm bars on ``stream``, and silent ones where it is not a terminal."""

    @contextmanager
    def make(label: str, total: int) -> Iterator[Bar]:
        terminal = _Terminal(label, total, stream)
        try:
            yield terminal
        finally:
            terminal.bar.close()

    return make if stream.isatty() else silent
