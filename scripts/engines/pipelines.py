"""What diffusers is shown: adapters of parts of small pipelines, as each program writes them.

The pipelines and adapters are made in diffusers' environment, where PEFT's live model answers too;
what regraft makes of an adapter is made here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import regraft
from engines.fixtures import write_json
from engines.running import HERE, python_of
from engines.shown import Shown, cell, foretold_by
from regraft.adapters.dialects.images.mmdit_names import places
from regraft.adapters.dialects.images.sgm_names import sgm_name
from regraft.formats.safetensors import read_header
from regraft.translating import convert_adapter

NAME = "diffusers"
SCRIPT = "in_diffusers.py"
PACKAGES = ("torch==2.13.0", "diffusers==0.42.1", "peft==0.21.2", "transformers==5.23.0", "pillow")

SAME = 1e-4
"""Answers that differ by less, relative to the largest number of the true one, are the same."""

Tensors = dict[str, Any]
Change = Callable[[Tensors, Path], Tensors]


@dataclass(frozen=True)
class PipelineFixture:
    """An adapter of a part of a pipeline, and how it is given to diffusers.

    Attributes:
        name: what it shows.
        config: fields of PEFT's ``LoraConfig``.
        given: ``own``, as diffusers saves it; ``peft``, a folder of PEFT's; ``diffusers`` or
            ``kohya``, what regraft writes of that folder; ``uniform``, the same for kohya in the
            uniform form; ``merged``, the merged part.
        part: the part that it is for.
        pipeline: a key of ``PIPELINES`` in ``in_diffusers.py``.
        header: whether diffusers saves the config in the header.
        change: changes the tensors of a kohya file, as another program would have written them;
            it is given the part's folder, too.
    """

    name: str
    config: Mapping[str, Any]
    given: str = "own"
    part: str = "unet"
    pipeline: str = "sd"
    header: bool = True
    change: Change | None = None


def without_alphas(end: str) -> Change:
    """Return the change that takes the alphas of modules away whose names end so."""
    return lambda tensors, _: {
        name: tensor for name, tensor in tensors.items() if not name.endswith(f"{end}.alpha")
    }


def as_stability_names(tensors: Tensors, part: Path) -> Tensors:
    """Return tensors under the names of Stability's UNet, as kohya's scripts have them for SDXL."""
    config = json.loads((part / "config.json").read_text())
    modules = _modules_of(part)
    known = {name.replace(".", "_"): name for name in modules}
    found = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix("lora_unet_").partition(".")
        other = sgm_name(known[module], modules, config["layers_per_block"])
        found[f"lora_unet_{(other or module).replace('.', '_')}.{rest}"] = tensor
    return found


def with_stability_names(word: str) -> Change:
    """Return the change that gives Stability's names to modules that have a word in theirs."""
    return lambda tensors, part: (
        {name: tensor for name, tensor in tensors.items() if word not in name}
        | as_stability_names({n: t for n, t in tensors.items() if word in n}, part)
    )


def as_makers_names(tensors: Tensors, part: Path) -> Tensors:
    """Return tensors under the names of Flux's makers, where several modules are one."""
    found: Tensors = {}
    for name, place in places(_modules_of(part)).items():
        written = [f"lora_transformer_{module.replace('.', '_')}" for module in place.modules]
        if not all(f"{each}.alpha" in tensors for each in written):
            continue
        down, up = ([tensors[f"{each}.lora_{n}.weight"] for each in written]
                    for n in ("down", "up"))  # fmt: skip
        found |= {
            f"lora_unet_{name}.lora_down.weight": np.concatenate(down),
            f"lora_unet_{name}.lora_up.weight": _diagonal(up),
            f"lora_unet_{name}.alpha": tensors[f"{written[0]}.alpha"] * np.float32(len(written)),
        }
    return {name: np.asarray(tensor) for name, tensor in found.items()}


def _diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    rows, columns = np.sum([block.shape for block in blocks], axis=0)
    whole, row, column = np.zeros((rows, columns), blocks[0].dtype), 0, 0
    for block in blocks:
        height, width = block.shape
        whole[row : row + height, column : column + width] = block
        row, column = row + height, column + width
    return whole


