"""Adapters in memory, and what each does to the parameters of a live model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.deltas.views import View
from regraft.errors import MismatchError, Problem
from regraft.formats.adapter_files import AdapterFiles
from regraft.merging.planning.match import Work, match
from regraft.merging.planning.ties import on_both_sides
from regraft.runtime.model.live_base import LiveBase, spec_of
from regraft.runtime.model.parametrized import is_computed, way_back

_CUT = re.compile(r"^(?P<name>.+)\[rows (?P<first>\d+):(?P<last>\d+)\]$")


@dataclass(eq=False)
class LiveAdapter:
    """An adapter whose tensors are in memory.

    Attributes:
        name: as the user calls it.
        config: its ``adapter_config.json``.
        adapter: what its tensors are, in PEFT's names.
        tensors: by the key that they have in PEFT's file; trained ones require gradients.
        metadata: the strings of its file's header, such as the fingerprint of its base.
    """

    name: str
    config: dict[str, Any]
    adapter: Adapter
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes its tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def dropout(self) -> float:
        """The share of the inputs of A that is dropped in training."""
        return float(self.config.get("lora_dropout") or 0.0)

    @property
    def is_trainable(self) -> bool:
        """Whether any of its tensors is being trained."""
        return any(tensor.requires_grad for tensor in self.tensors.values())


def adapter_of(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], source: str = ""
) -> Adapter:
    """Return what tensors in memory are, by the rules for those in a file.

    Args:
        name: the adapter's, for messages.
        config: as in ``adapter_config.json``.
        tensors: by the key that PEFT's file would have.
        source: where they come from, for messages.

    Raises:
        UnsupportedError, AdapterError: as for an adapter on disk.
    """
    specs = {key: spec_of(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    files = AdapterFiles(Path(), source or name, None, dict(config), specs, "tensors", {})
    return read_adapter(files)


def match_live(base: LiveBase, adapters: Sequence[Adapter]) -> dict[str, Work]:
    """Return what adapters do to a live model: a work for each parameter they change, by name.

    The two sides of a tie are two parameters here, each with a work of its own. The numbers of
    adapters in the works are their places in ``adapters``.

    Raises:
        MismatchError: they do not fit the model, or one another; every misfit is listed.
    """
    matching = match(base.index, adapters)
    problems = [*matching.problems, *_grown(matching.works), *_grown(matching.tied)]
    if problems:
        raise MismatchError(problems)
    works = on_both_sides(base.index, matching)
    added = [_added(work) for work in works.values() if work.base is None]
    if added:
        raise MismatchError(added)
    return {n: w for n, w in works.items() if w.deltas or w.patches or w.source_adapter is not None}


def _grown(works: Mapping[str, Work]) -> list[Problem]:
    """Return the problems of embeddings that would become longer: here that is not possible."""
    problems = []
    for work in works.values():
        if work.base is None or not work.base.shape:
            continue
        rows = work.source.shape[0]
        rows = max([rows, *(i + 1 for patch in work.patches for i in patch.indices)])
        if rows != work.base.shape[0]:
            problems.append(
                Problem("the adapter was trained with another size of this weight", work.name,
                        f"{work.base.shape[0]} rows (the model)", f"{rows} rows (the adapter)",
                        f"Call model.resize_token_embeddings({rows}) first, or load the base with "
                        "as many labels as the adapter has")
            )  # fmt: skip
    return problems


def without_place(base: LiveBase, works: Mapping[str, Work]) -> list[Problem]:
    """Return the problems of works that can be served and not be merged into a parameter."""
    found = ((name, *_unmergeable(*base.owner(name)[1:], work)) for name, work in works.items())
    return [
        Problem("this can be served as an adapter and not be merged", name, "a plain parameter",
                what, hint)
        for name, what, hint in found if what
    ]  # fmt: skip


def _unmergeable(module: Any, leaf: str, work: Work) -> tuple[str, str]:
    """Return why nothing can be merged into a parameter, and what to do; "" if it can be."""
    if not isinstance(getattr(module, leaf, None), torch.Tensor):
        return "none in this layer", "Leave it unmerged, or train without lora_bias"
    if is_computed(module, leaf):
        what = "a weight that is computed from other parameters (parametrization or weight_norm)"
        return what, f"Leave it unmerged. {way_back(module, leaf)}"
    if work.deltas and getattr(module, "max_norm", None) is not None:
        what = f"an embedding that rescales rows as they are looked up (max_norm={module.max_norm})"
        return what, "Leave it unmerged"
    return "", ""


def _added(work: Work) -> Problem:
    return Problem(
        "the adapter holds a tensor that the model does not have", work.name,
        hint="Load the base with the class that the adapter was trained on",
    )  # fmt: skip


def weighted(adapter: Adapter, weight: float) -> Adapter:
    """Return an adapter whose scale is multiplied by a weight."""
    return adapter if weight == 1.0 else replace(adapter, weight=adapter.weight * weight)


class Tensors:
    """The tensors of some adapters, by their number in a match."""

    def __init__(self, adapters: Sequence[LiveAdapter]) -> None:
        self.adapters = tuple(adapters)
        self.trained = tuple(adapter.is_trainable for adapter in adapters)

    def whole(self, adapter: int, name: str) -> torch.Tensor:
        """Return a tensor by the name of its description."""
        tensors = self.adapters[adapter].tensors
        if name in tensors:
            return tensors[name]
        cut = _CUT.match(name)
        if cut is None:
            raise KeyError(name)
        whole = tensors[cut["name"]]
        rows = whole.reshape(-1, *whole.shape[2:]) if whole.dim() > 2 else whole
        return rows[int(cut["first"]) : int(cut["last"])]

    def matrix(self, adapter: int, view: View) -> torch.Tensor:
        """Return a view's matrix, in its own dtype; a torch view wherever it can be one."""
        if view.spec is None:
            return torch.ones(view.result)
        part = self.whole(adapter, view.spec.name)
        if tuple(part.shape) != view.shape:
            part = part.reshape(view.shape)
        for axis in range(len(view.select) - 1, -1, -1):
            chosen = view.select[axis]
            if isinstance(chosen, int):
                part = part.select(axis, chosen)
            elif chosen is not None and chosen != (0, view.shape[axis]):
                part = part.narrow(axis, chosen[0], chosen[1] - chosen[0])
        if tuple(part.shape) != view.matrix:
            part = part.reshape(view.matrix)
        return part.t() if view.transpose else part
