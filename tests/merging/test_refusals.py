"""What cannot be merged is refused by its name, with what to do instead, before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

import regraft
from merging import toys
from merging.test_memory import write_sparse
from merging.toys import attention, tree, write_adapter, write_base, write_json
from regraft.errors import Problem, UnsupportedError

FEATURES: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "aLoRA is active only after", "Serve it"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "Arrow routes every token", "one by one"),
    "QALoRA": ({"use_qalora": True, "qalora_group_size": 16}, "QALoRA pools", "zero points"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication", "Save the"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA keeps block-diagonal", "merge_and"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "KaSA cut the base's smallest", "Merge it with PEFT"),
    "MonteCLoRA": ({"monteclora_config": {"samples": 4}}, "MonteCLoRA samples", "their means"),
    "Megatron": ({"megatron_config": {"tp": 2}}, "Megatron's parallel layers", "Export"),
    "CorDA": ({"init_lora_weights": "corda"}, "CorDA changed the base", "Save it again"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "LoftQ replaced the base", "that LoftQ left"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "LoRA-GA changed the base", "Save it again"),
    "an unknown start": ({"init_lora_weights": "sparkle"}, "'sparkle' is not", "update regraft"),
    "DoRA on PiSSA": (
        {"init_lora_weights": "pissa", "use_dora": True}, "'pissa' together with DoRA", "merge_and"
    ),
    "DoRA on OLoRA": (
        {"init_lora_weights": "olora", "use_dora": True}, "'olora' together with DoRA", "merge_and"
    ),
    "no type": ({"peft_type": None}, "no 'peft_type'", "PEFT adapter?"),
    "an unknown type": ({"peft_type": "SPARKLE"}, "peft_type SPARKLE is not LoRA", "Merge it with"),
}  # fmt: skip
"""A config's fields, what is said of them, and what to do instead."""


def refused(base: Path, adapter: Path, out: Path) -> tuple[Problem, ...]:
    """Return the problems for which a merge is refused; check names the same ones."""
    before = tree(base.parent)
    with pytest.raises(UnsupportedError) as caught:
        regraft.merge(base, adapter, out)
    assert caught.value.exit_code == 3
    assert tree(base.parent) == before
    report = regraft.check(base, adapter)
    assert (report.ok, report.problems) == (False, caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_refused_by_name(base: Path, tmp_path: Path, feature: str) -> None:
    config, what, hint = FEATURES[feature]
    adapter = write_adapter(tmp_path / "adapter", **config)
    (problem,) = refused(base, adapter, tmp_path / "out")
    assert what in problem.what
    assert hint in problem.hint
    assert problem.where == f"{adapter}/adapter_config.json"


@pytest.mark.parametrize("kind", [kind for kind in peft.PeftType if kind != peft.PeftType.LORA])
def test_every_other_type_of_peft_is_refused_by_name(
    base: Path, tmp_path: Path, kind: peft.PeftType
) -> None:
    adapter = write_adapter(tmp_path / "adapter", peft_type=kind.value)
    (problem,) = refused(base, adapter, tmp_path / "out")
    assert f"peft_type {kind.value} " in problem.what
    assert problem.hint


PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT",
           "ADAPTION_PROMPT", "CARTRIDGE")  # fmt: skip


@pytest.mark.slow
def test_prompts_are_told_from_weights(base: Path, tmp_path: Path) -> None:
    for kind in peft.PeftType:
        if kind == peft.PeftType.LORA:
            continue
        adapter = write_adapter(tmp_path / "adapter", peft_type=kind.value)
        (problem,) = refused(base, adapter, tmp_path / "out")
        assert ("changes no weight" in problem.what) == (kind.value in PROMPTS), kind


def test_all_refused_features_are_named_at_once(base: Path, tmp_path: Path) -> None:
    config = {"use_qalora": True, "layer_replication": [[0, 1]], "init_lora_weights": "loftq"}
    adapter = write_adapter(tmp_path / "adapter", **config)
    problems = refused(base, adapter, tmp_path / "out")
    assert [problem.what.partition(" ")[0] for problem in problems] == [
        "QALoRA", "layer_replication", "init_lora_weights='loftq':",
    ]  # fmt: skip


