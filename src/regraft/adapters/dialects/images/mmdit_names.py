"""Flux's and Stable Diffusion 3's modules in their makers' code, whose names kohya's scripts use.

There q, k and v are one matrix, and in Flux's single blocks the MLP's first one is in it too. In
diffusers they are modules of their own, with the rows of it one after the other; halves of the last
modulation are exchanged. Source: diffusers 0.42, ``loaders/single_file_utils.py``
(``convert_flux_transformer_checkpoint_to_diffusers`` and that of SD3).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

_FLUX = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_SD3 = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_SD3_JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_LAST = "final_layer.adaLN_modulation.1"
_SINGLE = "single_transformer_blocks"
_BLOCK = re.compile(rf"({_SINGLE}|transformer_blocks)\.(\d+)\.")

OF_TRANSFORMERS = re.compile(
    r"(double_blocks|single_blocks|joint_blocks)_\d+_.+"
    r"|(img_in|txt_in|time_in|vector_in|guidance_in|final_layer|[xty]_embedder)(_.+)?"
    r"|context_embedder"
)
"""Names, with underscores for dots, that kohya's scripts give modules of such a transformer."""


@dataclass(frozen=True)
class Place:
    """What a module of theirs is in diffusers.

    Attributes:
        modules: the modules whose rows its rows are, one after the other.
        exchanged: whether the two halves of its rows lie the other way round.
    """

    modules: tuple[str, ...]
    exchanged: bool = False


def places(modules: Collection[str]) -> Mapping[str, Place]:
    """Return what each of their modules is, by its name with underscores for dots.

    Args:
        modules: names of all modules of a base that have weights; where they are not those of such
            a transformer of diffusers, there is none.
    """
    blocks = {(m[1], int(m[2])) for m in map(_BLOCK.match, modules) if m}
    return {
        name.replace(".", "_"): place
        for name, place in (_all(blocks) if blocks else ())
        if all(module in modules for module in place.modules)
    }


def _all(blocks: Collection[tuple[str, int]]) -> Iterator[tuple[str, Place]]:
    """Yield their modules, of a transformer with these blocks (of diffusers), and what each is."""
    is_flux = any(kind == _SINGLE for kind, _ in blocks)
    for name, meant in (_FLUX if is_flux else _SD3).items():
        yield name, Place(meant)
    yield _LAST, Place(("norm_out.linear",), exchanged=True)
    last = max(number for _, number in blocks)
    for kind, number in sorted(blocks):
        if is_flux:
            single = kind == _SINGLE
            theirs, inside = ("single", _FLUX_SINGLE) if single else ("double", _FLUX_DOUBLE)
        else:
            theirs, inside = "joint", _SD3_JOINT
        for name, into in inside.items():
            # SD3's last block has no more of the context than its attention takes, and a modulation
            # of it that is like the model's last one.
            half = not is_flux and number == last and name == "context_block.adaLN_modulation.1"
            whole = tuple(f"{kind}.{number}.{module}" for module in into)
            yield f"{theirs}_blocks.{number}.{name}", Place(whole, exchanged=half)
