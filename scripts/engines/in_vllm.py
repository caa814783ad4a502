"""Runs in vLLM's environment: ``python in_vllm.py JOBS.json ANSWERS.json``; jobs of one base."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SPACE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
         "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
         "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip


def engine(job: dict[str, Any], with_adapters: bool) -> Any:
    """Return vLLM with a base, and with the options of its server."""
    from vllm import LLM

    options: dict[str, Any] = dict(job["options"])
    if "max_lora_rank" in options:
        options["max_lora_rank"] = int(options["max_lora_rank"])
    if chosen := options.pop("lora_target_modules", None):
        options["lora_target_modules"] = chosen.split(",")
    return LLM(
        job["base"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
        enable_lora=with_adapters, max_model_len=128, max_num_seqs=2, max_logprobs=job["vocab"],
        enable_prefix_caching=False, **options,
    )  # fmt: skip


def answer(llm: Any, job: dict[str, Any], number: int) -> dict[str, Any]:
    """Return what a model answers, by token; or what vLLM said when it refused."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    wanted = SamplingParams(max_tokens=1, temperature=0, logprobs=job["vocab"], detokenize=False)
    adapter = job.get("adapter")
    request = LoRARequest(f"a{number}", number, adapter) if adapter else None
    try:
        told = llm.generate([{"prompt_token_ids": job["tokens"]}], wanted, lora_request=request)
    except (ValueError, RuntimeError, AssertionError) as error:
        return {"refused": f"{type(error).__name__}: {error}"[:300]}
    first = told[0].outputs[0].logprobs[0]
    return {"logprobs": {str(token): each.logprob for token, each in first.items()}}


def main() -> None:
    """Answer all jobs."""
    os.environ.update(SPACE)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    try:
        llm = engine(jobs[0], "adapter" in jobs[0])
    except ValueError as error:
        found = [{"refused": f"{type(error).__name__}: {error}"[:300]}] * len(jobs)
    else:
        found = [answer(llm, job, number) for number, job in enumerate(jobs, 1)]
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