OFF: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "layer_replication": None,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}
"""How PEFT writes these features when they are not used."""

ACCEPTED: list[Mapping[str, Any]] = [
    OFF,
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": False},
    {"velora_config": {"num_groups": 4}},
    {"some_field_of_the_future": {"x": 1}},
    {"lora_dropout": 0.3, "inference_mode": True},
]


@pytest.mark.parametrize("config", ACCEPTED, ids=lambda config: next(iter(config)))
def test_what_leaves_the_arithmetic_as_it_is_is_accepted(
    base: Path, adapter: Path, tmp_path: Path, config: Mapping[str, Any]
) -> None:
    other = write_adapter(tmp_path / "other", **config)
    regraft.merge(base, adapter, tmp_path / "plain")
    regraft.merge(base, other, tmp_path / "out")
    plain, found = (toys.load(tmp_path / name) for name in ("plain", "out"))
    assert all(plain[name].tobytes() == found[name].tobytes() for name in plain)


def test_every_start_that_peft_knows_is_decided_on() -> None:
    """A start that a newer PEFT brings is found here before a user finds it."""
    import typing

    options = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    names = {name for part in typing.get_args(options) for name in typing.get_args(part)}
    assert names == {
        "gaussian", "eva", "olora", "pissa", "pissa_niter_[number of iters]", "corda", "loftq",
        "orthogonal", "mica",
    }  # fmt: skip


# Bases


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
    "another method of the older key": ({"compression_config": {"quant_method": "vptq"}}, "vptq"),
    "an unnamed method": ({"quantization_config": {"bits": 4}}, ""),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_base_quantized_in_an_unknown_way_is_refused(
    tmp_path: Path, adapter: Path, method: str
) -> None:
    config, found = QUANTIZED[method]
    base = write_sparse(tmp_path / "base", {"model.x.weight": ("U8", (8, 1))})
    write_json(base / "config.json", {**toys.CONFIG, **config})
    (problem,) = refused(base, adapter, tmp_path / "out")
    assert "the base is quantized" in problem.what
    assert found in problem.found
    assert "bitsandbytes" in problem.expected
    assert "16-bit base" in problem.hint


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "F64", "I32"])
def test_an_adapter_on_a_tensor_of_another_kind_of_numbers_is_refused(
    tmp_path: Path, dtype: str
) -> None:
    base = write_sparse(tmp_path / "base", {"m.weight": (dtype, (6, 5))})
    adapter = write_adapter(tmp_path / "a", toys.lora("m", 6, 5), target_modules=["m"])
    before = tree(tmp_path)
    with pytest.raises(regraft.MismatchError) as caught:
        regraft.merge(base, adapter, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.what == f"cannot add a delta to {dtype}"
    assert problem.where.endswith("m -> m.weight")
    assert (problem.expected, problem.found) == ("F32 or BF16 or F16", dtype)
    assert tree(tmp_path) == before


def test_a_tensor_of_such_numbers_that_no_adapter_touches_is_copied(tmp_path: Path) -> None:
    kinds = {"x.f8": ("F8_E4M3", (7,)), "x.i": ("I64", (3,)), "x.b": ("BOOL", (5,))}
    base = write_sparse(tmp_path / "base", {**kinds, "m.weight": ("BF16", (6, 5))})
    adapter = write_adapter(tmp_path / "a", toys.lora("m", 6, 5), target_modules=["m"])
    receipt = regraft.merge(base, adapter, tmp_path / "out", dtype="float32")
    assert {record.name: (record.action, record.dtype) for record in receipt.tensors} == {
        "m.weight": ("merge", "F32"), "x.f8": ("copy", "F8_E4M3"), "x.i": ("copy", "I64"),
        "x.b": ("copy", "BOOL"),
    }  # fmt: skip


# What several adapters may not do together


def test_two_adapters_that_replace_one_tensor_contradict_each_other(
    base: Path, tmp_path: Path
) -> None:
    head = {f"{toys.PREFIX}lm_head.weight": toys.draw(toys.VOCAB, toys.HIDDEN)}
    saved = {**attention(), **head}
    two = [write_adapter(tmp_path / n, saved, modules_to_save=["lm_head"]) for n in ("a", "b")]
    with pytest.raises(regraft.MismatchError, match=r"lm_head\.weight: two adapters claim"):
        regraft.merge(base, two, tmp_path / "out")
    lora = {**attention(), **toys.lora("lm_head", toys.VOCAB, toys.HIDDEN)}
    delta = write_adapter(tmp_path / "c", lora, target_modules=["q_proj", "v_proj", "lm_head"])
    for pair in ([two[0], delta], [delta, two[0]]):
        with pytest.raises(regraft.MismatchError, match=r"lm_head\.weight: two adapters claim"):
            regraft.merge(base, pair, tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8])
