"""What lies in folders, as digests that can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3


def digest_file(path: Path) -> str:
    """Return the blake3 (hex) of a file, read piece by piece."""
    digest = blake3()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder; of a receipt, of what may not differ."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == "regraft/receipt.json":
            found[name] = digest_receipt(path)
        else:
            found[name] = digest_file(path) if path.is_file() else "a folder"
    return found


def digest_receipt(path: Path) -> str:
    """Return a digest of a receipt less what two runs may differ in."""
    receipt = json.loads(path.read_text())
    for name in ("created", "digest"):
        del receipt[name]
    for name in ("seconds", "peak_memory"):
        del receipt["totals"][name]
    return blake3(json.dumps(receipt).encode()).hexdigest()


def state(folder: Path) -> dict[str, Any]:
    """Return content and times of every file below a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, digest_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
