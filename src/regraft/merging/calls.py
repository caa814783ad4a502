"""The Python call that carries a plan out: how receipts and cards say that it was made."""

from __future__ import annotations

from typing import Any

from regraft.merging.options import KEEP
from regraft.merging.planning.plan import Plan


def merge_call(verb: str, base: str, made: Plan) -> str:
    """Return the call of ``merge`` or ``swap``.

    Args:
        verb: its name.
        base: what its first argument is: the base, or the merged model.
        made: the plan.
    """
    adapters = ", ".join(repr((a.source, a.weight)) for a in made.adapters)
    format = made.options.get("quantize")
    usual = {
        "undo": format in (None, KEEP), "rounding": "stochastic" if format == KEEP else "nearest",
    }  # fmt: skip
    chosen = "".join(f", {each}" for each in _chosen(made.options, usual))
    return f"regraft.{verb}({base!r}, [{adapters}], {made.out!r}{chosen})"


def conversion_call(verb: str, base: str, made: Plan) -> str:
    """Return the call of ``convert``, ``dequantize`` or ``quantize``; see :func:`merge_call`."""
    options = dict(made.options)
    first = [repr(base), repr(made.out)]
    if format := options.pop("quantize", None):
        first.append(repr(format))
    chosen = _chosen(options, {"undo": False, "rounding": "nearest"})
    return f"regraft.{verb}({', '.join([*first, *chosen])})"


def _chosen(options: Any, usual: dict[str, Any]) -> list[str]:
    """Return the options that are not what a call without them has, as arguments."""
    usual = {"dtype": None, "shard_size": None, "seed": 0, "double_quant": False, **usual}
    return [f"{name}={value!r}" for name, value in options.items() if value != usual.get(name)]
