"""Run by vLLM's own Python: ``python in_vllm.py JOBS.json ANSWERS.json``.

All jobs share a process, because vLLM takes a minute to be imported; jobs of one base and the same
options share an engine. Nothing is compiled: that would take longer than all else.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPACE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
         "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
         "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip

ABSENT = Path(__file__).parent / "absent"
"""Where what stands in for torchvision is."""

Job = Mapping[str, Any]
Answer = Mapping[str, Any]


NATIVE = {"custom_ops": ["none"]}
"""Torch's operations in place of its own: in float32 on CPUs, its kernel for DeepSeek's rotary
embedding gives other values, so that the base alone answers otherwise than in transformers."""


def engine(job: Job) -> Any:
    """Return vLLM with a base, and with the options of its server."""
    from vllm import LLM, envs

    chosen = dict(job["options"])
    for name in [name for name in chosen if name.startswith("VLLM_")]:
        os.environ[name] = chosen.pop(name)
    envs.disable_envs_cache()
    return LLM(
        job["base"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
        enable_lora="adapter" in job, max_model_len=128, max_num_seqs=2, max_logprobs=job["vocab"],
        enable_prefix_caching=False, compilation_config=NATIVE, language_model_only=True,
        **_as_values(chosen),
    )  # fmt: skip


def _as_values(options: Mapping[str, str]) -> dict[str, Any]:
    """Return a server's options as Python takes them."""
    lists = {"lora_target_modules"}
    return {
        name: value.split(",") if name in lists
        else int(value) if value.isdecimal()
        else value == "true" if value in ("true", "false")
        else value
        for name, value in options.items()
    }  # fmt: skip


def answer(llm: Any, job: Job, number: int) -> Answer:
    """Return what a model answers, by token; or what vLLM said when it refused the adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest(f"a{number}", number, job["adapter"]) if "adapter" in job else None
    try:
        if request is not None:  # as its server does when an adapter is named to it
            llm.llm_engine.add_lora(request)
    except Exception as error:  # whatever stops a server from loading it
        return refusal(error)
    wanted = SamplingParams(max_tokens=1, temperature=0, logprobs=job["vocab"], detokenize=False)
    told = llm.generate([{"prompt_token_ids": job["tokens"]}], wanted, lora_request=request)
    first = told[0].outputs[0].logprobs[0]
    return {"logprobs": {str(token): each.logprob for token, each in first.items()}}


def refusal(error: Exception) -> Answer:
    """Return what vLLM said."""
    return {"refused": f"{type(error).__name__}: {error}"[:300]}


def in_one_engine(jobs: Sequence[Job]) -> list[Answer]:
    """Answer jobs of one base and the same options."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm, before = None, dict(os.environ)
    try:
        llm = engine(jobs[0])
    except Exception as error:  # whatever stops a server from starting
        return [refusal(error)] * len(jobs)
    else:
        return [answer(llm, job, number) for number, job in enumerate(jobs, 1)]
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    """Answer all jobs."""
    os.environ.update(SPACE | {"PYTHONPATH": str(ABSENT)})
    sys.path.insert(0, str(ABSENT))
    jobs = json.loads(Path(sys.argv[1]).read_text())
    groups: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        key = json.dumps([job["base"], job["options"], "adapter" in job])
        groups.setdefault(key, []).append(number)
    found: dict[int, Answer] = {}
    for numbers in groups.values():
        told = in_one_engine([jobs[number] for number in numbers])
        found |= dict(zip(numbers, told, strict=True))
    Path(sys.argv[2]).write_text(json.dumps([found[number] for number in range(len(jobs))]))


if __name__ == "__main__":
    main()
