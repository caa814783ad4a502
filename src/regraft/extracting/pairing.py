"""The tensors of a fine-tuned model beside those of its base, and what an adapter has for each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from regraft.errors import MismatchError, Problem, UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.problems import capped
from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.planning.quantized.linear_layers import model_types
from regraft.names import NameMap
from regraft.names.conv1d import is_conv1d
from regraft.tensors import WORKING_DTYPES, TensorSpec

Role = Literal["linear", "conv1d", "convolution", "embedding", "experts", "whole"]
"""What an adapter has for a changed tensor: factors, by the kind of its layer, or all of it."""

_EMBEDDING = re.compile(
    r"\w*embed\w*|\w*_emb|wte|wpe|shared|word_embeddings|token_type\w*|\w*position\w*",
    re.IGNORECASE,
)
"""Last parts of modules that are embeddings."""

_NO_FACTORS = re.compile(r"router|gate|relative_attention_bias|pe_k|\w*_token", re.IGNORECASE)
"""Last parts of modules whose weight has two axes and is no linear layer of PEFT's: all of it
travels."""


@dataclass(frozen=True)
class TensorPair:
    """A tensor of the fine-tuned model, and that of the base.

    Attributes:
        name: its name in the fine-tuned model's files.
        parameter: the name that an adapter has for it.
        role: what an adapter has for it.
        base: the base's; None where the base has none.
        tuned: the fine-tuned model's.
        shared_by: other parameters that share it.
    """

    name: str
    parameter: str
    role: Role
    base: TensorSpec | None
    tuned: TensorSpec
    shared_by: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module it is the weight of; of a stack of experts, the parameter itself."""
        return self.parameter if self.role == "experts" else self.parameter.removesuffix(".weight")

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices it is, and their rows and columns as they are stored."""
        shape = self.tuned.shape
        if self.role == "experts":
            return shape[0], shape[1], shape[2]
        return 1, shape[0], math.prod(shape[1:])

    @property
    def is_resized(self) -> bool:
        """Whether the two have other shapes, or the base has none."""
        return self.base is None or self.base.shape != self.tuned.shape


def pairs_of(base: Checkpoint, tuned: Checkpoint) -> list[TensorPair]:
    """Return all tensors of a fine-tuned model, each with the base's.

    Raises:
        MismatchError: the models are not of one kind: names or shapes differ; lists all.
        UnsupportedError: a tensor is of a dtype that has no difference.
    """
    index = BaseIndex(base, NameMap.for_config(base.config or {}))
    there = {_key(index, name): spec for name, spec in base.tensors.items()}
    pairs = [
        _pair(index, name, spec, there.get(_key(index, name)))
        for name, spec in tuned.tensors.items()
    ]
    problems = [*_missing(index, there, tuned), *_unlike(pairs, base)]
    if problems:
        raise MismatchError(capped(problems, tuned.root))
    odd = [pair for pair in pairs if pair.tuned.dtype not in WORKING_DTYPES and not _same(pair)]
    if odd:
        raise UnsupportedError(capped([_no_difference(pair) for pair in odd], tuned.root))
    return [pair for pair in pairs if pair.tuned.dtype in WORKING_DTYPES]


def _key(index: BaseIndex, name: str) -> object:
    """Return what a tensor is to transformers: old and new names of one are alike."""
    return index.names.pieces(name)


def _pair(index: BaseIndex, name: str, tuned: TensorSpec, base: TensorSpec | None) -> TensorPair:
    pieces = index.names.pieces(name)
    whole = len(pieces) == 1 and pieces[0].whole
    parameter = pieces[0].parameter if whole else name
    shared_by = tuple(other for other, source in index.aliases.items() if source == parameter)
    role = _role(index, parameter, tuned, base)
    if role == "embedding" and shared_by:  # factors would change one side alone
        role = "whole"
    return TensorPair(name, parameter, role, base, tuned, shared_by)


def _role(index: BaseIndex, parameter: str, tuned: TensorSpec, base: TensorSpec | None) -> Role:
    if base is None or base.shape != tuned.shape or len(tuned.shape) < 2:
        return "whole"
    if ".experts." in parameter and len(tuned.shape) == 3:
        return "experts"
    if not parameter.endswith(".weight"):
        return "whole"
    module = parameter.removesuffix(".weight")
    last = re.sub(r"(\.\d+)+$", "", module).rpartition(".")[2]
    if _EMBEDDING.fullmatch(last):
        return "whole" if len(tuned.shape) != 2 else "embedding"
    if _NO_FACTORS.fullmatch(last):
        return "whole"
    if len(tuned.shape) > 2:
        return "convolution"
    kinds = model_types(index.base.config or {})
    return "conv1d" if any(is_conv1d(kind, module) for kind in kinds) else "linear"


def _missing(
    index: BaseIndex, there: Mapping[object, TensorSpec], tuned: Checkpoint
) -> Iterator[Problem]:
    found = {_key(index, name) for name in tuned.tensors}
    for key, spec in there.items():
        if key not in found:
            yield Problem(
                "the fine-tuned model lacks a tensor that the base has", spec.name,
                "a model of the same kind", f"none in {tuned.source}",
                "Name the base that it was fine-tuned from",
            )  # fmt: skip


def _unlike(pairs: Sequence[TensorPair], base: Checkpoint) -> Iterator[Problem]:
    """Yield the pairs whose shapes differ in more than the rows of a vocabulary."""
    for pair in pairs:
        if pair.base is None:
            known = pair.name.rpartition(".")[0].rpartition(".")[2]
            if "head" not in known and not _EMBEDDING.fullmatch(known):
                yield Problem(
                    "the fine-tuned model has a tensor that the base lacks", pair.name,
                    "a model of the same kind", f"none in {base.source}",
                    "Name the base that it was fine-tuned from",
                )  # fmt: skip
        elif pair.base.shape[1:] != pair.tuned.shape[1:] or (
            pair.base.shape != pair.tuned.shape and len(pair.tuned.shape) != 2
        ):
            yield Problem(
                "the two models have other shapes", pair.name, f"{pair.base.shape} (base)",
                f"{pair.tuned.shape} (fine-tuned)", "Name the base that it was fine-tuned from",
            )  # fmt: skip


def _same(pair: TensorPair) -> bool:
    return pair.base is not None and pair.base.dtype == pair.tuned.dtype


def _no_difference(pair: TensorPair) -> Problem:
    return Problem(
        f"a tensor of {pair.tuned.dtype} has no difference to the base's", pair.name,
        " or ".join(WORKING_DTYPES), pair.tuned.dtype, "Convert the models first",
    )  # fmt: skip
