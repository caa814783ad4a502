"""Make the digests on an emulated ARM processor, and hold them against those of x86-64.

    PYTHONPATH=scripts python -m arm [--folder .arm] [--generic] [--brief] [--only TEXT]

It needs a Debian system, of which apt-get and dpkg-deb are used. All that it fetches lies in the
folder, which may be removed at any time. It ends with 1 if a digest differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from arm.root import environment, prepared

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    folder = "where to put what is fetched"
    parser.add_argument("--folder", type=Path, default=ROOT / ".arm", help=folder)
    generic = "compile for any arm64, not for the processor that qemu shows"
    parser.add_argument("--generic", action="store_true", help=generic)
    options, others = parser.parse_known_args()
    place = options.folder.resolve()
    command = prepared(place)
    told = environment(place, [ROOT / "src", ROOT / "scripts"])
    if options.generic:
        told["NUMBA_CPU_NAME"] = "generic"
    return subprocess.run([*command, "-m", "digests", "--times", *others], env=told).returncode


if __name__ == "__main__":
    sys.exit(main())