def test_a_tensor_whose_values_are_not_converted_cannot_be_replaced(
    tmp_path: Path, dtype: Any
) -> None:
    shape = (toys.VOCAB, toys.HIDDEN)
    tensors = {**toys.llama_tensors(), "lm_head.weight": np.ones(shape, dtype)}
    base = write_base(tmp_path / "base", tensors)
    saved = {**attention(), f"{toys.PREFIX}lm_head.weight": toys.draw(*shape)}
    adapter = write_adapter(tmp_path / "a", saved, modules_to_save=["lm_head"])
    report = regraft.check(base, adapter)
    (problem,) = report.problems
    assert "cannot take the place" in problem.what
    assert problem.found == "dtype F32"
    with pytest.raises(regraft.MismatchError, match=r"lm_head\.weight: the adapter's tensor"):
        regraft.merge(base, adapter, tmp_path / "out")


def write_rows(folder: Path, indices: list[int]) -> Path:
    """Write an adapter that trained some rows of the embeddings."""
    key = f"{toys.PREFIX}{toys.EMBED}.token_adapter.trainable_tokens_delta"
    rows = {key: toys.draw(len(indices), toys.HIDDEN, seed=indices[0])}
    return write_adapter(folder, {**attention(), **rows}, trainable_token_indices=indices)


def test_two_adapters_may_train_other_rows_and_not_the_same(base: Path, tmp_path: Path) -> None:
    first, same = write_rows(tmp_path / "a", [1, 5]), write_rows(tmp_path / "b", [5, 7])
    with pytest.raises(regraft.MismatchError, match="two adapters claim") as caught:
        regraft.merge(base, [first, same], tmp_path / "out")
    assert f"rows of {toys.EMBED}.weight" in str(caught.value)
    other = write_rows(tmp_path / "c", [2, 7])
    regraft.merge(base, [first, other], tmp_path / "out")
    before, after = (
        toys.load_file(folder / "model.safetensors")[f"{toys.EMBED}.weight"]
        for folder in (base, tmp_path / "out")
    )
    changed = {row for row in range(toys.VOCAB) if (before[row] != after[row]).any()}
    assert changed == {1, 2, 5, 7}


@pytest.mark.parametrize("what", ["module", "rows", "bias"])
def test_what_is_replaced_cannot_be_weighted(tmp_path: Path, what: str) -> None:
    tensors = {**toys.llama_tensors(), f"{toys.Q0}.bias": np.zeros(toys.HIDDEN, toys.BF16)}
    base = write_base(tmp_path / "base", tensors, None)
    key, table = toys.PREFIX, toys.draw(2, toys.HIDDEN)
    more: dict[str, Any] = {
        "module": ({f"{key}lm_head.weight": toys.draw(toys.VOCAB, toys.HIDDEN)},
                   {"modules_to_save": ["lm_head"]}),
        "rows": ({f"{key}{toys.EMBED}.token_adapter.trainable_tokens_delta": table},
                 {"trainable_token_indices": [1, 2]}),
        "bias": ({f"{key}{toys.Q0}.base_layer.bias": toys.draw(toys.HIDDEN)}, {"bias": "all"}),
    }  # fmt: skip
    extra, config = more[what]
    adapter = write_adapter(tmp_path / "a", {**attention(), **extra}, **config)
    with pytest.raises(regraft.MismatchError, match=r"cannot be weighted.*weight 0\.5"):
        regraft.merge(base, f"{adapter}=0.5", tmp_path / "out")
    regraft.merge(base, adapter, tmp_path / "out")
