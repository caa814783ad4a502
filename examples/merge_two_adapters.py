"""Merge two adapters, each with a weight, in one pass, after checking that they fit.

python examples/merge_two_adapters.py BASE FIRST SECOND OUT
"""

from __future__ import annotations

import sys

import regraft


def main(base: str, first: str, second: str, out: str) -> None:
    """Add 0.7 of the first adapter and 0.3 of the second; list what each tensor got."""
    adapters: list[tuple[str, float]] = [(first, 0.7), (second, 0.3)]
    report = regraft.check(base, adapters)
    if not report.ok:
        sys.exit("\n".join(map(str, report.problems)))
    receipt = regraft.merge(base, adapters, out)
    for record in receipt.tensors:
        if record.action == "merge":
            scales = zip(record.adapters, record.scales, strict=True)
            parts = [f"{scale:.3g} x {receipt.adapters[at].source}" for at, scale in scales]
            print(record.name, " + ".join(parts))
    if receipt.quiet:
        print("the adapters changed (nearly) nothing", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
