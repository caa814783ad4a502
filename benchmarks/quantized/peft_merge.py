"""The way to beat: merge an adapter into a 4-bit model with transformers, bitsandbytes and PEFT.

    python benchmarks/quantized/peft_merge.py BASE4BIT ADAPTER OUT

The model is dequantized first and the adapter put on it then, so that the result is the plain
bfloat16 model that ``regraft merge`` writes too. PEFT can also merge into bitsandbytes' own layers;
these stay in 4 bits, and every weight is rounded to codes once more.
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="cpu")
    model = model.dequantize(dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    # Otherwise it tries to undo the loading of 4 bits and ends with NotImplementedError (5.23).
    merged.save_pretrained(out, save_original_format=False)


if __name__ == "__main__":
    main(*sys.argv[1:4])
