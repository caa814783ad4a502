"""How an adapter packs B of a stack of experts, by what its config says.

B of a stack is (out, r * experts). PEFT reads its columns as (r, experts), the expert fastest
(``ParamWrapper.get_delta_weight``). Unsloth trained with (experts, r), so that column j belongs to
expert j // r, and says so in ``adapter_config.json``: in ``lora_B_layout`` for all parameters, in
``unsloth_fused_expert_lora`` by the parameter's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RANK_MAJOR, BY_EXPERT, UNKNOWN = "rank_major", "grouped_by_expert", "unknown"

FLAT, DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"
_LAYOUTS = (RANK_MAJOR, BY_EXPERT)
_ONE_OF = " or ".join(map(repr, _LAYOUTS))

WAY_ON = (
    f'Say it in adapter_config.json: "{FLAT}": "{BY_EXPERT}" if it was trained by Unsloth\'s own '
    f'forward pass for experts, "{FLAT}": "{RANK_MAJOR}" if by PEFT\'s'
)

Layouts = tuple[tuple[str, str], ...]
Wrong = list[tuple[str, str, object]]
"""What is wrong in a config: key, what was expected, what was found."""


def read_layouts(config: Mapping[str, Any]) -> tuple[Layouts, Wrong]:
    """Return how B is packed, by a parameter's name (``""``: all others), and what is wrong.

    Unsloth wrote adapters of experts without either key until September 2026. These may be packed
    in both ways, so their layout is :data:`UNKNOWN`.
    """
    auto = config.get("auto_mapping")
    auto = auto if isinstance(auto, Mapping) else {}
    for source in (config, auto):
        if source.get(FLAT) is not None or source.get(DETAIL) is not None:
            return _declared(source)
    if config.get("target_parameters") and auto.get("unsloth_fixed"):
        return (("", UNKNOWN),), []
    return (), []


def _declared(source: Mapping[str, Any]) -> tuple[Layouts, Wrong]:
    flat, wrong = source.get(FLAT), Wrong()
    if flat is not None and flat not in _LAYOUTS:
        wrong.append((FLAT, _ONE_OF, flat))
    found, also_wrong = _detailed(source.get(DETAIL))
    wrong += also_wrong
    if flat in _LAYOUTS:
        others = {layout for layout in found.values() if layout != flat}
        if others:
            wrong.append((FLAT, f"the layout that {DETAIL} has, {others.pop()!r}", flat))
        found[""] = str(flat)
    return tuple(found.items()), wrong


def _detailed(detail: object) -> tuple[dict[str, str], Wrong]:
    if detail is None:
        return {}, []
    if not isinstance(detail, Mapping) or not isinstance(detail.get("parameters", {}), Mapping):
        return {}, [(DETAIL, "an object with the parameters' layouts", detail)]
    wrong, found = Wrong(), {}
    if detail.get("lora_A_layout", BY_EXPERT) != BY_EXPERT:
        wrong.append((f"{DETAIL}.lora_A_layout", repr(BY_EXPERT), detail["lora_A_layout"]))
    if (every := detail.get(FLAT)) is not None:
        found[""] = every
    for name, entry in detail.get("parameters", {}).items():
        found[str(name)] = entry.get(FLAT) if isinstance(entry, Mapping) else entry
    for name, layout in found.items():
        if layout not in _LAYOUTS:
            where = f"{DETAIL}.parameters.{name}.{FLAT}" if name else f"{DETAIL}.{FLAT}"
            wrong.append((where, _ONE_OF, layout))
    return found, wrong


def layout_of(layouts: Layouts, parameter: str) -> str:
    """Return how B of a parameter is packed.

    Args:
        layouts: what the config says.
        parameter: the parameter's name; only what follows its last dot counts.
    """
    found = dict(layouts)
    return found.get(parameter.rpartition(".")[2], found.get("", RANK_MAJOR))
