"""Where the rows of a batch are in what a module is given, and whether that is known at all.

A layer sees a tensor. That its first axis is as long as the batch, or a multiple of it, does not say
that the rows lie along it: an axis of time can be as long as the batch, tokens may be sorted by
expert, images packed one after the other. What is known comes from the classes: torch's own say
where their batch is, and the models of transformers keep rows first, with exceptions that are
told by name here. Of other models only the plain case is taken: one place for each row on the first
axis, and no other axis of the same length. Whatever else there is gets refused.
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
from regraft.runtime.live_base import LiveBase

OTHERWISE = frozenset({
    "bridgetower", "bros", "edgetam_video", "fsmt", "led", "longformer", "mask2former", "maskformer",
    "musicgen", "musicgen_melody", "oneformer", "prophetnet", "sam2_video", "sam3_tracker_video",
    "transfo-xl", "xlnet",
})  # fmt: skip
"""Types of models, of transformers, in which layers are given something else than rows first."""

_TIME_FIRST = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_EXPERT = re.compile(r"(^|\.)(?!shared)\w*experts?(_?\d+)?(\.|$)")
_EXPERT_CLASS = re.compile(r"(?<!Shared)Experts?(MLP)?$|TopKGating$")
_MIXTURE_CLASS = re.compile(r"moe|expert|mixture|rout", re.IGNORECASE)
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
        number: the axis along which rows lie.
        doubt: why they are not known, whatever the module is given; None if they can be.
        in_parts: whether a row may have several places, one after the other: tokens, windows.
        is_ids: whether the module looks ids up, so that one place may be for all rows.
        by_class: whether the module's class says what the axes are, whatever their lengths.
        of_images: whether it is given what stands for images or sound instead of tokens.
    """

    path: str
    number: int = 0
    doubt: str | None = None
    in_parts: bool = False
    is_ids: bool = False
    by_class: bool = False
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
        length, others = shape[self.number], self._leading(shape)
        if length == 1 and batches[0] > 1:
            return "it is given one thing for all rows"
        if length not in batches and any(each in batches for each in others):
            return "an axis after the first is as long as the batch"
        if self.in_parts:
            return None
        if length not in batches and length % batches[0] == 0:
            return "it is given several places for each row, in an order that is not known"
        return "two axes are as long as the batch" if length in others else None

    def _leading(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the other axes along which rows might lie."""
        if self.by_class:
            return ()
        ends = len(shape) if self.is_ids else len(shape) - 1
        return tuple(shape[at] for at in range(ends) if at != self.number)


def axis_of(base: LiveBase, path: str) -> Axis:
    """Return what is known of the rows in what a module is given."""
    module, above = base.modules[path], _above(base, path)
    known = is_of_transformers(base.model)
    return Axis(
        path,
        number=1 if any(_is_time_first(each) for each in above) else 0,
        doubt=_doubt(base, path, module, above, known=known),
        in_parts=known,
        is_ids=isinstance(module, nn.Embedding),
        by_class=isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm),
        of_images=_is_of_images(base, path),
    )


def _above(base: LiveBase, path: str) -> list[nn.Module]:
    parts = path.split(".")
    return [base.modules[".".join(parts[:end])] for end in range(len(parts)) if path]


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module's class is one of the models that transformers itself has."""
    return any(cls.__module__.startswith("transformers.models.") for cls in type(module).__mro__)


def _is_time_first(module: nn.Module) -> bool:
    attention: Any = getattr(module, "self_attn", None)
    return isinstance(module, _TIME_FIRST) and not getattr(attention, "batch_first", True)


def _doubt(
    base: LiveBase, path: str, module: nn.Module, above: Sequence[nn.Module], *, known: bool
) -> str | None:
    """Return why a module's rows are not known, as far as its place in the model says."""
    kind = str((base.config or {}).get("model_type"))
    if known and kind in OTHERWISE:
        return f"{kind} does not keep rows first"
    if _is_expert(path, module, above, known=known):
        return "an expert is given the tokens that were sent to it, of whatever rows"
    if _RELATIVE.search(path):
        return "what is relative to a position has no rows"
    if any(_is_packed(each) for each in above) and not _is_of_images(base, path):
        return "its tokens are packed without padding"
    return None


def _is_expert(path: str, module: nn.Module, above: Sequence[nn.Module], *, known: bool) -> bool:
    if known:
        return bool(_EXPERT.search(path) or _EXPERT_CLASS.search(type(module).__name__))
    return any(_MIXTURE_CLASS.search(type(each).__name__) for each in (module, *above)) or bool(
        _EXPERT.search(path)
    )


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
    words: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
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
    """Return the error for a module of which it is not known which row its inputs belong to."""
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
