"""An adapter beside its base, and which of its parts have which feature."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from regraft.adapters.dialects.shared.base_facts import is_other_part
from regraft.adapters.model import Adapter, WholeTensor
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.safetensors import read_header
from regraft.merging.inputs.base_index import BaseIndex
from regraft.names import NameMap
from regraft.shrinking.targets import Pair
from regraft.tensors import TensorSpec

_HEAD_LEAVES = ("lm_head", "embed_out")
_EMBEDDING_LEAVES = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_OF_MODEL = "base_model.model."


@dataclass(frozen=True)
class Subject:
    """An adapter, read, with the base that it is for.

    Attributes:
        adapter: the adapter, in PEFT's form.
        pairs: its adapted modules with rank and scale.
        base: the base's tensors, quantized weights as the plain ones they stand for.
        files: the adapter's files.
    """

    adapter: Adapter
    pairs: tuple[Pair, ...]
    base: Checkpoint
    files: AdapterFiles

    @property
    def dialect(self) -> str:
        """What the adapter was written in."""
        return self.files.dialect

    @cached_property
    def index(self) -> BaseIndex:
        """The base's tensors by the names that they can be asked for."""
        return BaseIndex(self.base, NameMap.for_config(self.base.config))

    @property
    def architecture(self) -> str | None:
        """The class that the base's config names, None where it names none."""
        return self.index.names.architecture

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules whose weights the base stores."""
        return frozenset(name.rpartition(".")[0] for name in self.base.tensors)

    @cached_property
    def stored(self) -> Mapping[str, TensorSpec]:
        """The tensors of the adapter's own file, in order of offset.

        Empty for an adapter in PEFT's format, or in several files.
        """
        origin = self.files.origin
        files = [] if origin is None else [origin]
        if origin is not None and origin.is_dir():
            files = sorted(origin.glob("*.safetensors"))
        lone = len(files) == 1 and files[0].suffix == ".safetensors"
        return read_header(files[0]).tensors if lone else {}

    @property
    def model_type(self) -> str | None:
        """The kind of model that the base's config names, None where it names none."""
        found = (self.base.config or {}).get("model_type")
        return found if isinstance(found, str) else None

    @property
    def is_tied(self) -> bool:
        """Whether the base's head is its embedding."""
        return bool(self.index.names.tied_now)


def stored_module(pair: Pair) -> str:
    """Return a module's name as the adapter's file has it, without PEFT's prefix and suffixes."""
    key = pair.target.a.name
    return re.sub(r"\.lora_(embedding_)?A(\..*)?$", "", key.removeprefix(_OF_MODEL))


def is_head(subject: Subject, module: str) -> bool:
    """Whether a module is the model's output embedding."""
    named = subject.index.names.output_embedding
    return module == named or module.rpartition(".")[2] in _HEAD_LEAVES


def is_embedding(subject: Subject, module: str) -> bool:
    """Whether a module is the model's input embedding."""
    named = subject.index.names.input_embedding
    return module == named or module.rpartition(".")[2] in _EMBEDDING_LEAVES


# -- features --------------------------------------------------------------------------------------


def _names(pairs: Iterable[Pair]) -> list[str]:
    return [pair.name for pair in pairs]


def _saved(subject: Subject) -> list[str]:
    return [each.parameter for each in subject.adapter.whole if each.origin == "saved"]


def _copies(subject: Subject) -> list[WholeTensor]:
    return [each for each in subject.adapter.whole if each.origin == "embedding"]


def is_grown(subject: Subject, copy: WholeTensor) -> bool:
    """Whether a copy of an embedding has another shape than the base's own."""
    held = [h.spec.shape for f in subject.index.find(copy.parameter) for h in f.held]
    return bool(held) and copy.spec.shape not in held


def is_other(subject: Subject, name: str) -> bool:
    """Whether a module or parameter is of a part that is not the language model."""
    return is_other_part(name, subject.base)


def _tied_sides(subject: Subject) -> list[Pair]:
    """Return the head and the embedding of a model in which they are one tensor."""
    if not subject.is_tied:
        return []
    return [
        pair
        for pair in subject.pairs
        if is_head(subject, pair.target.module) or is_embedding(subject, pair.target.module)
    ]


def _conv1d(subject: Subject) -> list[Pair]:
    return [p for p in subject.pairs if subject.index.is_conv1d(p.target.module)]


def _is_square(pair: Pair) -> bool:
    return pair.sizes.out == pair.sizes.inputs


FEATURES: Mapping[str, Callable[[Subject], list[str]]] = {
    "dora": lambda s: _names(p for p in s.pairs if p.target.magnitude is not None),
    "bias of a factor": lambda s: _names(p for p in s.pairs if p.target.b_bias is not None),
    "bias": lambda s: [w.parameter for w in s.adapter.whole if w.origin == "bias"],
    "saved": _saved,
    "grown embedding": lambda s: [w.parameter for w in _copies(s) if is_grown(s, w)],
    "copy of an embedding": lambda s: [w.parameter for w in _copies(s)],
    "other part": lambda s: [
        *_names(p for p in s.pairs if is_other(s, p.target.module)),
        *(name for name in _saved(s) if is_other(s, name)),
    ],
    "token rows": lambda s: [rows.module for rows in s.adapter.token_rows],
    "starts with the base": lambda s: _names(
        s.pairs if s.adapter.settings.begins_with_base else ()
    ),
    "embedding": lambda s: _names(p for p in s.pairs if p.layer == "embedding"),
    "embedding that is not the input's": lambda s: _names(
        p for p in s.pairs if p.layer == "embedding" and not is_embedding(s, p.target.module)
    ),
    "side of a tie": lambda s: _names(_tied_sides(s)),
    "bias of experts": lambda s: _names(
        p for p in s.pairs if p.layer == "linear" and p.target.module.endswith(".experts")
    ),
    "convolution": lambda s: _names(p for p in s.pairs if p.layer == "convolution"),
    "stack of experts": lambda s: _names(p for p in s.pairs if p.layer == "experts"),
    "experts grouped by expert": lambda s: _names(
        p for p in s.pairs if p.layer == "experts" and p.sizes.by_expert
    ),
    "transposed weight": lambda s: _names(p for p in _conv1d(s) if not _is_square(p)),
    "square transposed weight": lambda s: _names(p for p in _conv1d(s) if _is_square(p)),
    "output projection of MultiheadAttention": lambda s: _names(
        p for p in s.pairs if ".base_layer.out_proj." in p.target.a.name
    ),
}
"""The names of the parts that have a feature, by the feature."""
