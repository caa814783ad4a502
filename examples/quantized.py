"""Quantize a base to NF4, merge a QLoRA adapter into its codes, and into a plain 16-bit model.

python examples/quantized.py BASE ADAPTER FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import regraft


def main(base: str, adapter: str, folder: str) -> None:
    """Make three models in FOLDER, and say what survives of the adapter in each merge."""
    in_codes = Path(folder, "nf4")
    regraft.quantize(base, in_codes, "nf4")
    stays = regraft.merge(in_codes, adapter, Path(folder, "merged-nf4"), quantize="keep")
    plain = regraft.merge(in_codes, adapter, Path(folder, "merged-16bit"))
    for name, receipt in (("in 4 bits", stays), ("in 16 bits", plain)):
        totals = receipt.totals
        print(f"{name}: {totals.merged} tensors merged, {totals.bytes_written / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
