"""Adapters that other programs wrote in layouts of their own: told by files and names of tensors.

None of them is read here; :mod:`regraft.adapters.dialects` reads some. The others are named, so
that nobody mends a file that is not broken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from regraft.errors import InputError, RegraftError, UnsupportedError
from regraft.formats.gguf import general_type
from regraft.formats.problems import quoted
from regraft.formats.safetensors import read_header

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """A layout of adapters that is not PEFT's.

    Attributes:
        key: its short name.
        name: what an adapter in it is called, such as ``"an MLX adapter"``.
        way_on: how to come from it to PEFT's format.
    """

    key: str
    name: str
    way_on: str


_PEFT = "PEFT's format (adapter_config.json and adapter_model.safetensors)"

KOHYA = Layout(
    "kohya",
    "an adapter in kohya's layout (sd-scripts)",
    f"Convert it with diffusers (load_lora_weights) and train or save it in {_PEFT}",
)
DIFFUSERS = Layout(
    "diffusers",
    "an adapter in diffusers' layout",
    "Load it with the pipeline's load_lora_weights; for its parts call save_pretrained of PEFT, "
    f"which writes {_PEFT}",
)
GGUF = Layout(
    "gguf",
    "a GGUF LoRA adapter, as llama.cpp loads it",
    "Give the adapter that it was converted from (convert_lora_to_gguf.py keeps no PEFT config)",
)
MLX = Layout(
    "mlx", "an MLX adapter", "Convert it to PEFT's format first, or fuse it with mlx_lm.fuse"
)
TINKER = Layout(
    "tinker",
    "an adapter in Tinker's layout",
    "Convert it to PEFT's format with tinker-cookbook first",
)
TORCHTUNE = Layout(
    "torchtune",
    "an adapter in torchtune's layout",
    "Save it with adapter_config.json and adapter_model.safetensors: torchtune's checkpointer for "
    "Hugging Face models writes PEFT's format too",
)
LITGPT = Layout(
    "litgpt",
    "an adapter in LitGPT's layout",
    "Merge it with litgpt merge_lora, or convert its tensors to PEFT's names",
)
MISTRAL = Layout(
    "mistral",
    "an adapter in mistral-finetune's layout",
    "Convert its tensors to the names of the Hugging Face model, in PEFT's format, first",
)
AUTOMODEL = Layout(
    "automodel",
    "an adapter of grouped experts, as NeMo Automodel saved it",
    "Export it with a current NeMo Automodel, which writes PEFT's format expert by expert",
)
LYCORIS = Layout(
    "lycoris",
    "an adapter of LyCORIS that is no LoRA (LoHa, LoKr or OFT)",
    "Merge it with LyCORIS (its tools/merge.py), and use the merged model; diffusers loads LoKr "
    "for some transformers",
)
COMFYUI = Layout(
    "comfyui",
    "an adapter under ComfyUI's names (diffusion_model.)",
    "Load it with diffusers' load_lora_weights, and write it with the pipeline's "
    "save_lora_weights, whose layout is read",
)
XLABS = Layout(
    "xlabs",
    "an adapter of attention processors, as XLabs trains Flux",
    "Load it with diffusers' load_lora_weights, and write it with the pipeline's "
    "save_lora_weights, whose layout is read",
)
MEGATRON = Layout(
    "megatron",
    "an adapter in Megatron's layout (NeMo)",
    "Export it to PEFT's format with Megatron Bridge or NeMo's exporter first",
)
FSDP = Layout(
    "fsdp",
    "shards of an FSDP run",
    "Gather them into one file first (accelerate merge-weights), or save with a full state dict",
)
DEEPSPEED = Layout(
    "deepspeed",
    "shards of a DeepSpeed run",
    "Gather them into one file first (zero_to_fp32.py in that folder), or save on all ranks with "
    "stage3_gather_16bit_weights_on_model_save",
)
SHARDED = Layout(
    "sharded",
    "an adapter in several files with an index",
    "Load it with PEFT and save it with a larger max_shard_size, or join its files into one "
    "adapter_model.safetensors",
)

_BY_FILE: tuple[tuple[re.Pattern[str], Layout], ...] = tuple(
    (re.compile(pattern), layout)
    for pattern, layout in (
        (r"pytorch_lora_weights\.(safetensors|bin)", DIFFUSERS),
        (r"adapter_model\.(safetensors|bin)\.index\.json", SHARDED),
        (r"adapter_(model|\d+)\.pt", TORCHTUNE),
        (r"lit_model\.pth(\.lora)?", LITGPT),
        (r".*\.nemo", MEGATRON),
        (r"pytorch_model_fsdp(_\d+)?|.*\.distcp", FSDP),
        (r"global_step\d+|zero_to_fp32\.py|zero_pp_rank_.*\.pt", DEEPSPEED),
    )
)
"""Names of files and folders, each with what it shows a folder to hold."""

_OTHER_METHOD = r"(hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|b?oft_(blocks|diag))"
_KOHYA_NAME = (
    rf"lora_(unet|te\d?|transformer|prior|refiner)_.*\.(lora_(down|up)\.weight|alpha|{_OTHER_METHOD})"
    r"|.*\.lora_(down|up)\.weight"
)

_BY_TENSOR: tuple[tuple[re.Pattern[str], Layout], ...] = tuple(
    (re.compile(pattern), layout)
    for pattern, layout in (
        (r"diffusion_model\..*\.(lora_.*|alpha)", COMFYUI),
        (_KOHYA_NAME, KOHYA),
        (rf"(?!base_model\.).*\.{_OTHER_METHOD}", LYCORIS),
        (r"(single|double)_blocks\.\d+\.processor\..*lora\d?\.(down|up)\.weight", XLABS),
        (r"(.*\.)?transformer\.h\.\d+\..*\.lora_[AB]|lm_head\.lora_[AB]", LITGPT),
        (r"(unet|transformer(_2)?|text_encoder(_\d)?)\..*[._]lora([._].*)?", DIFFUSERS),
        (r"blk\.\d+\..*\.lora_[ab]|(token_embd|output)\.weight\.lora_[ab]", GGUF),
        (r"(.*\.)?layers\.\d+\.(attn|mlp)\..*\.lora_[ab]\.weight", TORCHTUNE),
        (r"layers\.\d+\.(attention|feed_forward)\.w\w+\.lora_[AB]\.weight", MISTRAL),
        (r".*\.lora_(gate_and_up|gate_up|down)_[AB]", AUTOMODEL),
        (r".*\.adapter\.linear_(in|out)\.weight", MEGATRON),
        (r".*\.lora_[ab]", MLX),
    )
)  # fmt: skip
"""Whole names of tensors, each with the layout that has them; the first one counts."""

_TINKER_HEAD = re.compile(r"(.*\.)?unembed_tokens\.lora_[AB](\..*)?")
_TINKER_SPLIT = re.compile(r".*\.in_proj_[qkv]\.lora_[AB](\..*)?")
_TINKER_EXPERTS = re.compile(r".*\.experts\.w[123]\.lora_[AB](\..*)?")

MOST_ENTRIES = 10_000
"""Of a folder no more entries than this are looked at."""


def of_tensors(shapes: Shapes) -> tuple[Layout, str] | None:
    """Return the layout that names (and shapes) of tensors show, and the first such name.

    None for PEFT's own names, and for names that nobody here knows.
    """
    for name, shape in shapes.items():
        is_stack = _TINKER_EXPERTS.fullmatch(name) and len(shape) == 3
        if is_stack or _TINKER_HEAD.fullmatch(name) or _TINKER_SPLIT.fullmatch(name):
            return TINKER, name
        for pattern, layout in _BY_TENSOR:
            if pattern.fullmatch(name):
                return layout, name
    return None


def of_path(path: Path) -> tuple[Layout, str] | None:
    """Return the layout that a folder or file shows, and the name that shows it; None if none does.

    Raises:
        OSError: a folder cannot be listed.
        InputError: files of several layouts lie in it.
    """
    for look in _LOOKS:
        found = look(path)
        if found is not None:
            return found
    return None


def _by_name(path: Path) -> tuple[Layout, str] | None:
    found: dict[str, tuple[Layout, str]] = {}
    for name in _names(path):
        for pattern, layout in _BY_FILE:
            if pattern.fullmatch(name):
                found.setdefault(layout.key, (layout, name))
                break
    if len(found) > 1:
        raise InputError(
            "holds adapters in several layouts, and nothing tells which one is meant",
            where=str(path), expected="one", found=", ".join(quoted(n) for _, n in found.values()),
            hint=f"Name the file, or say in which layout it is: {', '.join(found)}",
        )  # fmt: skip
    return next(iter(found.values()), None)


def _names(path: Path) -> Iterator[str]:
    """Yield the names in a folder, in order, or that of a file."""
    if not path.is_dir():
        return iter((path.name,))
    return iter(sorted(entry.name for entry in islice(path.iterdir(), MOST_ENTRIES)))


def _by_gguf(path: Path) -> tuple[Layout, str] | None:
    for file in _files(path, ".gguf"):
        if general_type(file) == "adapter":
            return GGUF, file.name
    return None


def _by_tensors(path: Path) -> tuple[Layout, str] | None:
    files = list(_files(path, ".safetensors"))
    if len(files) != 1:
        return None
    try:
        tensors = read_header(files[0]).tensors
    except RegraftError:
        return None  # whoever opens it says what is wrong with it
    return of_tensors({name: spec.shape for name, spec in tensors.items()})


def _files(path: Path, suffix: str) -> Iterable[Path]:
    if not path.is_dir():
        return [path] if path.suffix == suffix else []
    return [path / name for name in _names(path) if name.endswith(suffix)]


_LOOKS: tuple[Callable[[Path], tuple[Layout, str] | None], ...] = (
    _by_name, _by_gguf, _by_tensors,
)  # fmt: skip


def refusal(layout: Layout, shown_by: str, where: Path | str) -> UnsupportedError:
    """Return the error for an adapter in another layout.

    Args:
        layout: the layout.
        shown_by: the file or tensor that shows it.
        where: the path that was given.
    """
    return UnsupportedError(
        f"is {layout.name}, which regraft does not read",
        where=str(where),
        expected=_PEFT,
        found=quoted(shown_by),
        hint=layout.way_on,
    )
