"""Answer one batch in which each row has an adapter of its own, or none.

python examples/serve_rows.py BASE FIRST SECOND
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import regraft


def main(base: str, first: str, second: str) -> list[str]:
    """Ask the base, each adapter, and a mix of both the same question; return the answers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    adapters = regraft.attach(model, first, "first")
    adapters.load_adapter(second, "second")

    rows = [None, "first", "second", {"first": 0.5, "second": 0.5}]
    batch = tokenizer(["List all users"] * len(rows), return_tensors="pt", padding=True)
    with adapters.rows(rows):
        answers = model.generate(**batch, max_new_tokens=16, do_sample=False)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    for row, text in zip(rows, texts, strict=True):
        print(f"{row}: {text!r}")
    return list(texts)


if __name__ == "__main__":
    if len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