def _modules_of(part: Path) -> list[str]:
    tensors = read_header(part / "diffusion_pytorch_model.safetensors").tensors
    return [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]


UNET = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv", "conv_in", "conv_shortcut", "time_emb_proj", "linear_1"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]
JOINT = ["to_q", "to_k", "to_v", "to_out.0"]


def lora(targets: Sequence[str] = tuple(UNET), **more: Any) -> dict[str, Any]:
    """Return the fields of a config."""
    return {"r": 4, "lora_alpha": 6, "target_modules": list(targets)} | more


IN_DOUBLE = [f"transformer_blocks.0.{n}" for n in (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "ff.net.2", "norm1.linear")]  # fmt: skip

OF_ATTENTION = lora(alpha_pattern={"to_q": 2})
OF_OTHERS = lora(alpha_pattern={"proj_in": 2, "ff.net.2": 9})
PATTERNS = lora(alpha_pattern={"to_q": 2, "proj_in": 9}, rank_pattern={"to_v": 6, "ff.net.2": 2})
IN_TEXT: dict[str, Any] = {"part": "text_encoder"}
FLUX: dict[str, Any] = {"part": "transformer", "pipeline": "flux"}
SD3: dict[str, Any] = {"part": "transformer", "pipeline": "sd3"}

FIXTURES: tuple[PipelineFixture, ...] = (
    PipelineFixture("a UNet's, as diffusers saves it", lora()),
    PipelineFixture("with convolutions", lora([*UNET, *CONVOLUTIONS])),
    PipelineFixture("rsLoRA", lora(use_rslora=True)),
    PipelineFixture("both patterns", PATTERNS),
    PipelineFixture("DoRA", lora(use_dora=True)),
    PipelineFixture("DoRA of convolutions", lora([*UNET, *CONVOLUTIONS], use_dora=True)),
    PipelineFixture("biases of B", lora(lora_bias=True)),
    PipelineFixture("no config in the header", lora(lora_alpha=4), header=False),
    PipelineFixture("no config, several ranks",
                    lora(lora_alpha=4, rank_pattern={"to_v": 6}, alpha_pattern={"to_v": 6}),
                    header=False),
    PipelineFixture("PEFT's folder", lora(), "peft"),
    PipelineFixture("PEFT's folder, converted", PATTERNS, "diffusers"),
    PipelineFixture("PEFT's folder, DoRA, converted", lora(use_dora=True), "diffusers"),
    PipelineFixture("PEFT's folder, biases of B, converted", lora(lora_bias=True), "diffusers"),
    PipelineFixture("PEFT's folder, merged", PATTERNS, "merged"),
    PipelineFixture("DoRA, merged", lora(use_dora=True), "merged"),
    PipelineFixture("kohya's, one alpha", lora(rank_pattern={"to_v": 6}), "kohya"),
    PipelineFixture("kohya's, with convolutions", lora([*UNET, *CONVOLUTIONS]), "kohya"),
    PipelineFixture("kohya's, rsLoRA", lora(use_rslora=True), "kohya"),
    PipelineFixture("kohya's, another alpha of attention", OF_ATTENTION, "kohya"),
    PipelineFixture("kohya's, other alphas of other layers", OF_OTHERS, "kohya"),
    PipelineFixture("kohya's, both patterns", PATTERNS, "kohya"),
    PipelineFixture("kohya's, both patterns, uniform", PATTERNS, "uniform"),
    PipelineFixture("kohya's, no alphas", lora(lora_alpha=4), "kohya", change=without_alphas("")),
    PipelineFixture("kohya's, no alpha of some", lora(alpha_pattern={"proj_in": 4}), "kohya",
                    change=without_alphas("proj_in")),
    PipelineFixture("kohya's, DoRA", lora(use_dora=True), "kohya"),
    PipelineFixture("kohya's, Stability's names, SDXL",
                    lora([*UNET, "conv1", "conv2", "conv", "time_emb_proj"]), "kohya",
                    pipeline="sdxl", change=as_stability_names),
    PipelineFixture("kohya's, Stability's names, no SDXL", lora(), "kohya",
                    change=as_stability_names),
    PipelineFixture("kohya's, Stability's names of some, SDXL", lora(), "kohya",
                    pipeline="sdxl", change=with_stability_names("mid_block")),
    PipelineFixture("a text encoder's", lora(TEXT), **IN_TEXT),
    PipelineFixture("a text encoder's, both patterns",
                    lora(TEXT, alpha_pattern={"q_proj": 2, "fc1": 9}, rank_pattern={"v_proj": 6}),
                    **IN_TEXT),
    PipelineFixture("a text encoder's, MLP alone", lora(["fc1", "fc2"]), **IN_TEXT),
    PipelineFixture("a text encoder's, DoRA", lora(TEXT, use_dora=True), **IN_TEXT),
    PipelineFixture("a text encoder's, biases of B", lora(TEXT, lora_bias=True), **IN_TEXT),
    PipelineFixture("a text encoder's, no config, several ranks",
                    lora(TEXT, lora_alpha=4, rank_pattern={"v_proj": 6},
                         alpha_pattern={"v_proj": 6}), header=False, **IN_TEXT),
    PipelineFixture("a text encoder's, PEFT's folder, converted",
                    lora(TEXT, alpha_pattern={"q_proj": 2}), "diffusers", **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, one alpha", lora(TEXT), "kohya", **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, another alpha of attention",
                    lora(TEXT, alpha_pattern={"q_proj": 2}), "kohya", **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, another alpha of the MLP",
                    lora(TEXT, alpha_pattern={"fc1": 2}), "kohya", **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, another alpha, uniform",
                    lora(TEXT, alpha_pattern={"fc1": 2}), "uniform", **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, q and v alone", lora(TEXT[:2]), "kohya",
                    **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, q, v and the MLP",
                    lora(["q_proj", "v_proj", "fc1"]), "kohya", **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, DoRA", lora(TEXT, use_dora=True), "kohya",
                    **IN_TEXT),
    PipelineFixture("a text encoder's, kohya's, MLP alone", lora(["fc1"]), "kohya", **IN_TEXT),
    PipelineFixture("Flux's", lora([*JOINT, "proj_mlp"], alpha_pattern={"to_q": 2}), **FLUX),
    PipelineFixture("Flux's, PEFT's folder", lora(JOINT), "peft", **FLUX),
    PipelineFixture("Flux's, PEFT's folder, converted", lora(JOINT, use_rslora=True), "diffusers",
                    **FLUX),
    PipelineFixture("Flux's, DoRA", lora(JOINT, use_dora=True), **FLUX),
    PipelineFixture("Flux's, kohya's, attention", lora(JOINT, alpha_pattern={"to_q": 2}), "kohya",
                    **FLUX),
    PipelineFixture("Flux's, kohya's, with the MLP", lora(["to_q", "proj_mlp"]), "kohya", **FLUX),
    PipelineFixture("Flux's, kohya's, makers' names", lora(IN_DOUBLE), "kohya",
                    change=as_makers_names, **FLUX),
    PipelineFixture("Flux's, kohya's, makers' names, outside blocks too",
                    lora([*IN_DOUBLE, "x_embedder", "context_embedder"]), "kohya",
                    change=as_makers_names, **FLUX),
    PipelineFixture("Flux's, kohya's, makers' names, single blocks of another size",
                    lora([*JOINT, "proj_mlp"]), "kohya", change=as_makers_names, **FLUX),
    PipelineFixture("Flux's, kohya's, DoRA", lora(JOINT, use_dora=True), "kohya", **FLUX),
    PipelineFixture("Stable Diffusion 3's", lora(JOINT, alpha_pattern={"to_q": 2}), **SD3),
    PipelineFixture("Stable Diffusion 3's, kohya's", lora(JOINT), "kohya", **SD3),
)  # fmt: skip


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    fixture: PipelineFixture
    base: Path
    served: Path
    true: np.ndarray
    bare: np.ndarray


