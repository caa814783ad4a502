"""A LoRA adapter's settings, from its ``adapter_config.json``, and what they mean for a module."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from regraft.adapters import expert_layout
from regraft.adapters.known_settings import unknown_settings
from regraft.adapters.patterns import (
    BELOW,
    LAYER,
    SUFFIX,
    WHOLE,
    BadExpressionError,
    Expressions,
    FirstMatch,
    is_segment,
    suffixes_of,
)
from regraft.adapters.wrappers import plain_config
from regraft.errors import AdapterError, Problem, RegraftError, UnsupportedError
from regraft.formats.problems import capped, quoted

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True)
class LoraSettings:
    """The fields of PEFT's ``LoraConfig`` that decide what a merge is; names are PEFT's.

    ``expressions`` is not PEFT's: it matches the regular expressions among them within limits, and
    every method that asks it raises ``AdapterError`` where they take too long. ``b_layouts`` is
    Unsloth's, see :mod:`regraft.adapters.expert_layout`; ``unknown`` are names of settings that
    are switched on and not known.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    bias: str
    lora_bias: bool
    init_lora_weights: str | bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...]
    ensure_weight_tying: bool
    base_model_name_or_path: str | None
    task_type: str | None
    base_model_class: str | None
    peft_version: str | None
    b_layouts: expert_layout.Layouts
    unknown: tuple[str, ...]
    expressions: Expressions = field(compare=False, repr=False)

    def rank_of(self, key: str) -> int:
        """Return r for a module (or parameter) name: the first rank pattern that matches it."""
        return self._ranks.find(key, self.r)

    def alpha_of(self, key: str) -> float:
        """Return alpha for a module (or parameter) name."""
        return self._alphas.find(key, self.lora_alpha)

    @property
    def begins_with_base(self) -> bool:
        """Whether training began with factors of the base's own weight, which were taken out of it.

        PiSSA and OLoRA do: what is left of the base is computed from the factors and their scale.
        """
        return str(self.init_lora_weights).lower().startswith(("pissa", "olora"))

    def scale_of(self, key: str, weight: float = 1.0) -> float:
        """Return weight * alpha / r, or over sqrt(r) for rsLoRA (Kalajdzievski 2023), in float64.

        The order is part of the arithmetic contract: the product first, then the quotient.
        """
        rank, alpha = self.rank_of(key), weight * self.alpha_of(key)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def b_layout_of(self, key: str) -> str:
        """Return how B of the stack of experts ``key`` is packed."""
        return expert_layout.layout_of(self.b_layouts, key)

    def saves(self, parameter: str) -> bool:
        """Whether a parameter lies in a module that ``modules_to_save`` copies.

        PEFT copies every module whose name ends with an entry, dot or no dot before it.
        """
        if not self.modules_to_save:
            return False
        segments = parameter.split(".")[:-1]
        modules = [".".join(segments[:n]) for n in range(1, len(segments) + 1)]
        return any(map(self._ends_with_saved, modules))

    def targets(self, module: str) -> bool:
        """Whether ``target_modules`` and its limits select a module, by PEFT's rules."""
        if self._excludes(module) or self._keeps_whole(module):
            return False
        wanted = self.target_modules
        if wanted is None:
            return not self.target_parameters
        if isinstance(wanted, str):
            return wanted.lower() == "all-linear" or self.expressions.fullmatch(wanted, module)
        if module in self._wanted:
            return True
        return _has_suffix(module, self._wanted) and self._in_layers(module)

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Return the names of the parameters of ``module`` that ``target_parameters`` selects."""
        if not self.target_parameters:
            return ()
        found = [entry for owner in suffixes_of(module) for entry in self._leaves.get(owner, ())]
        found += self._leaves.get("", ()) if module and not module.endswith(".") else ()
        return tuple(dict.fromkeys(leaf for _, leaf in sorted(found)))

    @cached_property
    def _ranks(self) -> FirstMatch[int]:
        return FirstMatch(self.rank_pattern, self.expressions)

    @cached_property
    def _alphas(self) -> FirstMatch[float]:
        return FirstMatch(self.alpha_pattern, self.expressions)

    @cached_property
    def _wanted(self) -> frozenset[str]:
        return frozenset(self.target_modules or ())

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude_modules or ())

    @cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self.modules_to_save)

    @cached_property
    def _saved_lengths(self) -> list[int]:
        return sorted({len(entry) for entry in self.modules_to_save})

    @cached_property
    def _saved_segments(self) -> frozenset[str]:
        """The entries of ``modules_to_save`` that are one segment of a name and nothing else."""
        return frozenset(filter(is_segment, self.modules_to_save))

    @cached_property
    def _saved_expressions(self) -> tuple[str, ...]:
        return tuple(self._saved - self._saved_segments)

    @cached_property
    def _leaves(self) -> dict[str, list[tuple[int, str]]]:
        """The parameters that ``target_parameters`` names, numbered, by their module."""
        leaves: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for number, target in enumerate(self.target_parameters):
            owner, _, leaf = target.rpartition(".")
            leaves[owner].append((number, leaf))
        return leaves

    def _ends_with_saved(self, module: str) -> bool:
        lengths = (n for n in self._saved_lengths if n <= len(module))
        return any(module[len(module) - n :] in self._saved for n in lengths)

    def _keeps_whole(self, module: str) -> bool:
        """Whether ``modules_to_save`` keeps LoRA off a module, by PEFT's rule for that."""
        if not self._saved_segments.isdisjoint(module.split(".")):
            return True
        return any(self.expressions.match(m, module, BELOW) for m in self._saved_expressions)

    def _excludes(self, module: str) -> bool:
        excluded = self.exclude_modules
        if not excluded:
            return False
        if isinstance(excluded, str):
            return self.expressions.fullmatch(excluded, module)
        return _has_suffix(module, self._excluded)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        for pattern in self.layers_pattern:
            if match := self.expressions.match(pattern, module, LAYER):
                return int(match["idx"]) in self._layers
        if self.layers_pattern:
            return False
        first = _FIRST_NUMBER.match(module)
        return first is not None and int(first["idx"]) in self._layers

    @cached_property
    def _layers(self) -> frozenset[int]:
        return frozenset(self.layers_to_transform)


