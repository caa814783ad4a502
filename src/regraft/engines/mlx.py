"""mlx-lm: adapters in its own format, with one rank and one scale for all modules."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.engines.facts import Engine, Rule, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject

MERGE = "Merge it (`regraft merge BASE ADAPTER -o OUT`), and give mlx-lm the merged model"


def forms_of_dora(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find adapters of which some modules have magnitudes and others have none."""
    del settings
    with_magnitude = [pair for pair in subject.pairs if pair.target.magnitude is not None]
    if 0 < len(with_magnitude) < len(subject.pairs):
        because = "all modules have to be DoRA's, or none"
        yield from (Finding("refuses", pair.name, because, MERGE) for pair in with_magnitude)


MLX = Engine(
    name="mlx",
    shown="mlx-lm",
    version="0.32.2",
    sources=("mlx_lm/tuner/utils.py", "mlx_lm/tuner/lora.py", "mlx_lm/tuner/dora.py"),
    distributions=("mlx-lm",),
    dialect="mlx",
    rules=(
        Rule("bias of a factor", "refuses", "its factors have no bias", MERGE),
        Rule("bias", "refuses", "it has no place for a bias that is replaced", MERGE),
        Rule("saved", "refuses", "it has no place for a module that is replaced", MERGE),
        Rule("token rows", "refuses", "it has no place for trained token rows", MERGE),
        Rule("grown embedding", "refuses", "it has no place for a copy of an embedding", MERGE),
        Rule("starts with the base", "refuses", "it leaves the base as it is", MERGE),
        Rule(
            "tied head", "refuses", "a tied model has one tensor for both of its embeddings", MERGE
        ),
        Rule("stack of experts", "refuses", "it takes experts one by one", MERGE),
        Rule("convolution", "refuses", "it has no LoRA for convolutions", MERGE),
    ),
    checks=(forms_of_dora,),
)
