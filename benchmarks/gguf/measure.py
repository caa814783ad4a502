"""What llama.cpp predicts with a model, on the demo's task and on plain English."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.gguf.models import tool
from benchmarks.gguf.names import THREADS
from benchmarks.qlora.measure import Predictions, Seen, Texts


def seen(tools: Path, model: Path, asked: Texts, work: Path) -> Seen:
    """Return what llama.cpp predicts with a model."""
    rows = [*asked.task, *asked.prose]
    tokens, out = work / "tokens.bin", work / "logits.bin"
    numbers = [number for ids, begin in rows for number in (len(ids), begin, *ids)]
    np.array(numbers, np.int32).tofile(tokens)
    tool(tools, "logits", model, tokens, out, THREADS)
    wanted = torch.tensor([token for ids, begin in rows for token in ids[begin:]])
    logits = torch.from_numpy(np.fromfile(out, np.float32).reshape(len(wanted), -1))
    out.unlink()
    end = sum(len(ids) - begin for ids, begin in asked.task)
    return Seen(Predictions(logits[:end], wanted[:end]), Predictions(logits[end:], wanted[end:]))
