"""Which tensors a GGUF file gets of a model: names, types, and where their values come from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.errors import FormatError, Problem, UnsupportedError, UsageError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.gguf import gguf_package
from regraft.formats.problems import DOWNLOAD_AGAIN, capped, quoted
from regraft.names.gguf import GgufFamily, huggingface_names, is_optional
from regraft.names.gguf_metadata import (
    SIZES,
    factors_of,
    is_tied,
    said,
    sizes_of,
)
from regraft.quant.formats.gguf import block_size
from regraft.tensors import WORKING_DTYPES, TensorSpec

TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q5_1": 9, "Q5_0": 8, "Q4_1": 3, "Q4_0": 2,
}  # fmt: skip
"""Types that are written, with llama.cpp's number of a file most of whose tensors have them."""

ELSEWHERE = "Export F16, then make it with llama.cpp: llama-quantize OUT.gguf SMALLER.gguf {}"

_HEAD_TYPE = {"Q5_1": "Q8_0", "Q5_0": "Q8_0", "Q4_1": "Q8_0", "Q4_0": "Q8_0"}
"""Types of the output head where the other matrices have fewer bits: errors there show most."""

_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
"""Stored tensors that follow from the config."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: as llama.cpp names it.
        type: its ggml type.
        shape: the last dimension is contiguous.
        source: the model's own tensor, None where the values are given.
        heads: in how many heads its rows are rearranged, 0 for not.
        added: what is added to each value.
        values: given values, which are F32.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    source: TensorSpec | None
    heads: int = 0
    added: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of its blocks."""
        elements, nbytes = block_size(self.type)
        return self.shape[-1] // elements * nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all its blocks."""
        return math.prod(self.shape[:-1]) * self.row_bytes


_LONG = {
    "float32": "f32", "fp32": "f32", "float16": "f16", "fp16": "f16", "bfloat16": "bf16",
}  # fmt: skip
"""Names of dtypes elsewhere, and GGUF's."""


def parse_type(name: str | None) -> str | None:
    """Return the type that is meant, such as ``Q8_0`` by ``q8_0``.

    Raises:
        UsageError: it is none that is written.
    """
    if name is None:
        return None
    name = _LONG.get(name.lower(), name)
    if name.upper() in TYPES:
        return name.upper()
    known = _known_to_llama(name)
    raise UsageError(
        f"cannot write type {name!r}", where="--type",
        expected=", ".join(key.lower() for key in TYPES),
        hint=ELSEWHERE.format(name.upper()) if known else "",
    )  # fmt: skip


def _known_to_llama(name: str) -> bool:
    return re.fullmatch(r"(?i)(Q[2-6]_K(_[SML])?|IQ[1-4]_\w+|T?Q[12]_0|MXFP4\w*)", name) is not None


def exported_tensors(
    architecture: str, family: GgufFamily, config: Mapping[str, Any], model: Checkpoint, kind: str
) -> list[ExportedTensor]:
    """Return the tensors of a file, in the order in which the model's own ones lie.

    Args:
        architecture, family: what the model is to GGUF.
        config: the model's config.
        model: the model as plain weights.
        kind: type of its matrices; what has one dimension is F32, and so are rows that are no whole
            number of blocks F16.

    Raises:
        FormatError: tensors are missing, or their shapes contradict the config; lists all of them.
        UnsupportedError: tensors that GGUF has no name for; lists all of them.
    """
    layers = config["num_hidden_layers"]
    names = _names(architecture, family, layers)
    there = {name: spec for name, spec in model.tensors.items() if not name.endswith(_BUFFERS)}
    tied = is_tied(family, config)
    if tied and _EMBEDDING in there:
        there.pop(_HEAD, None)  # transformers ties it, whatever is stored under its name
    _check_named(model, there, names)
    _check_complete(model, there, names, family, tied=tied)
    _check_shapes(model, there, family, config)
    factors = [
        ExportedTensor(name, "F32", (len(values),), None, values=tuple(values))
        for name, values in factors_of(family, config).items()
    ]
    rows = _Rows(family, config, kind, tied=tied)
    found = [rows.tensor(names, spec) for spec in there.values()]
    if tied and family.with_head:
        found.append(rows.head(there[_EMBEDDING]))
    return factors + found


