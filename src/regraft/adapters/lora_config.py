"""The config of an adapter that is to be trained, in PEFT's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from regraft.adapters.settings import refusals
from regraft.errors import Problem, UnsupportedError, UsageError
from regraft.formats.problems import quoted

BIASES = ("none", "all", "lora_only")
STARTS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
"""What ``init_lora_weights`` can be here."""

_ABOUT = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": False,
    "peft_type": "LORA", "revision": None,
}  # fmt: skip
"""Fields of PEFT's file that say nothing about what is trained."""

PEFT_LAYOUT = "0.19.1"
"""The release of PEFT from which on stacks of experts lie as regraft writes them."""

VELORA = (
    "VeLoRA has a backward pass of its own, which regraft does not have",
    "Train it with PEFT; regraft merges and serves what was trained",
)
"""Why VeLoRA is not trained, and what to do instead."""

_WITHOUT_EFFECT = (
    *_ABOUT, "peft_version", "runtime_config", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip
"""PEFT's fields that only matter beside another one, which is looked at."""


@dataclass(frozen=True)
class LoraConfig:
    """What to train: PEFT's ``LoraConfig``, as far as regraft trains it, with PEFT's defaults.

    Attributes:
        r: rank.
        lora_alpha: the delta is scaled by lora_alpha / r.
        target_modules: names, which a module's name is or ends with; a regular expression for the
            whole name; or ``"all-linear"``: all linear layers but the output head. If None, PEFT's
            choice for the architecture, where PEFT is installed.
        exclude_modules: modules that are left out, in the same way.
        lora_dropout: on the input of A, in training.
        bias: which of the base's biases are trained: ``"none"``, ``"all"``, ``"lora_only"``.
        use_rslora: scale by lora_alpha / sqrt(r) (Kalajdzievski 2023).
        use_dora: train magnitudes too (Liu et al. 2024).
        lora_bias: B has a bias.
        modules_to_save: modules that are trained whole, on a copy.
        init_lora_weights: True: A as a linear layer begins, B zero. ``"gaussian"``: A normal with
            deviation 1 / r. False: B random too. ``"orthogonal"``: A and B from the odd and even
            rows of an orthogonal matrix. ``"pissa"``, ``"olora"``: from the weight.
        rank_pattern: rank by name or expression, where it is not ``r``.
        alpha_pattern: alpha by name or expression.
        layers_to_transform: numbers of the layers that are adapted.
        layers_pattern: the name of the list of layers.
        target_parameters: parameters that are adapted themselves, such as those of experts.
        trainable_token_indices: rows of the input embedding, or of embeddings by name, that are
            trained.
        ensure_weight_tying: whether both sides of a tie stay one.
        fan_in_fan_out: whether weights are (in, out); told by the layer, and kept for PEFT.
        task_type: ``"CAUSAL_LM"`` and the like; classifiers and heads of question answering are
            then trained whole.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False
    task_type: str | None = None

    def __post_init__(self) -> None:
        problems = [
            Problem(f"bad value for {name!r}", "LoraConfig", expected, quoted(getattr(self, name)))
            for name, good, expected in self._checks()
            if not good
        ]
        if problems:
            raise UsageError(problems)

    def _checks(self) -> tuple[tuple[str, bool, str], ...]:
        by_expression = isinstance(self.target_modules, str)
        return (
            ("r", type(self.r) is int and self.r > 0, "a positive number"),
            ("lora_alpha", _is_number(self.lora_alpha) and self.lora_alpha > 0,
             "a positive number"),
            ("lora_dropout", _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
             "a share from 0 to below 1"),
            ("bias", self.bias in BIASES, " or ".join(BIASES)),
            ("init_lora_weights", _is_start(self.init_lora_weights),
             " or ".join(map(repr, STARTS))),
            ("lora_bias", not self.lora_bias or isinstance(self.init_lora_weights, bool),
             "False, as PEFT has it only with init_lora_weights=True or False"),
            ("layers_to_transform", self.layers_to_transform is None or not by_expression,
             "None, as target_modules is an expression, which can name the layers itself"),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as ``adapter_config.json`` has them."""
        written_as = {"peft_version": PEFT_LAYOUT} if self.target_parameters else {}
        return {
            **_ABOUT,
            **written_as,
            **{key: as_json(value) for key, value in asdict(self).items()},
        }


def as_config(config: LoraConfig | Mapping[str, Any] | Any) -> LoraConfig:
    """Return a config of regraft's for one of PEFT's, or a mapping of its fields.

    Raises:
        UnsupportedError: it asks for what regraft does not train.
        UsageError: it has unknown fields or bad values, or is no config.
    """
    if isinstance(config, LoraConfig):
        return config
    given = config if isinstance(config, Mapping) else _fields_of(config)
    given = {key: as_json(value) for key, value in given.items()}
    refused = [Problem(what, "LoraConfig", hint=hint) for what, hint in _refused(given)]
    if refused:
        raise UnsupportedError(refused)
    known = {each.name for each in fields(LoraConfig)}
    unknown = [key for key in given if key not in known and key not in _WITHOUT_EFFECT]
    wrong = [key for key in unknown if given[key]]
    if wrong:
        raise UsageError(
            "the config has fields that regraft does not know", where="LoraConfig",
            found=", ".join(map(quoted, wrong)), hint="Leave them out, or train with PEFT",
        )  # fmt: skip
    return LoraConfig(**{key: value for key, value in given.items() if key in known})


def _fields_of(config: Any) -> Mapping[str, Any]:
    if not hasattr(config, "to_dict"):
        raise UsageError(
            "this is no config of an adapter", found=type(config).__name__,
            expected="regraft.LoraConfig, peft.LoraConfig, or a mapping of their fields",
        )  # fmt: skip
    found: Mapping[str, Any] = config.to_dict()
    return found


def _refused(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what regraft does not train, and what to do instead."""
    found = refusals({"peft_type": "LORA", **config})
    if config.get("velora_config"):
        found.append(VELORA)
    start = config.get("init_lora_weights", True)
    if not found and not _is_start(start):
        found.append(
            (f"init_lora_weights={quoted(start)} is not trained from here",
             f"Use one of {', '.join(map(repr, STARTS))}, or train with PEFT")
        )  # fmt: skip
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_start(value: object) -> bool:
    return isinstance(value, bool | str) and value in STARTS


def as_json(value: Any) -> Any:
    """Return a value of a config as JSON has it; sets become sorted lists, what is none stays."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(as_json(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [as_json(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    return value
