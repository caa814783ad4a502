"""Where the rows of a batch are in what a module is given, and whether that is known at all.

A layer sees a tensor. That its first axis is as long as the batch, or a multiple of it, does not
say that the rows lie along it: an axis of time can be as long as the batch, tokens may be sorted by
expert, images packed one after the other. What is known comes from the classes: the models of
transformers keep rows first, with exceptions that are told here, and torch's own modules say where
their batch is. Nothing is known of layers in other models. Those are run as a whole, once for each
mix of adapters, on its rows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import UnsupportedError, UsageError
from regraft.runtime.model.live_base import LiveBase, input_embedding

OTHERWISE = frozenset({
    "bridgetower", "bros", "edgetam_video", "fsmt", "led", "longformer", "mask2former",
    "maskformer", "musicgen", "musicgen_melody", "oneformer", "prophetnet", "sam2_video",
    "sam3_tracker_video", "xlnet",
})  # fmt: skip
"""Types of models, of transformers, in which layers are given something else than rows first."""

_EXPERT = re.compile(r"(^|\.)(?!shared)\w*experts?(_?\d+)?(\.|$)")
_EXPERT_CLASS = re.compile(r"(?<!Shared)Experts?(MLP)?$|TopKGating$")
_RELATIVE = re.compile(r"(^|[._])rel(ative)?[._]|relative|cpb_mlp|bias_table")
_PACKED = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q")

MODALITIES = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio"}
"""What models take beside text, and what their configs call it."""

_SIDES = {"vision_config", "audio_config", *(f"{kind}_token_id" for kind in MODALITIES.values()),
          *(f"{kind}_token_index" for kind in MODALITIES.values())}  # fmt: skip
"""Settings of models that take images or sound beside text."""


@dataclass(frozen=True)
class Axis:
    """What is known of the rows in what one module is given.

    Attributes:
        path: the module's.
        number: the axis along which rows lie, with all places of a row together.
        doubt: why they are not known, whatever the module is given; None if they can be.
        is_ids: whether the module looks ids up, so that one place may be for all rows.
        of_images: whether it is given what stands for images or sound instead of tokens.
    """

    path: str
    number: int = 0
    doubt: str | None = None
    is_ids: bool = False
    of_images: bool = False

    def check(self, shape: Sequence[int], count: int, repeats: int) -> None:
        """Refuse an input of which it is not known where its rows are.

        Args:
            shape: the input's.
            count: how many rows were named.
            repeats: how many the model makes of each.

        Raises:
            UnsupportedError: it is not known.
            UsageError: its rows cannot be those that were named.
        """
        if self.is_ids and len(shape) > 1 and shape[0] == 1 and self.doubt is None:
            return  # positions, for all rows
        doubt = self.doubt or self._of_shape(shape, (count, count * repeats))
        if doubt is not None:
            raise unknown_rows(self.path, doubt)
        if shape[self.number] % count or not shape[self.number]:
            raise wrong_length(shape[self.number], count)

    def _of_shape(self, shape: Sequence[int], batches: tuple[int, int]) -> str | None:
        if len(shape) <= self.number or (self.is_ids and len(shape) < 2):
            return "its input has no axis for rows"
        length = shape[self.number]
        if length == 1 and batches[0] > 1:
            return "it is given one thing for all rows"
        others = shape[1:] if self.is_ids else shape[1:-1]
        if self.number == 0 and length not in batches and any(each in batches for each in others):
            return "an axis after the first is as long as the batch"
        return None


def axis_of(base: LiveBase, path: str) -> Axis:
    """Return what is known of the rows in what a module is given."""
    module = base.modules[path]
    return Axis(
        path,
        doubt=_doubt(base, path, module),
        is_ids=isinstance(module, nn.Embedding),
        of_images=_is_of_images(base, path),
    )


def _above(base: LiveBase, path: str) -> list[nn.Module]:
    parts = path.split(".")
    return [base.modules[".".join(parts[:end])] for end in range(len(parts)) if path]


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module's class is one of the models that transformers itself has."""
    return any(cls.__module__.startswith("transformers.models.") for cls in type(module).__mro__)


