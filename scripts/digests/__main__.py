"""Print a digest of every output of a fixed set, and hold them against those that are expected.

    PYTHONPATH=scripts python -m digests [--only TEXT] [--brief] [--json FILE] [--write]

It ends with 1 if one differs. Cases that need a factorization by LAPACK are printed, and compared
with nothing: their bytes are promised on one machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from blake3 import blake3

from digests.cases import Case, World, cases, run_case
from digests.digesting import digests_of

EXPECTED = Path(__file__).parent / "expected.json"


def chosen(only: Iterable[str], *, brief: bool) -> list[Case]:
    """Return the cases whose name has one of some texts, or those of the tests."""
    texts = tuple(only)
    found = [c for c in cases() if not texts or any(text in c.name for text in texts)]
    return [c for c in found if c.in_brief or not brief]


def run(wanted: Iterable[Case], folder: Path, *, timed: bool = False) -> dict[str, str]:
    """Run cases and print as they end; return the digest of each file by ``case: path``."""
    world, found = World(folder), dict[str, str]()
    for case in wanted:
        began = time.perf_counter()
        if case.needs and find_spec(case.needs) is None:
            print(f"{case.name}: left out, {case.needs} is not installed", file=sys.stderr)
            continue
        out = run_case(case, world)
        made = {f"{case.name}: {n}": digest for n, digest in digests_of(out, folder)}
        print(*(f"{digest}  {file}" for file, digest in made.items()), sep="\n", flush=True)
        found |= made
        if timed:
            print(f"{time.perf_counter() - began:7.2f} s  {case.name}", file=sys.stderr, flush=True)
    return found


def expected() -> dict[str, str]:
    """Return the digests that are expected."""
    found: dict[str, str] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


def differing(found: Mapping[str, str], wanted: Iterable[Case]) -> list[str]:
    """Return the files of cases that differ from what is expected, or are there only once."""
    names = tuple(f"{case.name}: " for case in wanted if not case.by_lapack)
    table = {name: digest for name, digest in expected().items() if name.startswith(names)}
    mine = {name: digest for name, digest in found.items() if name.startswith(names)}
    return sorted(n for n in table.keys() | mine.keys() if table.get(n) != mine.get(n))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    only = "cases whose name has the text; may be given several times"
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help=only)
    parser.add_argument("--brief", action="store_true", help="the cases that the tests run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every digest there")
    parser.add_argument("--times", action="store_true", help="say how long each case takes")
    parser.add_argument("--write", action="store_true", help="expect these digests from now on")
    return parser


def main() -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args()
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "REGRAFT_CACHE": ""}  # receipts say what was known
    wanted, began = chosen(options.only, brief=options.brief), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        found = run(wanted, Path(name).resolve(), timed=options.times)
    lapack = tuple(f"{case.name}: " for case in wanted if case.by_lapack)
    same = {name: digest for name, digest in found.items() if not name.startswith(lapack or "\0")}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.write:
        EXPECTED.write_text(json.dumps(same, indent=0) + "\n", encoding="utf-8")
    wrong = differing(found, wanted)
    for file in wrong:
        print(f"differs: {file}", file=sys.stderr)
    total = blake3(json.dumps(same, sort_keys=True).encode()).hexdigest(length=16)
    seconds = time.perf_counter() - began
    print(f"{total}  {len(same)} files in {seconds:.0f} s, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
