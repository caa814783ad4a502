"""Runs in mlx-lm's environment: ``python in_mlx.py JOBS.json ANSWERS.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a model answers, by token; or what mlx-lm said when it refused."""
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    mx.set_default_device(mx.cpu)
    try:
        model, _ = load_model(Path(job["base"]))
        if job.get("adapter"):
            model = load_adapters(model, job["adapter"])
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        return {"refused": f"{type(error).__name__}: {error}"[:300]}
    model.eval()
    if "prompts" in job:
        return {"each": [_next(model, ids, job["top"]) for ids in job["prompts"]]}
    return _next(model, job["tokens"], job["vocab"])


def _next(model: Any, ids: list[int], top: int) -> dict[str, Any]:
    """Return the log-probabilities of the likeliest next tokens."""
    import mlx.core as mx

    logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
    logprobs = (logits - mx.logsumexp(logits)).tolist()
    likeliest = sorted(range(len(logprobs)), key=logprobs.__getitem__, reverse=True)[:top]
    return {"logprobs": {str(token): logprobs[token] for token in likeliest}}


def main() -> None:
    """Answer all jobs."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))


if __name__ == "__main__":
    main()
