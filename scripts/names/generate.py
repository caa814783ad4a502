"""Write ``src/regraft/names/transformers.json``: what transformers says about names.

Run it in an environment with the ``torch`` extra, after each release of transformers::

    PYTHONPATH=scripts python -m names.generate

It takes a few minutes and needs no network. Classes that need an optional package (timm, Pillow,
scipy, torchaudio, ...) are listed under ``skipped`` where it is missing, and then known in outline
only: have timm, torchvision, Pillow and scipy installed, or compare the ``skipped`` of old and new.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers

from names import extraction

OUTPUT = Path(__file__).resolve().parents[2] / "src" / "regraft" / "names" / "transformers.json"


def extract_architectures() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the facts of every class in the auto mappings, and why some are in outline only."""
    facts: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in extraction.reachable_classes():
        model_class = getattr(transformers, name, None)
        if model_class is None:
            skipped[name] = "not exported by transformers"
            continue
        try:
            facts[name] = extraction.extract_architecture(model_class)
        except Exception as error:
            skipped[name] = _reason(error)
            facts |= _outline(name, model_class)
    extraction.nest_tensors(facts)
    return facts, skipped


def _outline(name: str, model_class: Any) -> dict[str, Any]:
    """Return ``{name: facts}``, or nothing for the stand-in of a class that cannot be imported."""
    if not issubclass(model_class, transformers.PreTrainedModel):
        return {}
    return {name: extraction.extract_partial(model_class)}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def needed_auto_classes(architectures: dict[str, Any]) -> set[str]:
    """Return the auto classes that a task type or a submodel can ask for."""
    tasks = {auto for autos in extraction.TASKS.values() for auto in autos}
    rows = [row for facts in architectures.values() for row in facts.get("submodels", ())]
    return tasks | {row[4] for row in rows if row[4]}


def build_table() -> dict[str, Any]:
    """Return the whole table."""
    architectures, skipped = extract_architectures()
    needed = needed_auto_classes(architectures)
    autos = {name: names for name, names in extraction.auto_classes().items() if name in needed}
    return {
        "transformers": transformers.__version__,
        "tasks": extraction.TASKS,
        "auto": autos,
        "mappings": extraction.extract_mappings(),
        "architectures": extraction.share_equal(architectures),
        "skipped": skipped,
    }


def to_text(table: dict[str, Any]) -> str:
    """Return the table as JSON with one entry of a section per line, so that diffs can be read."""
    sections = []
    for section, content in table.items():
        if isinstance(content, dict):
            lines = (f"{_compact(key)}:{_compact(content[key])}" for key in sorted(content))
            sections.append(f"{_compact(section)}:{{\n" + ",\n".join(lines) + "\n}")
        else:
            sections.append(f"{_compact(section)}:{_compact(content)}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def main() -> None:
    """Write the table, and say on stderr how much is in it."""
    table = build_table()
    text = to_text(table)
    OUTPUT.write_text(text, encoding="utf-8")
    counts = {name: len(part) for name, part in table.items() if isinstance(part, dict)}
    print(f"{OUTPUT}: {len(text.encode())} bytes, {counts}", file=sys.stderr)


if __name__ == "__main__":
    main()
