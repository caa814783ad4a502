"""Where a verb writes: looked at before anything is fetched, and when inputs are known; locked.

Every verb that makes a folder begins with one of these, in this order: ``asked_for``,
``check_inputs``, ``check_space``, ``work``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import AccessError, EnvironmentShortfall
from regraft.merging.files.direct_io import write_error
from regraft.merging.files.publish import (
    SLACK_BYTES,
    Kind,
    check_output,
    check_space,
    folder_there,
    free_bytes,
    out_path,
    place_of,
    replaced_inputs,
)
from regraft.merging.files.staging import Workplace, workplace
from regraft.system.sharing import shares_with


@dataclass(frozen=True)
class OutputFolder:
    """The folder that a verb makes.

    Attributes:
        path: where it will be.
        overwrite: whether it may replace a folder that holds what it will hold.
        kind: what it will hold.
    """

    path: Path
    overwrite: bool
    kind: Kind = "model"

    @classmethod
    def asked_for(
        cls, out: str | Path, *sources: object, overwrite: bool, kind: Kind = "model"
    ) -> OutputFolder:
        """Return the folder that a call asks for, before any input is opened or fetched.

        Args:
            out: the output as the call has it.
            sources: the inputs as the call has them; see
                :func:`~regraft.merging.files.publish.replaced_inputs`.
            overwrite, kind: as in the class.

        Raises:
            UsageError, OutputExistsError: it cannot be there, or may not be replaced.
        """
        folder = cls(out_path(out), overwrite, kind)
        folder.check_inputs(replaced_inputs(folder.path, *sources))
        return folder

    def check_inputs(self, inputs: Sequence[Path]) -> None:
        """Refuse an output that would harm an input, or something that lies in its place.

        Raises:
            UsageError, OutputExistsError: it would.
        """
        check_output(self.path, inputs, overwrite=self.overwrite, kind=self.kind)

    def check_place(self) -> None:
        """Refuse a place where the system would let nothing be made: it is looked at, not tried.

        Raises:
            AccessError: the folder may not be written to, or a name is too long for it.
        """
        there = folder_there(self.path)
        place = place_of(self.path)
        missing = [path for path in place.parents if there in path.parents]
        for name in (place.name, *(path.name for path in missing)):
            try:
                os.lstat(there / name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise write_error(there / name, error) from None
        if not os.access(there, os.W_OK | os.X_OK):
            raise AccessError(
                "cannot write", where=str(there), expected="a folder that this user may write to",
                hint="Check permissions and the disk, or give another -o; nothing was written",
            )  # fmt: skip

    def shares(self, paths: Iterable[Path], reflink: str) -> bool:
        """Whether files of the output may share blocks of the disk with input files.

        Args:
            paths: the input files whose bytes may come out as they are.
            reflink: of :data:`regraft.merging.options.REFLINK`; ``always`` asks for all files,
                ``auto`` for any.

        Raises:
            EnvironmentShortfall: blocks cannot be shared, and always shall be.
        """
        if reflink == "never":
            return False
        there = folder_there(self.path)
        found = {path: _shares(path, there) for path in paths}
        alone = [path for path in found if not found[path]]
        if alone and reflink == "always":
            raise EnvironmentShortfall(
                "blocks of the disk cannot be shared", where=str(there),
                expected="a file system with reflinks (XFS, btrfs) that inputs and output lie on",
                found=f"another disk, or no reflinks, for {alone[0]}"
                + f" and {len(alone) - 1} more" * (len(alone) > 1),
                hint="Choose another folder, or leave --reflink out: the bytes are written then",
            )  # fmt: skip
        return len(alone) < len(found)

    def check_space(self, nbytes: int) -> None:
        """Refuse to begin what will not fit.

        Raises:
            DiskSpaceError: fewer bytes are free than are needed.
        """
        check_space(self.path, nbytes)

    def disk(self, nbytes: int) -> dict[str, int]:
        """Return the bytes that are needed and those that are free."""
        return {"needed": nbytes + SLACK_BYTES, "free": free_bytes(self.path)}

    def work(self) -> AbstractContextManager[Workplace]:
        """Give the locked work folder that becomes this one; see :func:`workplace`."""
        return workplace(self.path, overwrite=self.overwrite, kind=self.kind)


def _shares(path: Path, folder: Path) -> bool:
    """Whether a file in a folder may share blocks with a file; not, where it cannot be tried.

    What is in the way there is in the way of the work, too, which says so.
    """
    try:
        return shares_with(path, folder)
    except OSError:
        return False