def _has_suffix(module: str, names: frozenset[str]) -> bool:
    """Return whether a module, or what follows one of its dots, is among the names."""
    return any(suffix in names for suffix in suffixes_of(module))


def _shown(value: object) -> str:
    """Return a short literal of a value from the config."""
    return _SHORT.repr(value)[:_SHOWN_CHARACTERS]


_SHOWN_CHARACTERS = 80
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = _SHOWN_CHARACTERS


class _Fields:
    """Reads typed fields from a config and collects everything that is wrong with it."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where, self.problems = config, where, list[Problem]()
        self.expressions = Expressions(where)

    def get(self, name: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.bad(name, " or ".join(kind.__name__ for kind in kinds), _shown(value))
            return default
        return value

    def bad(self, name: str, expected: str, found: str) -> None:
        self.problems.append(
            Problem(
                f"bad value for {name!r}", self.where, expected, found, "Fix adapter_config.json"
            )
        )

    def names(self, name: str, within: str | None = None) -> tuple[str, ...]:
        """Return a list of names; ``within`` is the expression that each becomes a part of."""
        value = self.get(name, (list, str), [])
        value = [value] if isinstance(value, str) else value
        if not all(isinstance(item, str) for item in value):
            self.bad(name, "a list of names", _shown(value))
            return ()
        if within:
            for item in value:
                self.pattern(name, item, within)
        return tuple(value)

    def regex_or_names(self, name: str) -> str | tuple[str, ...] | None:
        value = self.config.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            self.pattern(name, value)
            return value
        return self.names(name)

    def pattern(self, name: str, pattern: str, within: str = WHOLE) -> None:
        try:
            self.expressions.add(pattern, within)
        except BadExpressionError as error:
            self.bad(name, "a regular expression", f"{_shown(pattern)} ({error})")

    def patterns(self, name: str, kind: _Number) -> tuple[tuple[str, Any], ...]:
        value = self.get(name, (dict,), {})
        for pattern, number in value.items():
            self.pattern(name, pattern, SUFFIX)
            if not kind.fits(number):
                self.bad(f"{name}[{_shown(pattern)}]", kind.expected, _shown(number))
        return tuple(value.items())

    def number(self, name: str, kind: _Number, default: Any) -> Any:
        value = self.get(name, kind.kinds, default)
        if not kind.fits(value):
            self.bad(name, kind.expected, _shown(value))
            return default
        return value


@dataclass(frozen=True)
class _Number:
    """What a number has to be, and in words."""

    kinds: tuple[type, ...]
    least: float
    expected: str

    def fits(self, value: Any) -> bool:
        is_number = isinstance(value, self.kinds) and not isinstance(value, bool)
        return is_number and self.least <= value <= sys.float_info.max


_RANK = _Number((int,), 1, "a positive whole number")
_ALPHA = _Number((int, float), -sys.float_info.max, "a finite number")
"""PEFT takes any alpha; a negative one takes away what was learned, and 0 leaves the base."""


def _token_indices(fields: _Fields) -> tuple[tuple[str, tuple[int, ...]], ...]:
    value = fields.get("trainable_token_indices", (list, dict), {})
    by_module = value if isinstance(value, dict) else {"": value}
    for indices in by_module.values():
        good = isinstance(indices, list) and all(map(_is_row, indices))
        if not good or len(set(indices)) < len(indices):
            expected = "lists of row numbers, each once"
            fields.bad("trainable_token_indices", expected, _shown(indices))
            return ()
    return tuple((module, tuple(indices)) for module, indices in by_module.items() if indices)


def _is_row(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _layers(fields: _Fields) -> tuple[int, ...]:
    value = fields.get("layers_to_transform", (list, int), [])
    value = [value] if isinstance(value, int) else value
    if not all(type(item) is int for item in value):
        fields.bad("layers_to_transform", "layer numbers", _shown(value))
        return ()
    return tuple(value)


def read_settings(config: Mapping[str, Any], where: str) -> LoraSettings:
    """Return the settings in an ``adapter_config.json``.

    Args:
        config: the parsed file.
        where: how messages name it.

    Raises:
        UnsupportedError: a feature that cannot be merged, by name; all of them at once.
        AdapterError: fields of the wrong type or value; all of them at once.
    """
    refused = [Problem(what, where, hint=hint) for what, hint in refusals(config)]
    if refused:
        raise UnsupportedError(refused)
    fields = _Fields(plain_config(config), where)
    auto = _Fields(fields.get("auto_mapping", (dict,), {}), where)
    auto.problems = fields.problems
    layouts, wrong = expert_layout.read_layouts(config)
    for name, expected, found in wrong:
        fields.bad(name, expected, _shown(found))
    settings = LoraSettings(
        r=fields.number("r", _RANK, 8),
        lora_alpha=fields.number("lora_alpha", _ALPHA, 8),
        use_rslora=fields.get("use_rslora", (bool,), False),
        use_dora=fields.get("use_dora", (bool,), False),
        fan_in_fan_out=fields.get("fan_in_fan_out", (bool,), False),
        bias=fields.get("bias", (str,), "none"),
        lora_bias=fields.get("lora_bias", (bool,), False),
        init_lora_weights=fields.get("init_lora_weights", (bool, str), True),
        rank_pattern=fields.patterns("rank_pattern", _RANK),
        alpha_pattern=fields.patterns("alpha_pattern", _ALPHA),
        target_modules=fields.regex_or_names("target_modules"),
        exclude_modules=fields.regex_or_names("exclude_modules"),
        target_parameters=fields.names("target_parameters"),
        modules_to_save=fields.names("modules_to_save", BELOW),
        layers_to_transform=_layers(fields),
        layers_pattern=fields.names("layers_pattern", LAYER),
        trainable_token_indices=_token_indices(fields),
        ensure_weight_tying=fields.get("ensure_weight_tying", (bool,), False),
        base_model_name_or_path=fields.get("base_model_name_or_path", (str,), None),
        task_type=fields.get("task_type", (str,), None),
        base_model_class=auto.get("base_model_class", (str,), None),
        peft_version=fields.get("peft_version", (str,), None),
        b_layouts=layouts,
        unknown=unknown_settings(config),
        expressions=fields.expressions,
    )
    if fields.problems:
        raise AdapterError(capped(fields.problems, Path(where)))
    return settings


RESAVE = (
    "Save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), "
    "given the adapter as it was saved before training: that makes a plain LoRA of it, then merge "
    "that"
)
"""What to do with a PiSSA, OLoRA, CorDA or LoRA-GA adapter, whose base was changed at its start.

