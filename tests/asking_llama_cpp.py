"""llama.cpp itself, in a process of its own: tokens, and log-probabilities after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_python import LLAMA_CPP, asked

_PROGRAM = """
import json, os, sys, urllib.request
import xllamacpp as engine

asked = json.load(open(sys.argv[1]))
parameters = engine.CommonParams()
parameters.model.path = asked["model"]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
parameters.verbosity, parameters.cpuparams.n_threads = 3 if asked["lora"] else -1, 1
parameters.cache_type_k = parameters.cache_type_v = engine.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if asked["lora"]:
    parameters.lora_adapters = [engine.CommonAdapterLoraInfo(asked["lora"], 1.0)]
server = engine.Server(parameters)

def post(path, body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())

# One token is made the next one, which changes no log-probability: a token of half a character or
# one that ends the text would be answered without any.
def logs(ids):
    answer = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": asked["vocab"],
                                  "temperature": -1, "cache_prompt": False,
                                  "logit_bias": [[asked["next"], 1000.0]]})
    return {each["id"]: each["logprob"]
            for each in answer["completion_probabilities"][0]["top_logprobs"]}

found = {
    "tokens": [post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
               ["tokens"] for text in asked["texts"]],
    "logs": [logs(ids) for ids in asked["prompts"]],
}
json.dump(found, open(sys.argv[2], "w"))
os._exit(0)
"""


def ask(
    model: Path, folder: Path, *, texts: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] = (), vocab: int = 0, lora: Path | None = None,
    next_token: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return what llama.cpp says of a GGUF file; the test is skipped where it is not installed.

    Args:
        model: the file.
        folder: for questions and answers.
        texts: each one's tokens are returned, with special tokens told and added.
        prompts: token ids, after which the log-probability of each token is returned, by its id.
        vocab: number of tokens.
        lora: an adapter that it answers with.
        next_token: a token of whole characters, which does not end a text.
    """
    question = {
        "model": str(model), "texts": texts, "prompts": prompts, "vocab": vocab,
        "lora": str(lora) if lora else "", "next": next_token,
    }  # fmt: skip
    found: dict[str, Any] = asked(LLAMA_CPP, _PROGRAM, question, folder)
    return found
