"""From a verdict on every tensor to a few sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace

from regraft.verifying.report import FINE, Kind, TensorVerdict

_SAID: dict[Kind, str] = {
    "missing": "the delta is missing in",
    "adapter-missing": "the delta of an adapter is missing in",
    "twice": "the delta was applied twice in",
    "scale": "the delta has another scale in",
    "elements": "a few elements are off in",
    "swapped": "what belongs to another tensor is in",
    "changed": "no adapter touches them, but they are not the base's:",
    "another-base": "made from another base:",
    "another-adapter": "something other than these adapters was added to",
    "other": "something else altogether is in",
    "shape": "of another shape:",
    "absent": "missing in the merged model:",
    "extra": "in the merged model, and not in the merge:",
    "unjudged": "cannot be compared:",
}

_SHOWN = 3
"""Names listed of a kind before the rest is counted."""


def conclude(
    tensors: Sequence[TensorVerdict], touched: Set[str]
) -> tuple[tuple[TensorVerdict, ...], tuple[str, ...]]:
    """Return the verdicts, sharpened by what all of them show together, and what to make of them.

    Args:
        tensors: one verdict per tensor.
        touched: names of the tensors that an adapter has a say in.
    """
    tensors, lead = _sharpened(tensors, touched)
    sentences = [lead] if lead else []
    for kind in _SAID:
        same = [tensor for tensor in tensors if tensor.verdict == kind]
        if same:
            sentences.append(_sentence(kind, same, tensors, touched))
    return tuple(tensors), tuple(sentences or _all_fine(tensors))


def _all_fine(tensors: Sequence[TensorVerdict]) -> list[str]:
    loose = [tensor for tensor in tensors if tensor.verdict == "rounding"]
    if not loose:
        return ["every tensor is the merge, bit for bit"]
    worst = max(loose, key=lambda tensor: tensor.ulps or 0.0)
    sentence = (
        f"every tensor is the merge: {len(tensors) - len(loose)} bit for bit, {len(loose)} within "
        f"rounding, at most {worst.ulps or 0:.3g} units in the last place ({worst.name})"
    )
    return [sentence]


def _sharpened(
    tensors: Sequence[TensorVerdict], touched: Set[str]
) -> tuple[list[TensorVerdict], str]:
    """Tell another base from damage, and say what all tensors have in common."""
    own = [t for t in tensors if t.name in touched and t.verdict not in ("absent", "shape")]
    rest = [t for t in tensors if t.name not in touched and t.verdict != "extra"]
    changed = [t for t in rest if t.verdict == "changed"]
    kinds = Counter(t.verdict for t in own)
    if changed and 2 * len(changed) >= len(rest):
        lead = (
            f"it was made from another base: {len(changed)} of {len(rest)} tensors that no "
            "adapter touches are not the base's"
        )
        return _renamed(tensors, ("changed", "other", "another-adapter"), "another-base"), lead
    if 2 * kinds["another-adapter"] >= len(own) > 0 and not changed:
        lead = (
            "another adapter was merged, or the model was trained further: what was added to the "
            "base is not what these adapters add"
        )
        return list(tensors), lead
    return list(tensors), _of_all(own, rest, kinds)


def _renamed(
    tensors: Sequence[TensorVerdict], kinds: tuple[str, ...], new: Kind
) -> list[TensorVerdict]:
    return [replace(t, verdict=new) if t.verdict in kinds else t for t in tensors]


def _of_all(own: list[TensorVerdict], rest: list[TensorVerdict], kinds: Counter[Kind]) -> str:
    """Return the sentence for what is the same in every tensor that an adapter touches."""
    if not own or any(t.verdict not in FINE for t in rest):
        return ""
    if kinds["missing"] == len(own):
        return "this is the base: there is no delta anywhere"
    if kinds["twice"] == len(own):
        return "every delta was applied twice"
    times = [t.coefficient for t in own if t.coefficient is not None]
    if kinds["scale"] == len(own) == len(times) and max(times) - min(times) < 0.05:
        return f"every delta is there {sum(times) / len(times):.3g} times"
    return ""


def _sentence(
    kind: Kind, same: list[TensorVerdict], tensors: Sequence[TensorVerdict], touched: Set[str]
) -> str:
    """Return what a kind says of its tensors: by the last parts of their names, or by name."""
    everywhere = Counter(_leaf(t.name) for t in tensors if (t.name in touched) == _own(kind))
    here = Counter(_leaf(t.name) for t in same)
    groups = [leaf for leaf, count in here.items() if count > 1 and count == everywhere[leaf]]
    names = [t.name for t in same if _leaf(t.name) not in groups]
    parts = [f"every {leaf} ({here[leaf]} tensors)" for leaf in groups] + names
    rest = len(parts) - _SHOWN
    shown = ", ".join(parts[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
    return f"{_SAID[kind]} {shown}"


def _own(kind: Kind) -> bool:
    """Whether a kind is said of tensors that adapters touch."""
    return kind not in ("changed", "extra")


def _leaf(name: str) -> str:
    """Return the last part of a tensor's module."""
    module, _, leaf = name.rpartition(".")
    return module.rpartition(".")[2] if leaf == "weight" and module else leaf
