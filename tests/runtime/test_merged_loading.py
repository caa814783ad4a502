"""A model whose weights were merged while they were read: the one that a merge into files gives."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForSequenceClassification

import regraft
from faithful.cases import ATTENTION, MIXTRAL_EXPERTS, lora
from merging import toys
from merging.quantized_bases import write_quantized
from regraft.libraries import require
from regraft.merging.execution.in_memory import MemoryMerge
from regraft.testing.adapters import make_adapter
from regraft.testing.zoo import example_inputs, logits, make_base


@pytest.fixture(autouse=True)
def _several_threads_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers load as it does for users; elsewhere the tests spare it the threads."""
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")


@dataclass(frozen=True)
class Case:
    """A base and an adapter of it."""

    architecture: str
    config: Mapping[str, Any]
    shards: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


BOTH_EMBEDDINGS = ["embed_tokens", "lm_head", "q_proj"]

CASES = {
    "llama": Case("llama", lora()),
    "llama in shards": Case("llama", lora(), "20KB"),
    "llama with DoRA, in float32": Case("llama", lora(use_dora=True), None, {"dtype": "float32"}),
    "llama whose embeddings are no longer tied": Case("llama_tied", lora(BOTH_EMBEDDINGS)),
    "llama whose tie stays": Case("llama_tied", lora()),
    "mixtral's experts": Case("mixtral", lora(ATTENTION, target_parameters=MIXTRAL_EXPERTS)),
    "mixtral in shards": Case("mixtral", lora([], target_parameters=MIXTRAL_EXPERTS), "20KB"),
    "gpt2, with DoRA": Case("gpt2", lora(use_dora=True)),
    "bert with a head": Case(
        "bert_seqcls", lora(task_type="SEQ_CLS", modules_to_save=["classifier"])
    ),
    "t5": Case("t5", lora()),
    "llava": Case("llava", lora()),
}


def written(case: Case, folder: Path) -> tuple[Path, Path]:
    """Write a case's base and adapter."""
    from peft import LoraConfig

    base = make_base(case.architecture, folder / "base", max_shard_size=case.shards)
    return base, make_adapter(base, folder / "adapter", LoraConfig(**case.config))


