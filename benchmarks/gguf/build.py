"""Build the programs of llama.cpp that are measured: ``python -m benchmarks.gguf.build FOLDER``.

The source comes from PyPI, with the package llama-cpp-python. FOLDER gets ``llama-quantize``,
``llama-export-lora``, and ``logits``, a program of ours that writes what a model predicts. It needs
cmake, ninja and a C++ compiler, and takes some ten minutes. There is nothing for a GPU in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.shared.running import say

HERE = Path(__file__).resolve().parent
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"

_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
)  # fmt: skip
_INCLUDED = ("include", "ggml/include", "common", "vendor", "src", "ggml/src")
_LIBRARIES = (
    "src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a",
)  # fmt: skip


def build(folder: Path) -> None:
    """Build everything that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(folder)
    made = folder / "build"
    if not (made / _LIBRARIES[0]).exists():
        say("llama.cpp")
        _run("cmake", "-G", "Ninja", "-S", source, "-B", made, *_OPTIONS)
        _run("ninja", "-C", made, "-j", str(os.cpu_count()), "llama")
    tools = source / "tools"
    line = HERE / "command_line.cpp"
    quantize = (tools / "quantize").glob("*.cpp")
    _compile(folder / "llama-quantize", source, made, [*quantize, line])
    _compile(
        folder / "llama-export-lora", source, made, [tools / "export-lora/export-lora.cpp", line]
    )
    _compile(folder / "logits", source, made, [HERE / "logits.cpp"])


def _source(folder: Path) -> Path:
    """Return the folder of llama.cpp's source, fetched where it is not there."""
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}"
    found = folder / name / "vendor" / "llama.cpp"
    if not found.exists():
        say(f"fetching {PACKAGE} {VERSION}")
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:",
             "-d", folder, f"{PACKAGE}=={VERSION}")  # fmt: skip
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return found


def _compile(program: Path, source: Path, made: Path, files: list[Path]) -> None:
    if program.exists():
        return
    say(program.name)
    included = [f"-I{source / each}" for each in _INCLUDED]
    libraries = [made / each for each in _LIBRARIES]
    _run("c++", "-std=c++17", "-O3", "-march=native", "-w", *included, *files, *libraries,
         "-lgomp", "-lpthread", "-ldl", "-o", program)  # fmt: skip


def _run(*command: str | Path) -> None:
    subprocess.run([str(each) for each in command], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
