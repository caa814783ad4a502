"""llama.cpp itself, in a process of its own: log-probabilities with and without an adapter.

It comes with the package ``xllamacpp``, here or in the environment whose Python the variable
``REGRAFT_LLAMA_CPP_PYTHON`` names; without either its tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VARIABLE = "REGRAFT_LLAMA_CPP_PYTHON"

_PROGRAM = """
import json, os, sys, urllib.request
import xllamacpp as engine

asked = json.load(open(sys.argv[1]))
parameters = engine.CommonParams()
parameters.model.path = asked["model"]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 128, 1, False
parameters.verbosity, parameters.cpuparams.n_threads = 3, 1
parameters.cache_type_k = parameters.cache_type_v = engine.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if asked["lora"]:
    parameters.lora_adapters = [engine.CommonAdapterLoraInfo(asked["lora"], 1.0)]
server = engine.Server(parameters)

def post(path, body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())

def logs(ids):
    answer = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": asked["vocab"],
                                  "temperature": -1, "cache_prompt": False,
                                  "logit_bias": [[3, 1000.0]]})
    found = answer["completion_probabilities"][0]["top_logprobs"]
    return [each["logprob"] for each in sorted(found, key=lambda each: each["id"])]

json.dump([logs(ids) for ids in asked["prompts"]], open(sys.argv[2], "w"))
os._exit(0)
"""


def python() -> str:
    """Return the Python that has llama.cpp; the test is skipped where there is none."""
    given = os.environ.get(VARIABLE)
    if given:
        return given
    if find_spec("xllamacpp") is None:
        pytest.skip(f"needs llama.cpp: pip install xllamacpp here, or {VARIABLE} names a Python")
    return sys.executable


def answers(
    folder: Path, model: Path, prompts: Sequence[Sequence[int]], vocab: int,
    lora: Path | None = None,
) -> np.ndarray:  # fmt: skip
    """Return log-probabilities of every token after each prompt: (prompts, vocabulary)."""
    question, answer = folder / "question.json", folder / "answer.json"
    asked: dict[str, Any] = {"model": str(model), "prompts": prompts, "vocab": vocab}
    question.write_text(json.dumps(asked | {"lora": str(lora) if lora else ""}))
    run = subprocess.run(
        [python(), "-c", _PROGRAM, str(question), str(answer)],
        capture_output=True, text=True, timeout=120, check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return np.array(json.loads(answer.read_text()))
