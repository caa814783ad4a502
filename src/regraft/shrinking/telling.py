"""Warnings of a shrink: deltas that changed, and programs that read another scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regraft.shrinking.forms import Form
from regraft.shrinking.report import ShrunkModule, overall_error
from regraft.shrinking.targets import Pair

WARN_ABOVE = 0.05
"""Share of a delta's norm that it may be off by without a warning."""

_ENERGY = 0.998
"""A share of the squared norm at which a delta stays within that, its rounding included."""

_SAME = 1e-6


def error_warning(modules: tuple[ShrunkModule, ...], dtype: str) -> str:
    """Return what to say of deltas that are off by more than :data:`WARN_ABOVE`; "" if none is.

    Args:
        modules: all modules, measured.
        dtype: what the factors are stored in, such as ``"float16"``.
    """
    off = [module for module in modules if module.error > WARN_ABOVE]
    if not off:
        return ""
    worst = max(off, key=lambda module: module.error)
    return (
        f"the deltas of {len(off)} of {len(modules)} modules are off by more than "
        f"{WARN_ABOVE:.0%} of their norm ({worst.name} by {worst.error:.1%}, rank "
        f"{worst.rank_before} -> {worst.rank_after}; all deltas together by "
        f"{overall_error(modules):.1%}). The model will answer otherwise than with the adapter as "
        f"it was. {_way_on(off, dtype)}, or compare the answers before you use it "
        "(`regraft verify --prompts`)"
    )


def _way_on(off: Sequence[ShrunkModule], dtype: str) -> str:
    if all(module.rank_after >= module.rank_before for module in off):  # rounding alone did it
        return f"Give a dtype that holds its factors better than {dtype}, such as float32"
    return f"Give a higher --rank, or --energy {_ENERGY:g} to stay within {WARN_ABOVE:.0%}"


def scale_note(config: Mapping[str, Any], pairs: Sequence[Pair], ranks: Sequence[int]) -> str:
    """Return how many modules get another scale from programs that take one for all; "" if none.

    PEFT, transformers and regraft read the patterns and ``use_rslora``. vLLM takes ``lora_alpha``
    over ``r`` (or its root); llama.cpp ``lora_alpha`` over the rank of each module's factors.

    Args:
        config: of the shrunk adapter.
        pairs: its modules.
        ranks: their ranks in it.
    """
    r, alpha = int(config.get("r") or 8), float(config.get("lora_alpha") or 8)
    one = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    scales = [pair.scale for pair in pairs]
    counts = {
        "lora_alpha and r alone (vLLM)": _others(scales, [one] * len(pairs)),
        "lora_alpha and the rank of the tensors (llama.cpp)": _others(
            scales, [alpha / rank for rank in ranks]
        ),
    }
    said = [
        f"{count} of {len(pairs)} modules in programs that read {what}"
        for what, count in counts.items()
        if count
    ]
    if not said:
        return ""
    return (
        "this adapter needs rank_pattern, alpha_pattern or use_rslora of its config to be read, as "
        f"PEFT does: another scale than theirs is given to {', and to '.join(said)}. --uniform "
        "writes it so that these are right too"
    )


def uniform_note(pairs: Sequence[Pair], forms: Sequence[Form]) -> str:
    """Return what was done for programs that take one scale for all modules."""
    filled = sum(form.rank > form.kept for form in forms)
    rank = forms[0].rank
    zeros = f" ({filled} of {len(pairs)} filled up with zeros)" if filled else ""
    return (
        f"every module's scale is in its B, and all have rank {rank}{zeros} and lora_alpha {rank}: "
        "programs that read no rank_pattern, alpha_pattern or use_rslora scale it rightly too"
    )


def _others(scales: Sequence[float], found: Sequence[float]) -> int:
    pairs = zip(scales, found, strict=True)
    return sum(not math.isclose(scale, other, rel_tol=_SAME) for scale, other in pairs)
