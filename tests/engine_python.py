"""Which Python has an engine: this one, or the one that an environment variable names.

Engines may need packages that do not go with those of the tests, so what is asked of one runs in a
process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Engine:
    """An engine: what it is called, the module that it is, how to get it, and the variable."""

    shown: str
    module: str
    packages: str
    variable: str


LLAMA_CPP = Engine("llama.cpp", "xllamacpp", "xllamacpp", "REGRAFT_LLAMA_CPP_PYTHON")
MLX = Engine("mlx-lm", "mlx_lm", "'mlx[cpu]' mlx-lm", "REGRAFT_MLX_PYTHON")


def python_of(engine: Engine) -> str:
    """Return the Python that has an engine; the test is skipped where there is none."""
    given = os.environ.get(engine.variable)
    if given:
        return given
    if find_spec(engine.module) is None:
        pytest.skip(
            f"needs {engine.shown}: pip install {engine.packages} here, or {engine.variable} "
            "names a Python that has it"
        )
    return sys.executable


def environment() -> dict[str, str]:
    """Return the environment of an engine's process, whose Python has packages of its own."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def asked(engine: Engine, program: str, question: Any, folder: Path) -> Any:
    """Return what a program answers in an engine's Python.

    Args:
        engine: whose Python runs it.
        program: is given the paths of two JSON files: the question, and the answer that it writes.
        question: plain values.
        folder: where the files are put.
    """
    python = python_of(engine)
    there, told = folder / "question.json", folder / "answer.json"
    there.write_text(json.dumps(question))
    told.unlink(missing_ok=True)
    run = subprocess.run(
        [python, "-c", program, str(there), str(told)],
        capture_output=True, text=True, timeout=120, check=False, env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(told.read_text())
