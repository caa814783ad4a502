"""Names of a UNet's modules in Stability's code (sgm, ldm), which kohya's scripts use for SDXL.

``down_blocks.1.attentions.0`` is ``input_blocks.4.1`` there: blocks are counted through, and what
is in one has no name. Source: diffusers' ``scripts/convert_diffusers_to_original_sdxl.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
_BLOCK = re.compile(
    r"(?:(?P<way>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)


def sgm_name(module: str, modules: Collection[str], layers_per_block: int) -> str | None:
    """Return what Stability's code calls a module of a UNet of diffusers; None for no such module.

    Args:
        module: diffusers' name.
        modules: names of all modules of the UNet that have weights.
        layers_per_block: of its config: resnets of a block on the way down.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    match = _BLOCK.fullmatch(module)
    if match is None:
        return None
    kind, number, rest = match["kind"], int(match["number"]), match["rest"]
    inside = _IN_RESNET.get(rest) if kind == "resnets" else rest
    if inside is None:
        return None
    if match["way"] is None:
        place = _MIDDLE.get((kind, number))
        return None if place is None else f"middle_block.{place}.{inside}"
    return _of_block(match["way"], int(match["block"]), kind, number, inside, modules,
                     layers_per_block)  # fmt: skip


def _of_block(
    way: str, block: int, kind: str, number: int, inside: str, modules: Collection[str],
    layers_per_block: int,
) -> str:  # fmt: skip
    every = layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{every * (block + 1)}.0.op"
    place = int(kind == "attentions")
    if way == "down":
        return f"input_blocks.{1 + every * block + number}.{place}.{inside}"
    if kind == "upsamplers":
        attends = any(name.startswith(f"up_blocks.{block}.attentions.") for name in modules)
        return f"output_blocks.{every * (block + 1) - 1}.{1 + attends}.{inside}"
    return f"output_blocks.{every * block + number}.{place}.{inside}"
