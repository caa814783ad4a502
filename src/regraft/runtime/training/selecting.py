"""Which modules and parameters of a live model a config selects, by PEFT's rules."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from regraft.adapters.patterns import suffixes_of
from regraft.adapters.settings import LoraSettings
from regraft.errors import MismatchError, Problem, UnsupportedError, UsageError
from regraft.runtime.forward.layers.kinds import CONV1D, LINEAR, kind_of
from regraft.runtime.model.live_base import LiveBase

ALL_LINEAR = "all-linear"
HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains whole, by task."""

_SHOWN = 8


def completed(base: LiveBase, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what it leaves to the model: its targets by name, the heads of its task.

    Args:
        base: the model.
        config: fields as in ``adapter_config.json``.

    Raises:
        UsageError: it names no targets.
        UnsupportedError: it trains a module whole that keeps statistics.
        MismatchError: the model has no linear layers.
    """
    fields = dict(config)
    heads = HEADS.get(str(fields.get("task_type")), ())
    if heads:
        saved = list(fields.get("modules_to_save") or ())
        fields["modules_to_save"] = [*saved, *(head for head in heads if head not in saved)]
    if fields.get("ensure_weight_tying"):
        fields["modules_to_save"] = _both_sides(base, fields.get("modules_to_save"))
    _check_statistics(base, fields.get("modules_to_save") or ())
    targets = fields.get("target_modules")
    if note := _note_of_experts(base, targets, fields.get("target_parameters")):
        warnings.warn(note, UserWarning, stacklevel=2)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        fields["target_modules"] = _all_linear(base, fields)
    elif targets is None and not fields.get("target_parameters"):
        fields["target_modules"] = _by_architecture(base, fields)
    return fields


_OF_EXPERTS = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
"""Names that the projections and routers of experts have where each is a linear layer."""


def _note_of_experts(base: LiveBase, targets: Any, parameters: Any) -> str:
    """Return what to say where modules are asked for that lie in stacks of experts; "" for nothing.

    PEFT (from 0.19 on) takes such names for the stacks' parameters.
    """
    stacks = sorted(
        {
            f"{path.rpartition('.')[2]}.{leaf}"
            for path, module in modules_of(base)
            for leaf, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3 and "experts" in path.split(".")
        }
    )
    if not stacks or parameters:
        return ""
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    named = set() if isinstance(targets, str) else set(targets or ())
    leaves = {path.rpartition(".")[2] for path, _ in modules_of(base)}
    lost = sorted(name for name in named & _OF_EXPERTS if name not in leaves)
    if not everything and not lost:
        return ""
    what = "'all-linear'" if everything else ", ".join(map(repr, lost))
    return (
        f"the experts of this model are stacks, which are no modules: {what} does not reach them, "
        "where PEFT adapts them. To adapt them, name them in target_parameters, such as "
        f"{stacks[:4]}"
    )


def _check_statistics(base: LiveBase, saved: Sequence[str]) -> None:
    """Refuse to train whole what keeps statistics, as batch norms do.

    Raises:
        UnsupportedError: a module to save does; in training it would change the base's.
    """
    whole = [(p, m) for p, m in modules_of(base) if any(p.endswith(entry) for entry in saved)]
    problems = [
        Problem("a module with statistics cannot be trained whole", path,
                found=", ".join(sorted(each for each, _ in module.named_buffers())[:3]),
                hint="Leave it out of modules_to_save, or train with PEFT")
        for path, module in whole
        if module.state_dict().keys() & {name for name, _ in module.named_buffers()}
    ]  # fmt: skip
    if problems:
        raise UnsupportedError(problems)


def _both_sides(base: LiveBase, saved: Sequence[str] | None) -> list[str] | None:
    """Return modules that are trained whole, with the other side of each that is tied."""
    found = list(saved or ())
    for name, owner in base.tied.items():
        sides = [side.removesuffix(".weight") for side in (owner, name)]
        if any(side.endswith(entry) for side in sides for entry in saved or ()):
            found += [s for s in sides if not any(s.endswith(entry) for entry in found)]
    return found or None


def modules_of(base: LiveBase) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module but the model itself, by the first of its names."""
    for path, module in base.modules.items():
        if path and base.canonical(path) == path:
            yield path, module


def _all_linear(base: LiveBase, fields: Mapping[str, Any]) -> list[str]:
    """Return names that select all linear layers but the output head, and nothing else."""
    left_out = _head(base, fields)
    inner = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # these do not run their layers
    chosen: list[str] = []
    others: list[str] = []
    for path, module in modules_of(base):
        parent = base.modules.get(path.rpartition(".")[0])
        linear = kind_of(module) in (LINEAR, CONV1D) and not isinstance(parent, inner)
        (chosen if linear and path != left_out else others).append(path)
    if not chosen:
        raise MismatchError(
            "the model has no linear layers to adapt", where=type(base.model).__name__,
            hint="Name target_modules instead of 'all-linear'",
        )  # fmt: skip
    return shortest_names(chosen, others)


def shortest_names(chosen: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the shortest ends of names by which the chosen are told from the others, sorted."""
    taken = {suffix for name in others for suffix in suffixes_of(name)}
    found: set[str] = set()
    for name in chosen:
        suffixes = list(suffixes_of(name))
        if found.isdisjoint(suffixes):
            free = [suffix for suffix in suffixes if suffix not in taken]
            found.add(free[-1] if free else name)
    return sorted(found)


def _head(base: LiveBase, fields: Mapping[str, Any]) -> str | None:
    """Return the module that all-linear leaves out: the output embedding, or the classifier."""
    model: Any = base.model
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None and fields.get("task_type") == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return next((path for path, module in base.modules.items() if module is head), None)


def _by_architecture(base: LiveBase, fields: Mapping[str, Any]) -> list[str] | str:
    """Return PEFT's own targets for a model.

    Raises:
        UsageError: PEFT is not installed, or has none.
    """
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
    except ImportError:
        KNOWN = {}
    kind = str((base.config or {}).get("model_type"))
    if kind not in KNOWN:
        raise UsageError(
            "the config does not say what to adapt", where="target_modules",
            expected="names of modules, or 'all-linear'", found=repr(fields.get("target_modules")),
        )  # fmt: skip
    found = KNOWN[kind]
    return found if isinstance(found, str) else list(found)


def nothing_selected(base: LiveBase, settings: LoraSettings) -> MismatchError:
    """Return the error of a config that selects nothing, with names that come near."""
    wanted = settings.target_modules or settings.target_parameters
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    leaves = {p.rpartition(".")[2] for p, m in modules_of(base) if kind_of(m) is not None}
    near = [n for name in names for n in _near(name.rpartition(".")[2], leaves)]
    shown = list(dict.fromkeys(near)) or sorted(leaf for leaf in leaves if not leaf.isdecimal())
    hint = f"The model's nearest names: {', '.join(shown[:_SHOWN])}"
    return MismatchError(
        "the config selects nothing in this model", where=type(base.model).__name__,
        found=", ".join(names[:_SHOWN]), hint=hint,
    )  # fmt: skip


def _near(name: str, leaves: set[str]) -> list[str]:
    return difflib.get_close_matches(name, sorted(leaves), n=3, cutoff=0.5)