def _make(python: Path, fixtures: Sequence[PipelineFixture], folder: Path) -> list[_Made]:
    """Make pipelines and adapters, and what diffusers is shown of each."""
    wanted = [
        {"pipeline": each.pipeline, "part": each.part, "config": dict(each.config),
         "header": each.header, "folder": f"{number}"}
        for number, each in enumerate(fixtures)
    ]  # fmt: skip
    _run(python, "make", str(write_json(folder / "wanted.json", wanted)), str(folder))
    told = json.loads((folder / "made.json").read_text())
    made = []
    for number, (fixture, answers) in enumerate(zip(fixtures, told, strict=True)):
        base = folder / "pipelines" / fixture.pipeline / fixture.part
        served = _served(fixture, base, folder / f"{number}")
        true, bare = (np.array(answers[key]) for key in ("trained", "untrained"))
        made.append(_Made(fixture, base, served, true, bare))
    return made


def _served(fixture: PipelineFixture, base: Path, own: Path) -> Path:
    if fixture.given in ("own", "peft"):
        return own / fixture.given
    out = own / "served" / fixture.part
    if fixture.given == "merged":
        regraft.merge(base, own / "peft", out)
        return out
    to = "diffusers" if fixture.given == "diffusers" else "kohya"
    uniform = fixture.given == "uniform"
    convert_adapter(own / "peft", out, to=to, base=base, uniform=uniform)
    if fixture.change is None:
        return out
    from safetensors.numpy import load_file, save_file

    changed = fixture.change(load_file(out / "lora.safetensors"), base)
    shutil.rmtree(out)
    out.mkdir()
    save_file(changed, out / "lora.safetensors")
    return out


