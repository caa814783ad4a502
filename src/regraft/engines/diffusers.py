"""diffusers: one file with the names of a pipeline's parts; a PEFT folder is loaded as nothing."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.engines.common import every_part
from regraft.engines.facts import Engine, Rule, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject

CONVERT = (
    "Write it under the names of the pipeline's parts: `regraft convert ADAPTER --to diffusers`"
)

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""The parts of a pipeline by which names begin."""


def named_by_part(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find adapters whose names begin with no part of a pipeline, as those of PEFT's folders.

    A part takes the names that begin with its own, and an empty selection is a line in the log.
    """
    del settings
    if subject.dialect != "peft":
        return
    because = "its name begins with no part of a pipeline (unet, transformer), so it is passed over"
    yield from (Finding("leaves out", name, because, CONVERT) for name in every_part(subject))


DIFFUSERS = Engine(
    name="diffusers",
    shown="diffusers",
    version="0.42.1",
    sources=(
        "diffusers/loaders/peft.py", "diffusers/loaders/lora_base.py",
        "diffusers/utils/peft_utils.py",
    ),
    distributions=("diffusers",),
    dialect="diffusers",
    rules=(
        Rule("saved", "refuses", "it has no place for modules that are replaced"),
        Rule("bias", "refuses", "it has no place for biases that are replaced"),
        Rule("token rows", "refuses", "it has no place for trained token rows"),
        Rule("starts with the base", "misapplies", "it leaves the base as it is"),
    ),
    checks=(named_by_part,),
)  # fmt: skip
