"""llama.cpp: GGUF LoRA adapters, with one alpha for all; its converter makes them of PEFT folders.

The facts of PEFT folders are those of the converter, ``convert_lora_to_gguf.py``. A GGUF adapter
that is given as it is has no scale but the one that llama.cpp takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from regraft.engines.common import model_is_known, scales
from regraft.engines.facts import MERGE_AND_EXPORT, Engine, Rule, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject, is_grown, is_other, stored_module
from regraft.shrinking.targets import Pair

_LIKE_A_NORM = re.compile(r"_layernorm|\.norm")
_CLASSIFIER = re.compile(r"\.(classifier|score|pooler)(\.|$)")

FOLD = (
    "Write it with the scale in the factors: `regraft convert ADAPTER -o OUT --to gguf --base BASE`"
)


def scale_of(alpha: float, rank: int) -> float:
    """Return what llama.cpp multiplies a delta by: an alpha of 0 is taken for none."""
    return alpha / rank if alpha else 1.0


def _converted_scale(subject: Subject, pair: Pair) -> float:
    if subject.dialect == "gguf":
        return pair.scale
    return scale_of(subject.adapter.settings.lora_alpha, pair.rank)


def _class_of(subject: Subject) -> str | None:
    """Return the class that its converter looks for: the language model's, where one is named."""
    text = (subject.base.config or {}).get("text_config")
    named = text.get("architectures") if isinstance(text, dict) else None
    return str(named[0]) if isinstance(named, list) and named else subject.architecture


def replaced_modules(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find modules that are replaced: it reads past those whose names look like a norm's."""
    del settings
    for whole in subject.adapter.whole:
        name = whole.parameter
        if whole.origin != "saved" or is_other(subject, name):
            continue
        if _LIKE_A_NORM.search(f".{name}"):
            because = "it reads past the weights of norms"
            yield Finding("leaves out", name, because, MERGE_AND_EXPORT)
        else:
            because = "its converter stops at modules that are replaced"
            yield Finding("refuses", name, because, MERGE_AND_EXPORT)


def copies_of_embeddings(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find an adapter's copies of embeddings: one that is not adapted itself is stopped at."""
    del settings
    for copy in subject.adapter.whole:
        if copy.origin != "embedding":
            continue
        if ".base_layer." not in copy.spec.name:
            because = "its converter stops at the adapter's copy of an embedding"
            yield Finding("refuses", copy.parameter, because, MERGE_AND_EXPORT)
        elif is_grown(subject, copy):
            because = "its converter skips the adapter's copy of an embedding"
            yield Finding("leaves out", copy.parameter, because, MERGE_AND_EXPORT)


def classifiers(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find factors of a classifier's layers, which it multiplies by without looking for any."""
    del settings
    for pair in subject.pairs:
        if _CLASSIFIER.search(f".{stored_module(pair)}"):
            because = "what it computes after pooling takes no adapters"
            yield Finding("leaves out", pair.name, because, MERGE_AND_EXPORT)


def convolutions(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find convolutions of the language model."""
    del settings
    for pair in subject.pairs:
        if pair.layer == "convolution" and not is_other(subject, pair.target.module):
            because = "it has no LoRA for convolutions"
            yield Finding("refuses", pair.name, because, MERGE_AND_EXPORT)


LLAMA_CPP = Engine(
    name="llama.cpp",
    shown="llama.cpp",
    version="b11549",
    sources=(
        "convert_lora_to_gguf.py", "conversion/gpt2.py", "src/llama-adapter.cpp",
        "src/llama-adapter.h", "src/llama-graph.cpp",
    ),
    distributions=("xllamacpp",),
    dialect="gguf",
    rules=(
        Rule("dora", "refuses", "its converter stops at DoRA's magnitudes", MERGE_AND_EXPORT),
        Rule("bias of a factor", "refuses", "its converter stops at biases", MERGE_AND_EXPORT),
        Rule("bias", "refuses", "its converter stops at biases", MERGE_AND_EXPORT),
        Rule("token rows", "refuses", "its converter stops at token rows", MERGE_AND_EXPORT),
        Rule(
            "other part", "leaves out", "its converter skips what is no part of the language model",
            MERGE_AND_EXPORT,
        ),
        Rule(
            "starts with the base", "misapplies",
            "its converter does not look at init_lora_weights, and the base stays as it is",
            MERGE_AND_EXPORT,
        ),
        Rule(
            "side of a tie", "refuses", "it has one tensor for the embedding and the head of this "
            "model, and stops at an adapter for either", MERGE_AND_EXPORT,
        ),
        Rule(
            "embedding that is not the input's", "refuses", "it takes factors of the input's "
            "embedding alone", MERGE_AND_EXPORT,
        ),
        Rule("bias of experts", "refuses", "its converter takes no biases", MERGE_AND_EXPORT),
        Rule("stack of experts", "refuses", "its converter takes experts one by one",
             MERGE_AND_EXPORT),
        Rule(
            "transposed weight", "refuses", "its converter turns factors round that lie right "
            "already, so that their sizes do not fit", MERGE_AND_EXPORT,
        ),
        Rule(
            "square transposed weight", "misapplies", "its converter turns factors round that "
            "lie right already", MERGE_AND_EXPORT,
        ),
    ),
    checks=(
        model_is_known("llama.cpp", _class_of), replaced_modules, copies_of_embeddings,
        classifiers, convolutions,
        scales(
            _converted_scale, "it divides one alpha by each module's rank, and knows neither "
            "rsLoRA nor an alpha of 0 or of single modules", FOLD,
        ),
    ),
)  # fmt: skip
