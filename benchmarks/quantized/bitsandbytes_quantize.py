"""The way to beat: quantize the linear layers of a model to NF4 with bitsandbytes, on the CPU.

    python benchmarks/quantized/bitsandbytes_quantize.py BASE OUT CALLS.json [--double-quant]

Each file of the checkpoint is read, its weights quantized one by one, and written. CALLS.json gets
the seconds that were spent in ``quantize_4bit`` alone, and the elements it was given.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open
from safetensors.torch import save_file


class Quantizer:
    """Quantizes weights and adds up the time that bitsandbytes takes."""

    def __init__(self, *, double_quant: bool) -> None:
        self.double_quant, self.seconds, self.elements = double_quant, 0.0, 0

    def tensors(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what a weight is stored as."""
        started = time.perf_counter()
        codes, state = quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=self.double_quant
        )
        self.seconds += time.perf_counter() - started
        self.elements += weight.numel()
        parts = {f"{name}.{role}": part for role, part in state.as_dict(packed=True).items()}
        return {name: codes, **parts}


def convert(path: Path, out: Path, quantizer: Quantizer) -> None:
    """Write one file of a checkpoint with its linear layers quantized."""
    found: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            weight = file.get_tensor(name)
            linear = name.endswith("_proj.weight")
            found |= quantizer.tensors(name, weight) if linear else {name: weight}
    save_file(found, out / path.name, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("calls", type=Path)
    parser.add_argument("--double-quant", action="store_true")
    options = parser.parse_args()
    options.out.mkdir()
    quantizer = Quantizer(double_quant=options.double_quant)
    for path in sorted(options.base.glob("*.safetensors")):
        convert(path, options.out, quantizer)
    calls = {"seconds": quantizer.seconds, "elements": quantizer.elements}
    options.calls.write_text(json.dumps(calls))


if __name__ == "__main__":
    main()
