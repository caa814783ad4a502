"""Serve more adapters than fit into memory: each is read when it is asked for.

python examples/many_adapters.py BASE FOLDER-OF-ADAPTERS [MEMORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import regraft


def main(base: str, folder: str, memory: str = "2GiB") -> regraft.CacheStats:
    """Ask every adapter in FOLDER twice, with MEMORY for all; return the cache's figures."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    cache = regraft.AdapterCache(memory)
    adapters = regraft.attach(model, cache=cache)
    for path in sorted(Path(folder).iterdir()):
        adapters.load_adapter(path, path.name)  # checks the header; reads nothing yet

    question = tokenizer("List all users", return_tensors="pt")
    for name in adapters.names * 2:
        with adapters.using(name):
            answer = model.generate(**question, max_new_tokens=8, do_sample=False)[0]
        print(f"{name}: {tokenizer.decode(answer, skip_special_tokens=True)!r}")
    stats = cache.stats()
    print(f"{stats.hits} answers found their adapter in memory, {stats.misses} did not")
    return stats


if __name__ == "__main__":
    if len(sys.argv) <= 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
