"""A single file as an output: written beside its place, flushed, then renamed into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import OutputExistsError, UsageError
from regraft.formats.files.reading import expanded, is_there
from regraft.formats.files.watching import check_unchanged, leave_out, telling_changes
from regraft.formats.layout import is_gguf
from regraft.merging.files.direct_io import write_error
from regraft.merging.files.publish import check_space, out_path, place_of
from regraft.merging.files.staging import BUILT, locked_folder
from regraft.system.locks import is_lock, remove_all
from regraft.system.renaming import move_to_absent
from regraft.system.syncing import sync_place

SUFFIX = ".gguf"


@dataclass(frozen=True)
class OutputFile:
    """The file that a verb makes.

    Attributes:
        path: where it will be.
        overwrite: whether it may replace a file of its kind.
    """

    path: Path
    overwrite: bool

    @classmethod
    def asked_for(cls, out: str | Path, *sources: str | Path | None, overwrite: bool) -> OutputFile:
        """Return the file that a call asks for, before any input is opened or fetched.

        Args:
            out: the output as the call has it.
            sources: the inputs as the call has them: paths or Hub ids.
            overwrite: as in the class.

        Raises:
            UsageError, OutputExistsError: it cannot be there, or may not be replaced.
        """
        path = out_path(out)
        if path.suffix != SUFFIX:
            raise UsageError(
                "a GGUF model is a file", where="-o", expected=f"a name that ends in {SUFFIX}",
                found=str(out), hint="For a folder: --for ollama or --for mlx",
            )  # fmt: skip
        file = cls(path, overwrite)
        there = [expanded(source) for source in sources if source is not None]
        file.check_inputs([each for each in there if is_there(each)])
        return file

    def check_inputs(self, inputs: Sequence[Path]) -> None:
        """Refuse to replace an input, or what is no GGUF file.

        A file beside the files of an input is fine.

        Raises:
            UsageError, OutputExistsError: it would.
        """
        for path in inputs:
            if path.resolve() == self.path.resolve():
                raise UsageError("the output would lie in (or over) an input", where=str(self.path),
                                 found=str(path), hint="Choose another name for -o")  # fmt: skip
        if not os.path.lexists(self.path):
            return
        if self.path.is_symlink() or not self.path.is_file() or not is_gguf(self.path):
            found = "a link" if self.path.is_symlink() else "a folder"
            raise OutputExistsError(
                "the output exists already, and --overwrite replaces only GGUF files",
                where=str(self.path), found="a file" if self.path.is_file() else found,
                hint="Give another -o, or remove it yourself",
            )  # fmt: skip
        if not self.overwrite:
            raise _exists(self.path)

    def check_space(self, nbytes: int) -> None:
        """Refuse to begin what will not fit.

        Raises:
            DiskSpaceError: fewer bytes are free than are needed.
        """
        check_space(self.path, nbytes)

    @contextmanager
    def work(self) -> Iterator[Path]:
        """Give the path to write at, in a locked folder beside the output; on success it is moved.

        Nothing is kept of work that failed, and of what an earlier process left nothing is used.

        Raises:
            BusyError: another process works on the same output.
            OutputExistsError: something came to be there meanwhile.
            ChangedError: inputs were changed meanwhile.
            AccessError, DiskSpaceError: the system refused.
        """
        folder = place_of(self.path)
        missing = [p for p in (folder.parent, *folder.parent.parents) if not os.path.lexists(p)]
        try:
            with locked_folder(folder) as locked:
                try:
                    _clear(folder)
                    leave_out(folder, self.path.absolute())
                    with telling_changes():
                        yield folder / BUILT
                        check_unchanged()
                    self._publish(folder / BUILT)
                finally:
                    locked.remove(as_far_as_can_be=True)
        except OSError as error:
            raise write_error(Path(error.filename or folder), error) from error
        finally:
            with contextlib.suppress(OSError):  # not there, or not empty: it holds the output
                for path in missing:
                    path.rmdir()

    def _publish(self, file: Path) -> None:
        place = self.path.absolute()
        if not move_to_absent(file, place):
            self.check_inputs([])
            file.replace(place)
        sync_place(place.parent)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if not is_lock(path.name):
            remove_all(path)


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(
        "the output exists already", where=str(path),
        hint="Give another -o, or --overwrite to replace it once the new one is complete",
    )  # fmt: skip
