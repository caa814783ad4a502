"""The way to beat: combine adapters of a model with PEFT.

    python benchmarks/combine/peft_svd.py HIDDEN INNER RANK SECONDS ADAPTER...

A model of the given widths and one layer is made on the fly; what it took goes to the file SECONDS.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM


def main(hidden: int, inner: int, rank: int, seconds: Path, adapters: list[str]) -> None:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=32,
        vocab_size=8,
    )  # fmt: skip
    torch.set_num_threads(2)
    model = LlamaForCausalLM(config)
    names = [str(number) for number in range(len(adapters))]
    live = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        live.load_adapter(adapter, name)
    started = time.perf_counter()
    live.add_weighted_adapter(
        names, [1.0] * len(names), "both", combination_type="svd", svd_rank=rank,
        svd_full_matrices=False,
    )  # fmt: skip
    seconds.write_text(f"{time.perf_counter() - started}")


if __name__ == "__main__":
    width, inside, wanted = map(int, sys.argv[1:4])
    main(width, inside, wanted, Path(sys.argv[4]), sys.argv[5:])
