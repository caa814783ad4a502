"""Write bytes straight to the disk: what no work that leaves as many can beat.

    python benchmarks/shared/raw_write.py FILE BYTES [--cached]

makes a file, sets its room aside, writes it in blocks of 4 MiB past the page cache (``O_DIRECT``;
with ``--cached`` through it) and flushes it. The bytes are random, as some virtual disks do not
store zeros; what does not fill a block is left out.
"""

from __future__ import annotations

import mmap
import os
import sys

BLOCK_BYTES = 4 * 2**20


def write(path: str, nbytes: int, *, cached: bool = False) -> None:
    """Write ``nbytes`` to a file that is made or emptied, and flush them."""
    block = mmap.mmap(-1, BLOCK_BYTES)  # where a page begins, as O_DIRECT asks
    block.write(os.urandom(BLOCK_BYTES))
    direct = 0 if cached else getattr(os, "O_DIRECT", 0)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o600)
    try:
        os.posix_fallocate(fd, 0, max(nbytes, 1))
        for offset in range(0, nbytes - BLOCK_BYTES + 1, BLOCK_BYTES):
            os.pwrite(fd, block, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), cached="--cached" in sys.argv[3:])
