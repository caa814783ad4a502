"""The servers of llama.cpp and mlx-lm, each in a process of its own, while a test needs it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine_python import LLAMA_CPP, MLX, environment, python_of

WAIT = 180
"""Seconds that a server may take to start."""

# It ends when its standard input does, and so with these tests.
_LLAMA_CPP = """
import os, sys
import xllamacpp as engine

parameters = engine.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.port = 256, 1, False, 0
parameters.verbosity, parameters.cpuparams.n_threads = -1, 1
parameters.lora_adapters = [engine.CommonAdapterLoraInfo(path, float(scale)) for path, scale
                            in (each.rsplit("=", 1) for each in sys.argv[2:])]
server = engine.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def llama_cpp(model: Path, adapters: Mapping[Path, float]) -> Iterator[str]:
    """Run llama.cpp's server with adapters, each at a scale; give its address."""
    served = [f"{path}={scale}" for path, scale in adapters.items()]
    command = [python_of(LLAMA_CPP), "-c", _LLAMA_CPP, str(model), *served]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("")


@contextmanager
def mlx(model: Path, home: Path, *options: str) -> Iterator[str]:
    """Run mlx_lm.server, with a folder for the Hub's files; give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [python_of(MLX), "-m", "mlx_lm", "server", "--model", str(model), "--port", port]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment() | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    ) as process:  # fmt: skip
        try:
            _wait(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait(url: str, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + WAIT
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=WAIT):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def post(url: str, body: Mapping[str, Any]) -> Any:
    """Return the answer to a request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=WAIT) as response:
        return json.loads(response.read())
