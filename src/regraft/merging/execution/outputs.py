"""The weight files of an execution: each is open from its first tensor to its last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from regraft.merging.files.direct_io import Origin, OutputFile
from regraft.merging.planning.targets import Target

SharedParts = Callable[[Target], Iterable[tuple[int, int, Origin]]]
"""Gives offset, size and origin of the bytes of a file that other files have, in file order."""


class Outputs:
    """The files that are made; safe to use from several threads, of which one opens them."""

    def __init__(self, folder: Path, targets: Sequence[Target], shared: SharedParts | None) -> None:
        """Take the folder and the files, none of which is made yet.

        Args:
            folder: where they go.
            targets: the files.
            shared: gives what of a file may share blocks of the disk with files that have the same
                bytes; None where nothing may.
        """
        self._folder, self._targets, self._shared = folder, targets, shared
        self._open: dict[str, OutputFile] = {}
        self._unfinished = {target.name: len(target.steps) for target in targets}
        self._lock = threading.Lock()  # over both tables; files are written and closed without it

    def skip(self, target: Target) -> None:
        """Count a tensor that an earlier try has written."""
        self._unfinished[target.name] -= 1

    def make_finished(self) -> None:
        """Make the files that need no tensor, or none any more, and flush them to the disk."""
        for target in self._targets:
            if not self._unfinished[target.name]:
                self._create(target).close(sync=True)

    def _create(self, target: Target) -> OutputFile:
        path, shared = self._folder / target.name, self._shared
        output = OutputFile(path, target.size, target.pieces, share=shared is not None)
        try:
            for offset, size, origin in shared(target) if shared is not None else ():
                output.share(offset, size, origin)
        except BaseException:
            output.close(sync=False)
            raise
        return output

    def open(self, target: Target) -> OutputFile:
        """Return a file to write to, made if it is not open; one thread at a time may ask."""
        with self._lock:
            output = self._open.get(target.name)
        if output is None:
            output = self._create(target)
            with self._lock:
                self._open[target.name] = output
        return output

    def finish(self, target: Target) -> None:
        """Count a tensor as written; with a file's last one, flush it to the disk and close it."""
        with self._lock:
            self._unfinished[target.name] -= 1
            output = None if self._unfinished[target.name] else self._open.pop(target.name)
        if output is not None:
            output.close(sync=True)

    def flush(self) -> None:
        """Hand all that is gathered for open files to the system."""
        with self._lock:
            outputs = list(self._open.values())
        for output in outputs:
            output.flush()

    def close(self) -> None:
        """Close whatever a failure left open."""
        for output in self._open.values():
            output.close(sync=False)
        self._open.clear()
