"""llama.cpp: GGUF LoRA adapters, with one alpha for all; its converter makes them of PEFT folders.

The facts of PEFT folders are those of the converter, ``convert_lora_to_gguf.py``. A GGUF adapter
that is given as it is has no scale but the one that llama.cpp takes.
"""

from __future__ import annotations

from regraft.engines.common import scales
from regraft.engines.facts import MERGE_AND_EXPORT, Engine, Rule
from regraft.engines.subject import Subject
from regraft.shrinking.targets import Pair

FOLD = "Write it with the scale in the factors: `regraft convert ADAPTER --to gguf -o OUT`"


def scale_of(alpha: float, rank: int) -> float:
    """Return what llama.cpp multiplies a delta by: an alpha of 0 is taken for none."""
    return alpha / rank if alpha else 1.0


def _converted_scale(subject: Subject, pair: Pair) -> float:
    if subject.dialect == "gguf":
        return pair.scale
    return scale_of(subject.adapter.settings.lora_alpha, pair.rank)


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
        Rule(
            "saved norm", "leaves out", "it reads past the weights of norms", MERGE_AND_EXPORT
        ),
        Rule(
            "saved, no norm", "refuses", "its converter stops at modules that are replaced",
            MERGE_AND_EXPORT,
        ),
        Rule("token rows", "refuses", "its converter stops at token rows", MERGE_AND_EXPORT),
        Rule(
            "grown embedding", "leaves out", "its converter skips the adapter's copy of an "
            "embedding", MERGE_AND_EXPORT,
        ),
        Rule(
            "starts with the base", "misapplies",
            "its converter does not look at init_lora_weights, and the base stays as it is",
            MERGE_AND_EXPORT,
        ),
        Rule(
            "tied head", "refuses", "the base's file has no head of its own to add to",
            MERGE_AND_EXPORT,
        ),
        Rule("stack of experts", "refuses", "its converter takes experts one by one",
             MERGE_AND_EXPORT),
        Rule("convolution", "refuses", "it has no LoRA for convolutions", MERGE_AND_EXPORT),
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
        scales(
            _converted_scale, "it divides one alpha by each module's rank, and knows neither "
            "rsLoRA nor an alpha of 0 or of single modules", FOLD,
        ),
    ),
)  # fmt: skip
