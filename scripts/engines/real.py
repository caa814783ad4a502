"""``python -m engines.real``: shows llama.cpp and mlx-lm a real model with a trained adapter.

SmolLM2-135M-Instruct and an adapter of PEFT's, in every form in which an engine takes them; the
engine's log-probabilities are held against PEFT's live model. ``--write`` puts the table into
docs/engines.md. Environments are those of ``python -m engines``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import regraft
from engines.real_files import RealFiles, make_real
from engines.running import RUNNERS, Job, converters, python_of, run
from regraft.translating import convert_adapter

PAGE = Path("docs/engines.md")
BEGIN, END = "<!-- real: begin -->", "<!-- real: end -->"
TOP = 200
"""Tokens that are compared: the likeliest ones of the engine."""
SEEN = 1e-3
"""Of tokens that PEFT's model gives at least this probability the largest difference is told."""

Make = Callable[[RealFiles, Path, Path], Job]


@dataclass(frozen=True)
class Form:
    """A form in which the model is served.

    Attributes:
        name: what the table calls it.
        makes: what makes the job of it, by engine.
        as_base: whether it is to answer as the base.
    """

    name: str
    makes: Mapping[str, Make]
    as_base: bool = False


# -- what is served --------------------------------------------------------------------------------


def _gguf_base(files: RealFiles, folder: Path) -> Path:
    out = folder / "base-f16.gguf"
    if not out.exists():
        regraft.export(files.base, out, type="f16")
    return out


def _mlx_base(files: RealFiles, folder: Path) -> Path:
    """Return the base with the config that mlx-lm reads, in float32: bfloat16 is slow on a CPU."""
    out = folder / "base-mlx"
    if not out.exists():
        regraft.convert(files.base, folder / "base-f32", dtype="float32", overwrite=True)
        regraft.export(folder / "base-f32", out, engine="mlx")
    return out


def _merged(files: RealFiles, folder: Path) -> Path:
    out = folder / "merged"
    if not out.exists():
        regraft.merge(files.base, files.adapter, out, dtype="float32")
    return out


def _uniform(files: RealFiles, folder: Path) -> Path:
    out = folder / "uniform"
    if not out.exists():
        convert_adapter(files.adapter, out, to="peft", uniform=True)
    return out


