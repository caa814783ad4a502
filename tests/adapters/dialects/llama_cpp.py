"""What llama.cpp answers with an adapter, and without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asking_llama_cpp import ask


def answers(
    folder: Path, model: Path, prompts: Sequence[Sequence[int]], vocab: int,
    lora: Path | None = None,
) -> np.ndarray:  # fmt: skip
    """Return log-probabilities of every token after each prompt: (prompts, vocabulary)."""
    told = ask(model, folder, prompts=prompts, vocab=vocab, lora=lora, next_token=3)
    return np.array([[logs[key] for key in sorted(logs, key=int)] for logs in told["logs"]])
