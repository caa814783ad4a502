"""Which modules an adapter has, and their ranks, are decided as PEFT decides it: both are asked."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from merging.toys import adapter_config
from regraft.adapters.settings import LoraSettings, read_settings

MODULES = (
    "q_proj", "lm_head", "embed_tokens", "model", "model.embed_tokens", "model.norm",
    "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.xq_proj",
    "model.layers.0.self_attn.q_proj.inner", "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.v_proj", "model.layers.1.mlp.down_proj",
    "model.layers.1.mlp.experts.0.down_proj", "model.layers.11.mlp.experts.1.down_proj",
    "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "h.1.attn.c_attn",
    "encoder.layer.1.attention.self.query", "encoder.layers.2.layers.1.fc",
    "model.language_model.layers.1.self_attn.q_proj", "vision_tower.layers.1.q_proj",
    "classifier", "score", "base.classifier.dense", "myclassifier", "model.layers.1.score_proj",
)  # fmt: skip

TARGETS: tuple[Any, ...] = (
    ["q_proj"], ["q_proj", "v_proj"], ["self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"],
    ["proj"], ["c_attn", "query"], ["model"], [], ["down_proj", "lm_head", "embed_tokens"],
    "q_proj", r".*q_proj", r".*\.(q|v)_proj", r"model\.layers\.\d\..*", r".*layers\.1\..*", ".*",
    r"(?i).*Q_PROJ", "all-linear-ish", "",
)  # fmt: skip

LIMITS: tuple[dict[str, Any], ...] = (
    {},
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": ["model.layers.1.self_attn.q_proj", "score"]},
    {"exclude_modules": r".*layers\.1\..*"},
    {"exclude_modules": []},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"modules_to_save": ["classifier", "score"]},
    {"modules_to_save": ["self_attn"]},
    {"modules_to_save": ["q_proj"], "exclude_modules": ["v_proj"]},
)

LAYERS: tuple[dict[str, Any], ...] = (
    {"layers_to_transform": 1},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [0, 10]},
    {"layers_to_transform": []},
    {"layers_to_transform": 0},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["h", "layer"]},
    {"layers_to_transform": [1], "layers_pattern": []},
    {"layers_to_transform": [1, 2], "layers_pattern": ["nothing", "layers"]},
    {"layers_to_transform": [1], "layers_pattern": "experts"},
)


def both(**fields: Any) -> tuple[LoraConfig, LoraSettings]:
    """Return PEFT's config and ours of the same fields."""
    return LoraConfig(**fields), read_settings(adapter_config(**fields), "adapter_config.json")


def disagreements(config: LoraConfig, settings: LoraSettings) -> list[str]:
    """Return the modules of which one of the two says they are targeted and the other does not."""
    return [
        module
        for module in MODULES
        if bool(check_target_module_exists(config, module)) is not settings.targets(module)
    ]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_and_exclusions_are_pefts(targets: Any) -> None:
    for limits in LIMITS:
        assert disagreements(*both(target_modules=targets, **limits)) == [], limits


@pytest.mark.parametrize("targets", [t for t in TARGETS if isinstance(t, list)], ids=str)
def test_layers_are_chosen_as_peft_does(targets: list[str]) -> None:
    for layers in LAYERS:
        assert disagreements(*both(target_modules=targets, **layers)) == [], layers


def test_the_tables_tell_the_rules_apart() -> None:
    """Most rows select something of their own, or the comparison would prove little."""
    chosen = set()
    for targets in TARGETS:
        _, settings = both(target_modules=targets)
        chosen.add(tuple(map(settings.targets, MODULES)))
    assert len(chosen) >= 14
    layers = set()
    for fields in LAYERS:
        _, settings = both(
            target_modules=["q_proj", "c_attn", "fc", "query", "down_proj"], **fields
        )
        layers.add(tuple(map(settings.targets, MODULES)))
    assert len(layers) >= 6


def test_parameters_alone_target_no_module() -> None:
    config, settings = both(target_modules=None, target_parameters=["experts.down_proj"])
    assert disagreements(config, settings) == []
    assert not any(map(settings.targets, MODULES))


def test_the_words_all_linear_select_every_module_the_file_has() -> None:
    _, settings = both(target_modules="all-linear")
    assert all(map(settings.targets, MODULES))


PATTERNS = (
    {"q_proj": 1}, {"q_proj": 1, "self_attn.q_proj": 2}, {"self_attn.q_proj": 2, "q_proj": 1},
    {"^q_proj": 3}, {"^model.*q_proj": 3, "q_proj": 4}, {r".*\.1\..*": 5, "v_proj": 6},
    {"proj": 7}, {".*proj": 7}, {"model.layers.1.self_attn.q_proj": 8}, {"(q|v)_proj": 9},
    {r"layers\.1\d?\..*": 2, "c_attn": 3}, {"": 4}, {"q_proj$": 5}, {"layers.1.mlp.down_proj": 6},
    {"experts.0.down_proj": 1, "down_proj": 2}, {"h.1.attn.c_attn": 3}, {"lm_head|score": 4},
)  # fmt: skip


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_ranks_and_alphas_are_looked_up_as_peft_does(patterns: dict[str, int]) -> None:
    _, settings = both(
        target_modules=["x"], r=50, lora_alpha=60, rank_pattern=patterns, alpha_pattern=patterns
    )
    for module in MODULES:
        key = get_pattern_key(patterns.keys(), module)
        assert settings.rank_of(module) == patterns.get(key, 50), module
        assert settings.alpha_of(module) == patterns.get(key, 60), module


def test_the_patterns_tell_the_rules_apart() -> None:
    found = set()
    for patterns in PATTERNS:
        _, settings = both(target_modules=["x"], r=50, rank_pattern=patterns)
        found.add(tuple(map(settings.rank_of, MODULES)))
    assert len(found) >= len(PATTERNS) - 2
