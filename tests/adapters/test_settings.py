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


BAD: dict[str, tuple[dict[str, Any], list[tuple[str, str, str]]]] = {
    "a rank in words": ({"r": "8"}, [("'r'", "int", "'8'")]),
    "a rank of zero": ({"r": 0}, [("'r'", "positive number", "0")]),
    "a negative rank": ({"r": -4}, [("'r'", "positive number", "-4")]),
    "half a rank": ({"r": 2.5}, [("'r'", "int", "2.5")]),
    "a rank of true": ({"r": True}, [("'r'", "int", "True")]),
    "an endless rank": ({"r": 10**400}, [("'r'", "positive number", "1000")]),
    "no alpha": ({"lora_alpha": 0}, [("'lora_alpha'", "positive number", "0")]),
    "an infinite alpha": ({"lora_alpha": math.inf}, [("'lora_alpha'", "positive", "inf")]),
    "alpha that is no number": ({"lora_alpha": math.nan}, [("'lora_alpha'", "positive", "nan")]),
    "yes for true": ({"use_dora": "yes"}, [("'use_dora'", "bool", "'yes'")]),
    "1 for true": ({"use_rslora": 1}, [("'use_rslora'", "bool", "1")]),
    "a list of numbers": ({"target_modules": [1, "q"]}, [("'target_modules'", "names", "[1, 'q'")]),
    "names in a dict": ({"modules_to_save": {"a": 1}}, [("'modules_to_save'", "list or str", "{")]),
    "a broken expression": ({"target_modules": "("}, [("'target_modules'", "expression", "'('")]),
    "a broken exclusion": ({"exclude_modules": "[a"}, [("'exclude_modules'", "expression", "'[a'")]),
    "a module to save that PEFT could not search for": (
        {"modules_to_save": ["head("]}, [("'modules_to_save'", "expression", "'head('")]
    ),
    "a layer pattern that PEFT could not search for": (
        {"layers_pattern": ["("]}, [("'layers_pattern'", "expression", "'('")]
    ),
    "a broken rank pattern": ({"rank_pattern": {"*": 4}}, [("'rank_pattern'", "express", "'*'")]),
    "flags inside a pattern": ({"alpha_pattern": {"(?i)q": 4}}, [("'alpha_pattern'", "expr", "(?i)")]),
    "patterns of a wrong kind": ({"rank_pattern": [1]}, [("'rank_pattern'", "dict", "[1]")]),
    "a rank pattern of words": ({"rank_pattern": {"q": "4"}}, [("rank_pattern['q']", "int", "'4'")]),
    "a rank pattern of zero": ({"rank_pattern": {"q": 0}}, [("rank_pattern['q']", "positive", "0")]),
    "a rank pattern of halves": ({"rank_pattern": {"q": 1.5}}, [("rank_pattern['q']", "int", "1.5")]),
    "an alpha pattern of null": (
        {"alpha_pattern": {"q": None}}, [("alpha_pattern['q']", "positive", "None")]
    ),
    "layers in words": ({"layers_to_transform": ["0"]}, [("'layers_to_transform'", "numb", "['0']")]),
    "a layer of true": ({"layers_to_transform": [True]}, [("'layers_to_tr", "numbers", "[True]")]),
    "negative tokens": ({"trainable_token_indices": [-1]}, [("'trainable_token", "row numbers", "[-1]")]),
    "tokens in words": (
        {"trainable_token_indices": {"e": ["a"]}}, [("'trainable_token", "row numbers", "['a']")]
    ),
    "a token twice": ({"trainable_token_indices": [4, 4]}, [("'trainable_", "each once", "[4, 4]")]),
    "several at once": (
        {"r": "8", "lora_alpha": -1, "bias": [], "rank_pattern": {"(": 0}, "use_dora": 1},
        [("'r'", "int", "'8'"), ("'lora_alpha'", "positive", "-1"), ("'use_dora'", "bool", "1"),
         ("'bias'", "str", "[]"), ("'rank_pattern'", "expression", "'('"),
         ("rank_pattern['(']", "positive", "0")],
    ),
}  # fmt: skip
"""A config's fields, and for each problem words of what is wrong, expected and found."""


@pytest.mark.parametrize("name", BAD)
def test_every_bad_field_is_listed_with_what_was_expected(name: str) -> None:
    fields, expected = BAD[name]
    with pytest.raises(AdapterError) as caught:
        settings(**fields)
    problems = caught.value.problems
    assert len(problems) == len(expected)
    for what, wanted, found in expected:
        assert any(
            what in problem.what and wanted in problem.expected and found in problem.found
            for problem in problems
        ), (what, problems)
    assert {problem.where for problem in problems} == {WHERE}
    assert {problem.hint for problem in problems} == {"Fix adapter_config.json"}
    assert max(len(problem.found) for problem in problems) < 200


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
    rooted = settings(r=8, lora_alpha=12, use_rslora=True)
    assert rooted.scale_of("model.q") == 12 / math.sqrt(8)
