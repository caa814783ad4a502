"""The config of an adapter with other ranks, read as PEFT and as regraft read it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.toys import adapter_config
from regraft.adapters.pattern_making import patterns
from regraft.adapters.settings import LoraSettings, read_settings
from regraft.shrinking.config import with_ranks

NAMES = st.lists(
    st.text("ab._", min_size=1, max_size=6).filter(lambda name: not name.startswith(".")),
    min_size=1,
    max_size=8,
    unique=True,
)


def looked_up(found: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return what PEFT finds for a name: its ``get_pattern_key``, in its own words."""
    for key in found:
        if re.match(rf"(.*\.)?({key})$", name):
            return found.get(key, default)
    return found.get(name, default)


@pytest.mark.slow
@given(NAMES, st.data())
def test_every_name_gets_its_value_whatever_the_others_are_called(
    names: list[str], data: st.DataObject
) -> None:
    values = {name: data.draw(st.integers(1, 3)) for name in names}
    found = patterns(values, 1)
    assert {name: looked_up(found, name, 1) for name in names} == values


def test_a_name_that_ends_another_one_comes_after_it() -> None:
    values = {"q": 2, "layers.q": 4, "up.layers.q": 3, "layers_q": 4, "layers.k": 4}
    found = patterns(values, 4)
    assert list(found) == ["up.layers.q", "layers.q", "q"]
    assert {name: looked_up(found, name, 4) for name in values} == values


def test_of_names_that_differ_in_a_dot_the_one_without_comes_first() -> None:
    values = {"a.b": 2, "a_b": 3}
    found = patterns(values, 1)
    assert {name: looked_up(found, name, 1) for name in values} == values


def test_signs_of_expressions_in_a_name_stand_for_themselves() -> None:
    values = {"a+b": 2, "aab": 3, "a(b": 4}
    found = patterns(values, 1)
    assert {name: looked_up(found, name, 1) for name in values} == values


def test_values_that_are_all_the_default_need_no_pattern() -> None:
    assert patterns({"a.q": 4, "q": 4}, 4) == {}


# -- the whole config

MODULES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qkv"]
OLD: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 12,
    "rank_pattern": {".*layers\\.0.*": 9, "v_proj": 8},
    "alpha_pattern": {"k_proj": 7.5},
    "made_up_key": {"kept": [1, None]},
}


def settings_of(config: Mapping[str, Any]) -> LoraSettings:
    """Return what a config means."""
    return read_settings(config, "the config")


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
@given(data=st.data())
def test_ranks_are_as_asked_and_scales_stay(rslora: bool, data: st.DataObject) -> None:
    config = adapter_config(**OLD, use_rslora=rslora)
    old = settings_of(config)
    ranks = {name: data.draw(st.integers(1, old.rank_of(name))) for name in MODULES}
    changed = with_ranks(config, old, ranks)
    new = settings_of(changed)
    for name, rank in ranks.items():
        assert new.rank_of(name) == rank
        assert looked_up(changed["rank_pattern"], name, changed["r"]) == rank
        assert math.isclose(new.scale_of(name), old.scale_of(name), rel_tol=1e-14)
        alpha = looked_up(changed["alpha_pattern"], name, changed["lora_alpha"])
        assert math.isclose(
            alpha / (math.sqrt(rank) if rslora else rank), old.scale_of(name), rel_tol=1e-14
        )
    assert changed["r"] == max(ranks.values())


def test_all_other_keys_stay_in_their_order() -> None:
    config = adapter_config(**OLD)
    changed = with_ranks(config, settings_of(config), dict.fromkeys(MODULES, 4))
    ours = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    assert list(changed) == list(config)
    assert {k: v for k, v in changed.items() if k not in ours} == {
        k: v for k, v in config.items() if k not in ours
    }


def test_one_rank_for_all_is_said_in_two_numbers() -> None:
    config = adapter_config(r=16, lora_alpha=32)
    changed = with_ranks(config, settings_of(config), dict.fromkeys(MODULES, 6))
    assert changed == config | {"r": 6, "lora_alpha": 12}
    assert isinstance(changed["lora_alpha"], int)


def test_without_patterns_the_scale_is_that_of_every_module() -> None:
    config = adapter_config(r=16, lora_alpha=24)
    ranks = {name: 3 + number for number, name in enumerate(MODULES)}
    changed = with_ranks(config, settings_of(config), ranks)
    assert changed["lora_alpha"] / changed["r"] == 1.5
    assert changed["r"] == 11


@pytest.mark.parametrize(("rank", "init"), [(4, "orthogonal"), (3, True)])
def test_an_odd_rank_is_not_to_be_drawn_as_orthogonal(rank: int, init: str | bool) -> None:
    config = adapter_config(r=16, init_lora_weights="orthogonal")
    changed = with_ranks(config, settings_of(config), dict.fromkeys(MODULES, rank))
    assert changed["init_lora_weights"] == init
