"""The keys of an adapter's file are taken apart, in every form that PEFT's versions gave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from merging.toys import adapter_config, draw, write_json
from regraft.adapters.dialects.peft import read_adapter, strip_wrappers, wrapper_depth
from regraft.adapters.model import Adapter
from regraft.errors import AdapterError
from regraft.formats.adapter_files import open_adapter
from regraft.formats.hub import Located

IN, OUT, R = 5, 4, 3
Q = "model.layers.0.self_attn.q_proj"


def read(folder: Path, tensors: dict[str, Any], weight: float = 1.0, **config: Any) -> Adapter:
    """Write an adapter and read it back; a shape stands for a tensor of it."""
    arrays = {k: v if isinstance(v, np.ndarray) else draw(*v) for k, v in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", adapter_config(**config))
    return read_adapter(open_adapter(Located(folder, "style", None, None)), weight)


def pair(a: str, b: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of two factors under two keys."""
    return {a: (R, IN), b: (OUT, R)}


FORMS = {
    "as PEFT saves": (f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"),
    "with the adapter's name": (
        f"base_model.model.{Q}.lora_A.default.weight", f"base_model.model.{Q}.lora_B.default.weight"
    ),
    "with a name of its own": (
        f"base_model.model.{Q}.lora_A.my-style_2.weight",
        f"base_model.model.{Q}.lora_B.my-style_2.weight",
    ),
    "without the prefix": (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
    "without .weight": (f"base_model.model.{Q}.lora_A", f"base_model.model.{Q}.lora_B"),
    "of a compiled model": (
        f"base_model.model._orig_mod.{Q}.lora_A.weight",
        f"base_model.model._orig_mod.{Q}.lora_B.weight",
    ),
    "of a model compiled outside": (
        f"_orig_mod.base_model.model.{Q}.lora_A.weight",
        f"_orig_mod.base_model.model.{Q}.lora_B.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_factors_of_a_linear_layer_are_found(form: str, tmp_path: Path) -> None:
    a, b = FORMS[form]
    (target,) = read(tmp_path, pair(a, b)).targets
    assert (target.module, target.kind, target.depth) == (Q, "linear", 0)
    assert (target.a.name, target.b.name) == (a, b)
    assert (target.a.shape, target.b.shape) == ((R, IN), (OUT, R))
    assert (target.b_bias, target.magnitude) == (None, None)


@pytest.mark.parametrize(
    "key",
    ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default",
     "lora_magnitude_vector.default.weight"],
)  # fmt: skip
def test_magnitudes_are_found_in_the_forms_of_all_versions(key: str, tmp_path: Path) -> None:
    a, b = FORMS["as PEFT saves"]
    tensors = {**pair(a, b), f"base_model.model.{Q}.{key}": (OUT,)}
    (target,) = read(tmp_path, tensors, use_dora=True).targets
    assert target.magnitude is not None
    assert target.magnitude.name == f"base_model.model.{Q}.{key}"


@pytest.mark.parametrize("name", ["", ".default"])
def test_an_embedding_and_a_bias_of_b_are_told_apart(name: str, tmp_path: Path) -> None:
    key = "base_model.model.model.embed_tokens"
    tensors = {
        f"{key}.lora_embedding_A{name}": (R, 11),
        f"{key}.lora_embedding_B{name}": (IN, R),
        **pair(f"{Q}.lora_A{name}.weight", f"{Q}.lora_B{name}.weight"),
        f"{Q}.lora_B{name}.bias": (OUT,),
    }
    found = {target.module: target for target in read(tmp_path, tensors, lora_bias=True).targets}
    table, linear = found["model.embed_tokens"], found[Q]
    assert (table.kind, table.a.shape, table.b.shape) == ("embedding", (R, 11), (IN, R))
    assert linear.kind == "linear"
    assert linear.b_bias is not None
    assert linear.b_bias.shape == (OUT,)


def test_parameters_of_one_module_are_told_apart_by_their_depth(tmp_path: Path) -> None:
    key = "base_model.model.mlp.experts"
    inner = pair(f"{key}.base_layer.lora_A.weight", f"{key}.base_layer.lora_B.weight")
    outer = pair(f"{key}.lora_A.weight", f"{key}.lora_B.weight")
    targets = read(tmp_path, {**inner, **outer}).targets
    assert {(target.module, target.depth) for target in targets} == {
        ("mlp.experts", 0), ("mlp.experts", 1),
    }  # fmt: skip


def test_a_wrapper_in_the_middle_of_a_name_is_no_depth(tmp_path: Path) -> None:
    key = "base_model.model.attention.base_layer.out_proj"
    (target,) = read(tmp_path, pair(f"{key}.lora_A.weight", f"{key}.lora_B.weight")).targets
    assert (target.module, target.depth) == ("attention.out_proj", 0)
    assert strip_wrappers("a.base_layer.b.base_layer") == "a.b"
    assert [wrapper_depth(path) for path in ("a", "a.base_layer", "a.base_layer.b")] == [0, 1, 0]


WHOLE: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a saved module": ("score.weight", {"modules_to_save": ["score"]}, "score.weight", "saved"),
    "its bias": ("score.bias", {"modules_to_save": ["score"]}, "score.bias", "saved"),
    "a module inside a saved one": (
        "classifier.dense.weight", {"modules_to_save": ["classifier"]}, "classifier.dense.weight",
        "saved",
    ),
    "a copy PEFT left its wrapper's name on": (
        "score.modules_to_save.default.weight", {"modules_to_save": ["score"]}, "score.weight",
        "saved",
    ),
    "a copy without the adapter's name": (
        "score.modules_to_save.weight", {"modules_to_save": ["score"]}, "score.weight", "saved",
    ),
    "a trained bias": (f"{Q}.base_layer.bias", {"bias": "lora_only"}, f"{Q}.bias", "bias"),
    "any bias": ("model.norm.bias", {"bias": "all"}, "model.norm.bias", "bias"),
    "the embeddings' own weight": (
        "model.embed_tokens.base_layer.weight", {}, "model.embed_tokens.weight", "embedding",
    ),
    "a head's own weight": ("lm_head.base_layer.weight", {}, "lm_head.weight", "embedding"),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_whole_tensors_are_known_for_what_they_are(what: str, tmp_path: Path) -> None:
    key, config, parameter, origin = WHOLE[what]
    tensors = {**pair(*FORMS["as PEFT saves"]), f"base_model.model.{key}": (7, IN)}
    (whole,) = read(tmp_path, tensors, **config).whole
    assert (whole.parameter, whole.origin) == (parameter, origin)
    assert whole.spec.name == f"base_model.model.{key}"


def test_the_untrained_original_of_a_saved_module_is_left_out(tmp_path: Path) -> None:
    tensors = {
        **pair(*FORMS["as PEFT saves"]),
        "base_model.model.score.original_module.weight": (7, IN),
        "base_model.model.score.modules_to_save.default.weight": (7, IN),
    }
    (whole,) = read(tmp_path, tensors, modules_to_save=["score"]).whole
    assert whole.spec.name.endswith("modules_to_save.default.weight")


@pytest.mark.parametrize(
    "key",
    ["score.weight", "model.norm.bias", f"{Q}.weird", f"{Q}.hada_w1_a", "prompt_embeddings",
     "model.layers.0.mlp.weight"],
)  # fmt: skip
def test_what_belongs_to_nothing_is_an_error(key: str, tmp_path: Path) -> None:
    tensors = {**pair(*FORMS["as PEFT saves"]), f"base_model.model.{key}": (7, IN)}
    with pytest.raises(AdapterError, match="belongs to nothing") as caught:
        read(tmp_path, tensors)
    (problem,) = caught.value.problems
    assert repr(key) in problem.what
    assert problem.where == "style/adapter_model.safetensors"


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("indices", [[8, 2], {"embed_tokens": [8, 2]}, {"x": [1], "embed_tokens":
                                                                        [8, 2]}])  # fmt: skip
@pytest.mark.parametrize("name", ["", ".default"])
def test_token_rows_get_their_numbers_from_the_config(
    indices: Any, name: str, tmp_path: Path
) -> None:
    found = read(tmp_path, {ROWS + name: (2, IN)}, trainable_token_indices=indices)
    (rows,) = found.token_rows
    assert (rows.module, rows.indices, rows.spec.shape) == ("model.embed_tokens", (8, 2), (2, IN))
    assert (found.targets, found.whole) == ((), ())


def test_rows_of_another_count_than_the_config_says_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"do not fit the config.*expected 1 rows.*\(2, 5\)"):
        read(tmp_path, {ROWS: (2, IN)}, trainable_token_indices=[8])


def test_every_missing_half_is_named(tmp_path: Path) -> None:
    tensors = {
        "a.q.lora_A.weight": (R, IN),
        "a.k.lora_B.weight": (OUT, R),
        "a.e.lora_embedding_A": (R, 11),
        "a.v.lora_magnitude_vector": (OUT,),
        **pair("a.o.lora_A.weight", "a.o.lora_B.weight"),
    }
    with pytest.raises(AdapterError) as caught:
        read(tmp_path, tensors)
    found = {problem.what.split("'")[1]: problem.found for problem in caught.value.problems}
    assert found == {
        "a.q": "lora_A", "a.k": "lora_B", "a.e": "lora_embedding_A", "a.v": "lora_magnitude_vector",
    }  # fmt: skip


def test_a_tensor_of_a_wrong_kind_is_one_problem_and_not_two(tmp_path: Path) -> None:
    tensors = {"a.q.lora_A.weight": draw(R, IN, dtype=np.float64), "a.q.lora_B.weight": (OUT, R)}
    with pytest.raises(AdapterError) as caught:
        read(tmp_path, tensors)
    (problem,) = caught.value.problems
    assert (problem.expected, problem.found) == ("F32 or BF16 or F16", "F64")


def test_the_users_weight_and_names_are_kept(tmp_path: Path) -> None:
    found = read(tmp_path, pair(*FORMS["as PEFT saves"]), weight=-0.25)
    assert (found.weight, found.source, found.label) == (-0.25, "style", "style")
    assert found.root == str(tmp_path)
    assert found.settings.r == R