PEFT converts these four alone, and their A and B alone: DoRA's magnitudes are lost on the way.
"""

_WITH_PEFT = "Merge it with PEFT's merge_and_unload()"

_LOFTQ_BASE = (
    "Name the base that LoftQ left as BASE (the model that was saved when training began), and set "
    "init_lora_weights to true in a copy of the adapter"
)

_CHANGED_BASES = {
    "corda": (
        "CorDA changed the base at its start by statistics of data that are not in the file", RESAVE
    ),
    "loftq": ("LoftQ replaced the base by a quantized one when training began", _LOFTQ_BASE),
    "lora_ga": ("LoRA-GA changed the base by gradients that are not in the file", RESAVE),
}  # fmt: skip

_REFUSED_FEATURES: dict[str, tuple[str, str]] = {
    "alora_invocation_tokens": (
        "aLoRA is active only after its invocation tokens, so no single weight can stand for it",
        "Serve it as an adapter instead (PEFT, vLLM)",
    ),
    "arrow_config": (
        "Arrow routes every token to other adapters, so no single weight can stand for it",
        "Merge its expert adapters one by one, or serve it with PEFT",
    ),
    "use_qalora": (
        "QALoRA pools its inputs by group, which a plain weight cannot express",
        "Merge it into its GPTQ zero points with the tool that trained it",
    ),
    "layer_replication": (
        "layer_replication builds a model with repeated layers, which this base does not have",
        "Save the replicated model as a base of its own first, then merge into that",
    ),
    "use_bdlora": (
        "BD-LoRA keeps block-diagonal factors, which regraft does not merge",
        _WITH_PEFT,
    ),
    "kasa_config": (
        "KaSA cut the base's smallest singular values when training began",
        "Merge it with PEFT on the machine and base it was trained on",
    ),
    "monteclora_config": (
        "MonteCLoRA samples its factors, which regraft does not merge",
        f"{_WITH_PEFT}, which takes their means",
    ),
    "enable_lora": (
        "enable_lora splits the factors of a fused layer, as PEFT did before 0.3",
        "Load it with the PEFT that trained it and merge it there",
    ),
    "megatron_config": (
        "Megatron's parallel layers name and split their weights in their own way",
        "Export the adapter to plain PEFT format with Megatron's converter first",
    ),
}

_PROMPT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT",
                 "MULTITASK_PROMPT_TUNING", "CARTRIDGE")  # fmt: skip


def refusals(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return ``(what, what to do instead)`` for everything in a config that cannot be merged."""
    kind = config.get("peft_type")
    if kind is None:
        return [("adapter_config.json has no 'peft_type'", "Is this a PEFT adapter?")]
    if kind != "LORA":
        return [_refused_type(str(kind))]
    found = [reason for name, reason in _REFUSED_FEATURES.items() if config.get(name)]
    init = config.get("init_lora_weights")
    if isinstance(init, str):
        found += [
            (f"init_lora_weights={_shown(init)}: {why}", way_on)
            for prefix, (why, way_on) in _CHANGED_BASES.items()
            if init.lower().startswith(prefix)
        ]
        if config.get("use_dora") and init.lower().startswith(("pissa", "olora")):
            what = f"init_lora_weights={_shown(init)} together with DoRA"
            found.append((what, f"{_WITH_PEFT}, on the base that it was trained on"))
        known = ("gaussian", "eva", "olora", "pissa", "orthogonal", "mica", *_CHANGED_BASES)
        if not init.lower().startswith(known):
            what = f"init_lora_weights={_shown(init)} is not known to regraft"
            found.append((what, "Merge it with the PEFT that trained it, or update regraft"))
    return found


def _refused_type(peft_type: str) -> tuple[str, str]:
    plain = peft_type.isidentifier() and len(peft_type) <= _SHOWN_CHARACTERS
    kind = peft_type if plain else quoted(peft_type)
    if kind in _PROMPT_TYPES:
        return (
            f"peft_type {kind} adds prompts or attention to the model and changes no weight",
            "It cannot be merged into weights by anyone; serve it with PEFT",
        )
    return (
        f"peft_type {kind} is not LoRA",
        "Merge it with PEFT's merge_and_unload(), or convert it with peft.convert_to_lora first",
    )


def refusal_error(config: Mapping[str, Any], where: str) -> RegraftError | None:
    """Return the error :func:`read_settings` would raise for refused features, if any."""
    found = [Problem(what, where, hint=hint) for what, hint in refusals(config)]
    return UnsupportedError(found) if found else None
