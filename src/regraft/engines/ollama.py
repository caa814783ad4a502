"""Ollama: takes no adapters since 0.34.1; a merged model in GGUF is the way."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.engines.common import every_part
from regraft.engines.facts import Engine, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject

_EXPORT = (
    "Merge it (`regraft merge BASE ADAPTER -o MERGED`), and export the merged model with its "
    "Modelfile (`regraft export MERGED -o OUT --for ollama`)"
)


def takes_none(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find every part of an adapter."""
    del settings
    because = "it takes no adapters: a Modelfile has no ADAPTER any more"
    yield from (Finding("refuses", name, because, _EXPORT) for name in every_part(subject))


OLLAMA = Engine(
    name="ollama",
    shown="Ollama",
    version="0.34.1",
    sources=("what its makers say; its files were not read",),
    distributions=(),
    dialect=None,
    checks=(takes_none,),
    notes=("Ollama was not run: nor were its sources read: its makers say so",),
    ran=False,
)