def _names(architecture: str, family: GgufFamily, layers: int) -> dict[str, str]:
    """Return GGUF's name of each module by transformers'."""
    gguf = gguf_package()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, layers)
    return {own: name for name, own in huggingface_names(family, layers, table.get_name).items()}


@dataclass(frozen=True)
class _Rows:
    """What is done to the tensors of a model."""

    family: GgufFamily
    config: Mapping[str, Any]
    kind: str
    tied: bool

    def tensor(self, names: Mapping[str, str], spec: TensorSpec) -> ExportedTensor:
        """Return one of the model's own tensors."""
        module, parameter = _split(spec.name)
        is_norm = module.endswith("norm") and parameter == "weight"
        return ExportedTensor(
            f"{names[module]}.{parameter}", self._type(spec), spec.shape, spec,
            heads=self._heads(module), added=1.0 if self.family.centered and is_norm else 0.0,
        )  # fmt: skip

    def head(self, embedding: TensorSpec) -> ExportedTensor:
        """Return the output head of a model that has none of its own."""
        return ExportedTensor("output.weight", self._type(embedding), embedding.shape, embedding)

    def _type(self, spec: TensorSpec) -> str:
        if len(spec.shape) < 2:
            return "F32"
        kind = self.kind
        if spec.name == _HEAD or (self.tied and spec.name == _EMBEDDING):
            kind = _HEAD_TYPE.get(kind, kind)
        return "F16" if spec.shape[-1] % block_size(kind)[0] else kind

    def _heads(self, module: str) -> int:
        if not self.family.rearranged:
            return 0
        if module.endswith(".q_proj"):
            return int(self.config["num_attention_heads"])
        if module.endswith(".k_proj"):
            return int(said(self.family, self.config, "num_key_value_heads"))
        return 0


def _split(name: str) -> tuple[str, str]:
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _check_named(
    model: Checkpoint, there: Mapping[str, TensorSpec], names: Mapping[str, str]
) -> None:
    problems = []
    for name, spec in there.items():
        module, parameter = _split(name)
        where = f"{model.source}, tensor {quoted(name)}"
        if module not in names or parameter not in ("weight", "bias"):
            problems.append(Problem("llama.cpp has no name for this tensor", where))
        elif spec.dtype not in WORKING_DTYPES:
            problems.append(Problem("this dtype is not exported", where,
                                    " or ".join(WORKING_DTYPES), spec.dtype))  # fmt: skip
    if problems:
        raise UnsupportedError(capped(problems, model.root))


def _check_complete(
    model: Checkpoint, there: Mapping[str, TensorSpec], names: Iterable[str], family: GgufFamily,
    *, tied: bool,
) -> None:  # fmt: skip
    wanted = [*_wanted(names, family, tied=tied)]
    missing = [
        Problem("a tensor is missing", f"{model.source}, tensor {quoted(name)}",
                "it, as the config describes the model", "it in no file", DOWNLOAD_AGAIN)
        for name in wanted if name not in there
    ]  # fmt: skip
    if missing:
        raise FormatError(capped(missing, model.root))


def _wanted(names: Iterable[str], family: GgufFamily, *, tied: bool) -> Iterator[str]:
    for module in names:
        if module == "lm_head":
            if not tied:
                yield _HEAD
            continue
        if not is_optional(family, module):
            yield f"{module}.weight"
        if family.always_biased and module != "model.embed_tokens":
            yield f"{module}.bias"


def _check_shapes(
    model: Checkpoint, there: Mapping[str, TensorSpec], family: GgufFamily,
    config: Mapping[str, Any],
) -> None:  # fmt: skip
    sizes, problems = sizes_of(family, config), []
    for name, spec in there.items():
        module, parameter = _split(name)
        dimensions = SIZES.get(module.rpartition(".")[2], ("width",))
        expected = tuple(sizes[size] for size in dimensions)
        expected = expected if parameter == "weight" else expected[:1]
        if spec.shape != expected:
            where = f"{model.source}, tensor {quoted(name)}"
            problems.append(Problem("the shape contradicts the config", where, str(expected),
                                    str(spec.shape), DOWNLOAD_AGAIN))  # fmt: skip
    if problems:
        raise FormatError(capped(problems, model.root))
