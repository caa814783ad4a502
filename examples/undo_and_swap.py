"""Merge an adapter, put another one in its place, and take the merge back: all without the base.

python examples/undo_and_swap.py BASE FIRST SECOND FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import regraft


def main(base: str, first: str, second: str, folder: str) -> None:
    """Make three models in FOLDER, and say whether the last one is the base."""
    merged, swapped, restored = (Path(folder, name) for name in ("merged", "swapped", "restored"))
    regraft.merge(base, first, merged)
    regraft.swap(merged, second, swapped)
    regraft.unmerge(swapped, restored)
    same = regraft.diff(base, restored).same
    print(f"{restored} is {'the base, byte for byte' if same else 'NOT the base'}")


if __name__ == "__main__":
    if len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
