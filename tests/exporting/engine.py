"""llama.cpp itself, in a process of its own: tokens of texts, and log-probabilities after prompts.

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

import pytest

VARIABLE = "REGRAFT_LLAMA_CPP_PYTHON"

_PROGRAM = """
import json, os, sys, urllib.request
import xllamacpp as engine

asked = json.load(open(sys.argv[2]))
parameters = engine.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
parameters.verbosity, parameters.cpuparams.n_threads = -1, 1
parameters.cache_type_k = parameters.cache_type_v = engine.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = engine.Server(parameters)

def post(path, body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())

# Token 1 is made the next one, which changes no log-probability: a token of half a character or
# one that ends the text would be answered without any.
def logs(ids):
    answer = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": asked["vocab"],
                                  "temperature": -1, "cache_prompt": False,
                                  "logit_bias": [[1, 1000.0]]})
    return {each["id"]: each["logprob"]
            for each in answer["completion_probabilities"][0]["top_logprobs"]}

found = {
    "tokens": [post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
               ["tokens"] for text in asked["texts"]],
    "logs": [logs(ids) for ids in asked["prompts"]],
}
json.dump(found, open(sys.argv[3], "w"))
os._exit(0)
"""


def _python() -> str:
    given = os.environ.get(VARIABLE)
    if given:
        return given
    if find_spec("xllamacpp") is None:
        pytest.skip(f"needs llama.cpp: pip install xllamacpp here, or {VARIABLE} names a Python")
    return sys.executable


def ask(
    model: Path, folder: Path, *, texts: Sequence[str] = (), prompts: Sequence[list[int]] = (),
    vocab: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Return what llama.cpp says of a GGUF file.

    Args:
        model: the file.
        folder: for questions and answers.
        texts: each one's tokens are returned, with special tokens told and added.
        prompts: token ids, after which the log-probability of each token is returned, by its id.
        vocab: number of tokens.
    """
    python = _python()
    question, answer = folder / "question.json", folder / "answer.json"
    question.write_text(json.dumps({"texts": texts, "prompts": prompts, "vocab": vocab}))
    run = subprocess.run(
        [python, "-c", _PROGRAM, str(model), str(question), str(answer)],
        capture_output=True, text=True, timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(answer.read_text())
    return found
