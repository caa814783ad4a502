"""Runs in llama.cpp's environment: ``python in_llama_cpp.py JOBS.json ANSWERS.json``.

Each job has a base and maybe an adapter, both in GGUF; its answer is the log-probability of each
next token, or what llama.cpp said when it refused. With ``prompts`` there is one after each, of the
``top`` likeliest tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a model answers, by token."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["base"]
    params.n_ctx, params.warmup, params.port = 128, False, 0
    params.cpuparams.n_threads = 1
    if job.get("adapter"):
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = job["adapter"], 1.0
        params.lora_adapters = [info]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        return {"refused": str(error) or "the model was not loaded"}
    if "prompts" in job:
        return {"each": [_next(server, ids, job["top"]) for ids in job["prompts"]]}
    return _next(server, job["tokens"], job["vocab"])


def _next(server: Any, ids: list[int], top: int) -> dict[str, Any]:
    """Return the log-probabilities of the likeliest next tokens."""
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": top,
             "n_probs": top, "cache_prompt": False, "ignore_eos": True}  # fmt: skip
    told = server.handle_completions(asked)
    told = json.loads(told) if isinstance(told, str | bytes) else told
    if "choices" not in told:
        return {"refused": json.dumps(told)}
    first = told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {"logprobs": {str(each["id"]): each["logprob"] for each in first}}


def main() -> None:
    """Answer all jobs."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))


if __name__ == "__main__":
    main()
