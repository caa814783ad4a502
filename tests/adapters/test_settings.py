"""An adapter's config is read field by field, and everything wrong with it is said at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from merging.toys import adapter_config, read_json
from regraft.adapters.settings import LoraSettings, read_settings, refusal_error
from regraft.errors import AdapterError, UnsupportedError

WHERE = "adapter/adapter_config.json"


def settings(**fields: Any) -> LoraSettings:
    """Read a config of rank 3 and alpha 6 with these fields."""
    return read_settings(adapter_config(**fields), WHERE)


def test_a_config_that_peft_saves_is_read_as_it_was_meant(tmp_path: Path) -> None:
    config = LoraConfig(
        r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"], exclude_modules=["lm_head"],
        use_rslora=True, use_dora=True, bias="lora_only", lora_bias=False, fan_in_fan_out=True,
        modules_to_save=["score"], layers_to_transform=[1, 3], layers_pattern="layers",
        rank_pattern={"q_proj": 2}, alpha_pattern={"^model.*": 1.5}, init_lora_weights="gaussian",
        trainable_token_indices={"embed_tokens": [4, 9]}, target_parameters=["experts.down_proj"],
        ensure_weight_tying=True, task_type="CAUSAL_LM", base_model_name_or_path="org/base",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = read_settings(read_json(tmp_path / "adapter_config.json"), WHERE)
    assert (found.r, found.lora_alpha, found.use_rslora, found.use_dora) == (5, 7, True, True)
    assert sorted(found.target_modules or ()) == ["q_proj", "v_proj"]
    assert found.exclude_modules == ("lm_head",)
    assert (found.bias, found.lora_bias, found.fan_in_fan_out) == ("lora_only", False, True)
    assert found.modules_to_save == ("score",)
    assert (found.layers_to_transform, found.layers_pattern) == ((1, 3), ("layers",))
    assert found.rank_pattern == (("q_proj", 2),)
    assert found.alpha_pattern == (("^model.*", 1.5),)
    assert found.trainable_token_indices == (("embed_tokens", (4, 9)),)
    assert found.target_parameters == ("experts.down_proj",)
    assert (found.init_lora_weights, found.ensure_weight_tying) == ("gaussian", True)
    assert (found.task_type, found.base_model_name_or_path) == ("CAUSAL_LM", "org/base")


def test_what_is_left_out_has_pefts_default() -> None:
    found, default = read_settings({"peft_type": "LORA"}, WHERE), LoraConfig()
    assert (found.r, found.lora_alpha) == (default.r, default.lora_alpha)
    assert (found.use_rslora, found.use_dora) == (default.use_rslora, default.use_dora)
    assert (found.bias, found.lora_bias) == (default.bias, default.lora_bias)
    assert found.fan_in_fan_out is default.fan_in_fan_out
    assert found.init_lora_weights is default.init_lora_weights
    assert (found.target_modules, found.modules_to_save) == (None, ())


def test_null_is_the_default_too() -> None:
    nulls = dict.fromkeys(adapter_config(), None) | {"peft_type": "LORA"}
    assert read_settings(nulls, WHERE) == read_settings({"peft_type": "LORA"}, WHERE)


def test_a_single_name_or_number_stands_for_a_list() -> None:
    found = settings(layers_to_transform=0, layers_pattern="h", modules_to_save="score")
    assert (found.layers_to_transform, found.layers_pattern) == ((0,), ("h",))
    assert found.modules_to_save == ("score",)


def test_token_indices_may_be_a_list_or_lists_by_module() -> None:
    assert settings(trainable_token_indices=[3, 1]).trainable_token_indices == (("", (3, 1)),)
    by_module = {"embed_tokens": [5], "lm_head": [], "wte": [0, 7]}
    found = settings(trainable_token_indices=by_module).trainable_token_indices
    assert found == (("embed_tokens", (5,)), ("wte", (0, 7)))


POSITIVE, FINITE = "a positive whole number", "a finite number"
REGEX, ROWS = "a regular expression", "lists of row numbers"
Q = "rank_pattern['q']"

BAD: list[tuple[str, Any, str, str, str]] = [
    ("r", "8", "'r'", "int", "'8'"),
    ("r", 2.5, "'r'", "int", "2.5"),
    ("r", True, "'r'", "int", "True"),
    ("r", 0, "'r'", POSITIVE, "0"),
    ("r", -4, "'r'", POSITIVE, "-4"),
    ("r", 10**400, "'r'", POSITIVE, "10000"),
    ("lora_alpha", math.inf, "'lora_alpha'", FINITE, "inf"),
    ("lora_alpha", -math.inf, "'lora_alpha'", FINITE, "-inf"),
    ("lora_alpha", math.nan, "'lora_alpha'", FINITE, "nan"),
    ("lora_alpha", -(10**400), "'lora_alpha'", FINITE, "-10000"),
    ("use_dora", "yes", "'use_dora'", "bool", "'yes'"),
    ("use_rslora", 1, "'use_rslora'", "bool", "1"),
    ("bias", ["all"], "'bias'", "str", "['all']"),
    ("target_modules", [1, "q"], "'target_modules'", "a list of names", "[1, 'q']"),
    ("target_modules", "(", "'target_modules'", REGEX, "'('"),
    ("exclude_modules", "[a", "'exclude_modules'", REGEX, "'[a'"),
    ("modules_to_save", {"a": 1}, "'modules_to_save'", "list or str", "{'a': 1}"),
    ("modules_to_save", ["head("], "'modules_to_save'", REGEX, "'head('"),
    ("layers_pattern", ["("], "'layers_pattern'", REGEX, "'('"),
    ("layers_to_transform", ["0"], "'layers_to_transform'", "layer numbers", "['0']"),
    ("layers_to_transform", [True], "'layers_to_transform'", "layer numbers", "[True]"),
    ("rank_pattern", [1], "'rank_pattern'", "dict", "[1]"),
    ("rank_pattern", {"*": 4}, "'rank_pattern'", REGEX, "'*'"),
    ("rank_pattern", {"q": "4"}, Q, POSITIVE, "'4'"),
    ("rank_pattern", {"q": 0}, Q, POSITIVE, "0"),
    ("rank_pattern", {"q": 1.5}, Q, POSITIVE, "1.5"),
    ("alpha_pattern", {"(?i)q": 4}, "'alpha_pattern'", REGEX, "'(?i)q'"),
    ("alpha_pattern", {"q": None}, "alpha_pattern['q']", FINITE, "None"),
    ("trainable_token_indices", [-1], "'trainable_token_indices'", ROWS, "[-1]"),
    ("trainable_token_indices", {"e": ["a"]}, "'trainable_token_indices'", ROWS, "['a']"),
    ("trainable_token_indices", [4, 4], "'trainable_token_indices'", "each once", "[4, 4]"),
]
"""A field and a value it cannot have; what is named, expected and found in the one problem."""


@pytest.mark.parametrize(("field", "value", "what", "expected", "found"), BAD)
def test_a_bad_field_is_named_with_what_was_expected(
    field: str, value: Any, what: str, expected: str, found: str
) -> None:
    with pytest.raises(AdapterError) as caught:
        settings(**{field: value})
    (problem,) = caught.value.problems
    assert problem.what.startswith("bad value for ")
    assert what in problem.what
    assert expected in problem.expected
    assert problem.found.startswith(found)
    assert len(problem.found) < 200
    assert (problem.where, problem.hint) == (WHERE, "Fix adapter_config.json")


def test_all_bad_fields_are_listed_at_once() -> None:
    with pytest.raises(AdapterError) as caught:
        settings(r="8", lora_alpha=math.nan, bias=[], rank_pattern={"(": 0}, use_dora=1)
    named = [problem.what.removeprefix("bad value for ") for problem in caught.value.problems]
    assert sorted(name.strip('"') for name in named) == [
        "'bias'", "'lora_alpha'", "'r'", "'rank_pattern'", "'use_dora'", "rank_pattern['(']",
    ]  # fmt: skip


def test_refused_features_come_before_bad_fields() -> None:
    with pytest.raises(UnsupportedError, match="QALoRA"):
        settings(use_qalora=True, r="8")
    error = refusal_error(adapter_config(use_qalora=True), WHERE)
    assert isinstance(error, UnsupportedError)
    assert refusal_error(adapter_config(), WHERE) is None


def test_scales_are_alpha_over_r_or_its_root() -> None:
    found = settings(r=8, lora_alpha=12, rank_pattern={"k": 3}, alpha_pattern={"v": 5, "k": 7})
    assert [found.scale_of(f"model.{name}") for name in "qkv"] == [12 / 8, 7 / 3, 5 / 8]
    assert found.scale_of("model.q", weight=-0.5) == -0.5 * 12 / 8
    negative = settings(r=8, lora_alpha=-12, alpha_pattern={"v": 0})
    assert [negative.scale_of(f"model.{name}") for name in "qv"] == [-12 / 8, 0.0]
    rooted = settings(r=8, lora_alpha=12, use_rslora=True)
    assert rooted.scale_of("model.q") == 12 / math.sqrt(8)