def _doubt(base: LiveBase, path: str, module: nn.Module) -> str | None:
    """Return why a module's rows are not known, as far as its place in the model says."""
    kind, above = str((base.config or {}).get("model_type")), _above(base, path)
    if not is_of_transformers(base.model):
        return "the model is not called as a whole"
    if kind in OTHERWISE:
        return f"{kind} does not keep rows first"
    if _EXPERT.search(path) or _EXPERT_CLASS.search(type(module).__name__):
        return "an expert is given the tokens that were sent to it, of whatever rows"
    if _RELATIVE.search(path):
        return "what is relative to a position has no rows"
    if any(_is_packed(each) for each in above) and not _is_of_images(base, path):
        return "its tokens are packed without padding"
    return None


def _is_packed(module: nn.Module) -> bool:
    names = inspect.signature(type(module).forward).parameters
    return any(name in names for name in _PACKED)


# -- images and sound ------------------------------------------------------------------------------


def _is_of_images(base: LiveBase, path: str) -> bool:
    """Whether a module is on the side of images or sound in a model that has text too."""
    if _SIDES.isdisjoint(base.config or {}):
        return False
    model: Any = base.model
    text: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    words = input_embedding(model)
    mine = (base.modules[path], *_above(base, path)[1:])
    sides = [each for each in (text, head, words) if isinstance(each, nn.Module)]
    return not any(each is side for each in mine for side in sides if side is not model)


def doubt_of_images(config: Mapping[str, Any], given: Mapping[str, Any], batch: int) -> str | None:
    """Return why it is not known which row each image of a call belongs to; None if it is.

    It is known where each row has exactly one, and all have the same size.

    Args:
        config: the model's.
        given: what the model was called with, by name.
        batch: the rows of the call.
    """
    for name, kind in MODALITIES.items():
        value, grid = given.get(name), given.get(f"{kind}_grid_thw")
        if isinstance(value, Tensor):
            token = config.get(f"{kind}_token_id", config.get(f"{kind}_token_index"))
            doubt = _doubt_of_one(value, grid, token, given.get("input_ids"), batch)
            if doubt is not None:
                return doubt
    return None


def _doubt_of_one(value: Tensor, grid: Any, token: Any, ids: Any, batch: int) -> str | None:
    if isinstance(grid, Tensor):
        if bool((grid != grid[:1]).any()):
            return "images have different sizes"
        count = grid.shape[0]
    elif value.dim() > 4 and value.shape[1] != 1:
        return "rows have several images, or images in several parts"
    else:
        count = value.shape[0]
    if count != batch:
        return f"there are {count} images for {batch} rows"
    if token is None:
        return None  # images and texts are pairs
    if not isinstance(ids, Tensor) or not bool((ids == token).any(dim=1).all()):
        return "not every row has an image"
    return None


# -- errors ----------------------------------------------------------------------------------------


def is_in_backward() -> bool:
    """Whether a backward pass runs this again: what passed once need not be asked again."""
    return bool(torch._C._current_graph_task_id() != -1)


def unknown_rows(path: str, why: str) -> UnsupportedError:
    """Return the error for a module whose inputs cannot be assigned to rows of the batch."""
    return UnsupportedError(
        "it is not known which row of the batch each input of this module belongs to",
        where=f"rows(), {path}", found=why,
        hint="Run the rows of each adapter as a batch of their own: with adapters.using(name), "
        "once for each",
    )  # fmt: skip


def wrong_length(batch: int, rows: int) -> UsageError:
    """Return the error for a batch whose rows are not those that were named."""
    return UsageError(
        "the batch does not have as many rows as adapters were named", where="rows()",
        expected=f"{rows} rows", found=f"a batch of {batch}",
        hint="Name one adapter (or None) for each row; where generate() makes several rows of one "
        "(num_beams, num_return_sequences), say so: rows(names, repeats=num_beams)",
    )  # fmt: skip