def _run(python: Path, *arguments: str) -> None:
    command = [str(python), str(HERE / SCRIPT), *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # small models gain nothing by more
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{NAME}: {done.stdout[-2000:]}{done.stderr[-4000:]}")


# -- shown -----------------------------------------------------------------------------------------


def show(root: Path, given: Mapping[str, str], names: Sequence[str], folder: Path) -> list[Shown]:
    """Show diffusers every fixture.

    Args:
        root: where its environment is made.
        given: Pythons that are there, by name.
        names: the fixtures to show; all if there are none.
        folder: where files are made.
    """
    fixtures = [each for each in FIXTURES if not names or each.name in names]
    if not fixtures:
        return []
    python = python_of(NAME, PACKAGES, root, given)
    made = _make(python, fixtures, folder)
    jobs = [
        {"pipeline": each.fixture.pipeline, "part": each.fixture.part,
         **({"base": str(each.served)} if each.fixture.given == "merged" else
            {"base": str(each.base.parent), "adapter": str(each.served)})}
        for each in made
    ]  # fmt: skip
    _run(python, str(write_json(folder / "jobs.json", jobs)), str(folder / "answers.json"))
    told = json.loads((folder / "answers.json").read_text())
    return [_judged(each, answer) for each, answer in zip(made, told, strict=True)]


def _judged(made: _Made, answer: Mapping[str, Any]) -> Shown:
    name, merged = made.fixture.name, made.fixture.given == "merged"
    foretold = None if merged else foretold_by(made.base, made.served, NAME, {})
    if "refused" in answer:
        return Shown(name, NAME, "refused", None, answer["refused"], foretold)
    found, size = np.array(answer["answer"]), float(np.abs(made.true).max())
    off = float(np.abs(found - made.true).max()) / size
    from_base = float(np.abs(found - made.bare).max()) / size
    did = "as trained" if off < SAME else "as the base" if from_base < SAME else "otherwise"
    return Shown(name, NAME, did, off, "", foretold)


def table(shown: Sequence[Shown], versions: Mapping[str, str]) -> list[str]:
    """Return the lines of the table."""
    by = {each.fixture: each for each in shown if each.engine == NAME}
    lines = [f"| adapter | {versions.get(NAME, NAME)} | foretold |", "|---|---|---|"]
    for fixture in FIXTURES:
        if (found := by.get(fixture.name)) is not None:
            lines.append(f"| {fixture.name} | {cell(found)} | {found.foretold or ''} |")
    return lines