def merged_by_files(base: Path, adapter: Any, folder: Path, cls: Any, **choices: Any) -> nn.Module:
    """Return the model that is merged into a folder and loaded from there."""
    regraft.merge(base, adapter, folder / "merged", undo=False, **choices)
    return cls.from_pretrained(folder / "merged")


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Compare two models bit by bit: class, parameters, buffers, ties, and what is configured."""
    assert type(model) is type(other)
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, other))
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        mine = ours[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        assert mine.requires_grad == tensor.requires_grad
        assert mine.device == tensor.device
        assert torch.equal(bits(mine), bits(tensor)), name
    assert owners(ours) == owners(theirs)
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in other.named_buffers()]
    assert settings(model.config) == settings(other.config)
    if getattr(other, "generation_config", None) is not None:
        assert settings(model.generation_config) == settings(other.generation_config)
    assert model.training is other.training is False


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def owners(parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return which parameter each one is the same as: the first of its tie."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in parameters.items()}


def settings(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_model_that_a_merge_into_files_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapter = written(case, tmp_path)
    model = regraft.load_merged(base, adapter, **case.kwargs)
    other = merged_by_files(base, adapter, tmp_path, type(model), **case.kwargs)
    assert_same(model, other)
    inputs = example_inputs(case.architecture)
    assert np.array_equal(logits(model.float(), inputs), logits(other.float(), inputs))


def test_the_class_is_the_one_that_the_config_names(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, LlamaModel

    base, adapter = written(CASES["llama"], tmp_path)
    model = regraft.load_merged(base, adapter)
    assert type(model) is LlamaForCausalLM
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.name_or_path == model.config.name_or_path == str(base)
    assert type(regraft.load_merged(base, adapter, model_class=LlamaModel)) is LlamaModel


def test_an_auto_class_may_be_asked_for(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

    base, adapter = written(CASES["llama"], tmp_path)
    model = regraft.load_merged(base, adapter, model_class=AutoModelForCausalLM)
    assert type(model) is LlamaForCausalLM
    with pytest.raises(regraft.UsageError, match="AutoModelForSeq2SeqLM has no class"):
        regraft.load_merged(base, adapter, model_class=AutoModelForSeq2SeqLM)


@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "int8", "fp8"])
def test_a_quantized_base_becomes_plain(kind: str, tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base", kind)
    adapter = toys.write_adapter(tmp_path / "adapter")
    model = regraft.load_merged(base, adapter)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert_same(model, merged_by_files(base, adapter, tmp_path, type(model)))


def test_several_adapters_are_mixed(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base")
    pair = [
        (toys.write_adapter(tmp_path / "one"), 0.5),
        f"{toys.write_adapter(tmp_path / 'two')}=-1.5",
    ]
    model = regraft.load_merged(base, pair, threads=1)
    assert_same(model, merged_by_files(base, pair, tmp_path, type(model)))


@pytest.mark.slow
def test_a_vocabulary_that_grew_is_grown(tmp_path: Path) -> None:
    from peft import LoraConfig

    base = make_base("llama_tied", tmp_path / "base")
    config = LoraConfig(**lora(["q_proj"], modules_to_save=["embed_tokens"]))
    adapter = make_adapter(
        base, tmp_path / "adapter", config, prepare=lambda m: m.resize_token_embeddings(67)
    )
    model = regraft.load_merged(base, adapter)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 67
    assert_same(model, merged_by_files(base, adapter, tmp_path, type(model)))


def test_a_model_of_torch_files_is_loaded(tmp_path: Path) -> None:
    base, adapter = written(CASES["llama"], tmp_path)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    model = regraft.load_merged(base, adapter)
    assert_same(model, merged_by_files(base, adapter, tmp_path, type(model)))


def test_what_from_pretrained_takes_is_passed_on(tmp_path: Path) -> None:
    base, adapter = written(CASES["llama"], tmp_path)
    model, info = regraft.load_merged(
        base, adapter, torch_dtype=torch.float16, attn_implementation="eager", use_cache=False,
        output_loading_info=True, device_map="cpu",
    )  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert (model.config._attn_implementation, model.config.use_cache) == ("eager", False)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_base_s_own_way_of_generating_is_kept(tmp_path: Path) -> None:
    base, adapter = written(CASES["llama"], tmp_path)
    toys.write_json(base / "generation_config.json", {"top_k": 7, "eos_token_id": [2, 5]})
    model = regraft.load_merged(base, adapter)
    assert (model.generation_config.top_k, model.generation_config.eos_token_id) == (7, [2, 5])


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = written(CASES["llama"], tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = toys.tree(tmp_path)
    model = regraft.load_merged(base, adapter)
    assert toys.tree(tmp_path) == before
    open_files = {str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()}
    assert not any(str(tmp_path) in name for name in open_files)
    assert model is not None


def test_a_change_of_the_model_does_not_reach_the_files(tmp_path: Path) -> None:
    base, adapter = written(CASES["llama"], tmp_path)
    before = toys.tree(base)
    model = regraft.load_merged(base, adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert toys.tree(base) == before


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantization_config", "config", "state_dict", "revision"])
def test_what_contradicts_the_merge_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(regraft.UsageError, match=f"does not take {name}") as error:
        regraft.load_merged(tmp_path / "base", tmp_path / "adapter", **{name: {"x": 1}})
    assert error.value.problems[0].hint


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base, _ = written(CASES["llama"], tmp_path)
    adapter = toys.write_adapter(tmp_path / "other")
    with pytest.raises(regraft.MismatchError):
        regraft.load_merged(base, adapter)


def test_weights_alone_make_no_model(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base", config=None)
    with pytest.raises(regraft.UsageError, match="weights alone") as error:
        regraft.load_merged(base, toys.write_adapter(tmp_path / "adapter"))
    assert error.value.problems[0].expected == "config.json"


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    config = toys.CONFIG | {"architectures": ["NobodyForCausalLM"]}
    base = toys.write_base(tmp_path / "base", config=config)
    with pytest.raises(regraft.UnsupportedError, match="does not have the class") as error:
        regraft.load_merged(base, toys.write_adapter(tmp_path / "adapter"))
    assert error.value.problems[0].found == "NobodyForCausalLM"


@pytest.mark.parametrize("kind", ["factor", "whole tensor"])
def test_not_a_number_is_found_while_it_is_loaded(kind: str, tmp_path: Path) -> None:
    base, adapter = written(CASES["bert with a head"], tmp_path)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if ("lora_A" if kind == "factor" else "classifier") in n)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(regraft.AdapterError, match="NaN or infinity"):
        regraft.load_merged(base, adapter)


def test_a_merge_that_overflows_is_an_error(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base")
    adapter = toys.write_adapter(tmp_path / "adapter")
    with pytest.raises(regraft.NumericError, match="NaN or infinity"):
        regraft.load_merged(base, (adapter, 1e30), dtype="float16")


def test_what_is_missing_is_named_with_what_to_install() -> None:
    with pytest.raises(regraft.MissingExtraError, match="needs no_such_package") as error:
        require("torch", "no_such_package", why="a model in memory")
    assert "pip install 'regraft[torch]'" in error.value.problems[0].hint


def test_a_generation_config_that_is_not_valid_is_saved_again(tmp_path: Path) -> None:
    base, adapter = written(Case("llama", lora()), tmp_path)
    said = {"do_sample": False, "temperature": 0.7}
    toys.write_json(base / "generation_config.json", said)
    model = regraft.load_merged(base, adapter)
    assert model.generation_config.temperature == 0.7
    model.save_pretrained(tmp_path / "saved")
    again = toys.read_json(tmp_path / "saved" / "generation_config.json")
    assert said.items() <= again.items()
    model.generation_config.top_p = 0.5
    with pytest.raises(ValueError, match="top_p"):
        model.save_pretrained(tmp_path / "changed")


def test_parameters_that_nobody_brings_are_named(tmp_path: Path) -> None:
    base, adapter = written(Case("llama", lora()), tmp_path)
    with pytest.warns(
        UserWarning, match=r"1 of the parameters of \w+ are in neither .*score.weight"
    ):
        regraft.load_merged(base, adapter, model_class=LlamaForSequenceClassification)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = regraft.load_merged(base, adapter, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_model_is_not_loaded_of_two_states_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = written(CASES["llama"], tmp_path)
    fill, path = MemoryMerge.fill, adapter / "adapter_model.safetensors"

    def changing(merge: MemoryMerge, *arguments: Any) -> None:
        fill(merge, *arguments)
        os.utime(path)

    monkeypatch.setattr(MemoryMerge, "fill", changing)
    with pytest.raises(regraft.ChangedError) as caught:
        regraft.load_merged(base, adapter)
    assert [problem.where for problem in caught.value.problems] == [str(path)]