def _by_its_converter(adapter: Path, files: RealFiles, folder: Path, root: Path) -> Job:
    """Return the job of an adapter that llama.cpp's own converter wrote."""
    made = folder / f"{adapter.name}.gguf"
    script = converters(root) / "convert_lora_to_gguf.py"
    command = [sys.executable, str(script), "--base", str(files.base), "--outfile", str(made),
               str(adapter)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refused": "its converter: " + (done.stderr.strip() or "?").splitlines()[-1][:300]}
    return {"base": str(_gguf_base(files, folder)), "adapter": str(made)}


def _converted_for_llama_cpp(files: RealFiles, folder: Path, root: Path) -> Job:
    del root
    convert_adapter(files.adapter, folder / "gguf", to="gguf", base=files.base, overwrite=True)
    made = folder / "gguf" / "adapter.gguf"
    return {"base": str(_gguf_base(files, folder)), "adapter": str(made)}


def _converted_for_mlx(files: RealFiles, folder: Path, root: Path) -> Job:
    del root
    convert_adapter(files.adapter, folder / "mlx", to="mlx", base=files.base, overwrite=True)
    return {"base": str(_mlx_base(files, folder)), "adapter": str(folder / "mlx")}


def _exported(type: str) -> Make:
    def make(files: RealFiles, folder: Path, root: Path) -> Job:
        del root
        out = folder / f"merged-{type}.gguf"
        regraft.export(_merged(files, folder), out, type=type, overwrite=True)
        return {"base": str(out)}

    return make


def _exported_for_mlx(files: RealFiles, folder: Path, root: Path) -> Job:
    del root
    out = folder / "merged-mlx"
    regraft.export(_merged(files, folder), out, engine="mlx", overwrite=True)
    return {"base": str(out)}


def _merged_gguf(files: RealFiles, folder: Path, root: Path) -> Job:
    del root
    out = folder / "merged-itself.gguf"
    regraft.merge(files.gguf, files.adapter, out, overwrite=True)
    return {"base": str(out)}


FORMS: tuple[Form, ...] = (
    Form("the base, held against the base", {
        "llama.cpp": lambda files, folder, _: {"base": str(_gguf_base(files, folder))},
        "mlx": lambda files, folder, _: {"base": str(_mlx_base(files, folder))},
    }, as_base=True),
    Form("the base, held against the adapter", {
        "llama.cpp": lambda files, folder, _: {"base": str(_gguf_base(files, folder))},
        "mlx": lambda files, folder, _: {"base": str(_mlx_base(files, folder))},
    }),
    Form("as PEFT saves it", {
        "llama.cpp": lambda files, folder, root: _by_its_converter(
            files.adapter, files, folder, root),
        "mlx": lambda files, folder, _: {"base": str(_mlx_base(files, folder)),
                                         "adapter": str(files.adapter)},
    }),
    Form("uniform", {
        "llama.cpp": lambda files, folder, root: _by_its_converter(
            _uniform(files, folder), files, folder, root),
    }),
    Form("converted: `--to gguf`, `--to mlx`", {
        "llama.cpp": _converted_for_llama_cpp, "mlx": _converted_for_mlx,
    }),
    Form("merged and exported: f16; for mlx", {
        "llama.cpp": _exported("f16"), "mlx": _exported_for_mlx,
    }),
    Form("merged and exported: q8_0", {"llama.cpp": _exported("q8_0")}),
    Form("merged into the quantized GGUF (Q4_1)", {"llama.cpp": _merged_gguf}),
)  # fmt: skip
"""Every form; PEFT's own save is taken as its users do, through llama.cpp's converter."""


# -- what is answered ------------------------------------------------------------------------------


def cell(answer: Mapping[str, Any], true: Sequence[Any]) -> str:
    """Return what a table says of an engine's answers, held against those of a live model."""
    if "refused" in answer:
        return "refused"
    far, off, same = [], 0.0, 0
    for each, logs in zip(answer["each"], true, strict=True):
        told = {int(token): value for token, value in each["logprobs"].items()}
        tokens = np.array(list(told))
        ours, theirs = logs[tokens].astype(np.float64), np.array(list(told.values()))
        least = float((np.exp(ours) * (ours - theirs)).sum())
        rest = np.delete(logs, tokens).astype(np.float64)  # the engine gives them less than these
        far.append(least + float((np.exp(rest) * np.maximum(rest - theirs.min(), 0.0)).sum()))
        seen = ours >= np.log(SEEN)
        off = max(off, float(np.abs(ours - theirs)[seen].max(initial=0.0)))
        same += int(logs.argmax() == max(told, key=told.__getitem__))
    return f"{max(np.mean(far), 0.0):.1g}; {same} of {len(true)}; {off:.1g}"


def show(files: RealFiles, given: Mapping[str, str], root: Path) -> dict[str, dict[str, str]]:
    """Return a cell for each form and engine."""
    folder = root / "smollm2" / "served"
    folder.mkdir(exist_ok=True)
    found: dict[str, dict[str, str]] = {form.name: {} for form in FORMS}
    for runner in RUNNERS:
        for form in FORMS:
            if runner.name not in form.makes:
                continue
            python = python_of(runner.name, runner.packages, root, given, removed=runner.removed)
            job = form.makes[runner.name](files, folder, root)
            if "refused" not in job:
                job |= {"prompts": files.prompts, "top": TOP}
            told = run(runner, python, [job], root / "smollm2")[0]
            true = files.untrained if form.as_base else files.trained
            found[form.name][runner.name] = cell(told, true)
            print(f"{runner.name:10} {form.name:40} {found[form.name][runner.name]}", flush=True)
    return found


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table of the page."""
    names = ("llama.cpp", "mlx")
    lines = ["| served | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {form} | " + " | ".join(cells.get(name, "") for name in names) + " |"
        for form, cells in found.items()
    ]
    return "\n".join([BEGIN, *lines, END])


def main() -> int:
    """Run, print, and maybe write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=".engines", help="where environments are made")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE}")
    chosen = parser.parse_args()
    root = Path(chosen.root).resolve()
    root.mkdir(exist_ok=True)
    given = dict(each.split("=", 1) for each in chosen.python)
    found = show(make_real(root), given, root)
    if chosen.write:
        text = PAGE.read_text("utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text(before + table(found) + after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
