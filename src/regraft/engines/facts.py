"""The form of an engine's facts: of which version they are, and what it does with what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from regraft.engines.report import Effect, Finding
from regraft.engines.subject import Subject

Settings = Mapping[str, str]
"""What a server is started with, by the names of its options, such as ``max_lora_rank``."""

Check = Callable[[Subject, Settings], Iterable[Finding]]
"""Holds an adapter against facts that a table of features does not say."""

MERGE = "Merge it (`regraft merge BASE ADAPTER -o OUT`), and serve the merged model"
MERGE_AND_EXPORT = (
    "Merge it (`regraft merge BASE ADAPTER -o MERGED`), and export the merged model "
    "(`regraft export MERGED -o OUT.gguf`)"
)
UNIFORM = (
    "Fold the scale into the factors: `regraft convert ADAPTER --to peft --uniform -o OUT`, and "
    "serve OUT"
)
SHRINK = "Reduce its rank (`regraft shrink ADAPTER --rank R -o OUT`), or merge it"


@dataclass(frozen=True)
class Rule:
    """What an engine does with every part of an adapter that has some feature.

    Attributes:
        feature: a key of :data:`regraft.engines.subject.FEATURES`.
        effect: what it does.
        because: why, with the words of its own message where it has one.
        way_out: what to do about it.
    """

    feature: str
    effect: Effect
    because: str
    way_out: str = MERGE


@dataclass(frozen=True)
class Engine:
    """An engine's facts.

    Attributes:
        name: how ``--for`` calls it.
        shown: how its makers write its name.
        version: the version that the facts were read from.
        sources: the files of it that they were read in.
        distributions: its packages, by which an installed version is found.
        dialect: the dialect of adapters that it reads, None where it reads none.
        rules: what it does with each feature that it does not take.
        checks: what a table of features does not say.
        options: the options of its server that change what is found, with what each means.
        notes: what to know beside the findings.
        has_class: whether it has a class of its own for models of an architecture; others it runs
            through transformers, if at all; None where that is a finding.
        ran: whether `make engines` runs it; else the facts are from its source alone.
    """

    name: str
    shown: str
    version: str
    sources: tuple[str, ...]
    distributions: tuple[str, ...]
    dialect: str | None
    rules: tuple[Rule, ...] = ()
    checks: tuple[Check, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    has_class: Callable[[str | None], bool] | None = None
    ran: bool = True
