"""Adapters of a live model become one, as files do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import regraft

TOKENS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combine") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapter(base: Path, name: str, **config: Any) -> Path:
    folder = base.parent / name
    if not folder.exists():
        torch.manual_seed(len(name))
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**config))
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "lora_embedding_A" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    return folder


def attached(base: Path) -> tuple[Any, regraft.Adapters]:
    model = LlamaForCausalLM.from_pretrained(base).eval()
    first = adapter(base, "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    second = adapter(
        base, "bb", r=6, lora_alpha=6, use_rslora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
    )  # fmt: skip
    handle = regraft.attach(model, first, "a")
    handle.load_adapter(second, "b")
    return model, handle


def answer(model: Any, handle: regraft.Adapters, chosen: Any) -> torch.Tensor:
    with torch.no_grad(), handle.using(chosen):
        return model(TOKENS).logits


def test_a_sum_answers_as_the_mix(base: Path) -> None:
    model, handle = attached(base)
    mix = {"a": 0.7, "b": -0.3}
    handle.combine_adapters(mix, "both")
    assert handle.active_adapters == ["a"]
    assert torch.allclose(answer(model, handle, "both"), answer(model, handle, mix), atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "knots", "tsv", "ties", "dare"])
def test_it_is_what_the_files_become(base: Path, tmp_path: Path, method: str) -> None:
    model, handle = attached(base)
    handle.combine_adapters(["a", "b"], "live", method=method, rank=5, seed=3)
    folders: list[Any] = [base.parent / "a", base.parent / "bb"]
    regraft.combine(folders, tmp_path / "file", method=method, rank=5, seed=3)
    handle.load_adapter(tmp_path / "file", "file")
    live, file = answer(model, handle, "live"), answer(model, handle, "file")
    assert torch.allclose(live, file, atol=1e-4)
    assert not torch.allclose(live, answer(model, handle, "a"), atol=1e-3)


def test_svd_is_that_of_peft(base: Path) -> None:
    _, handle = attached(base)
    model = handle.model
    adapter(base, "ccc", r=4, target_modules=["q_proj", "v_proj"])
    handle.load_adapter(base.parent / "ccc", "c")
    handle.combine_adapters({"a": 0.7, "c": 0.3}, "ours", method="svd", rank=4)
    theirs = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base), str(base.parent / "a"), adapter_name="a"
    )
    theirs.load_adapter(str(base.parent / "ccc"), "c")
    theirs.add_weighted_adapter(["a", "c"], [0.7, 0.3], "s", combination_type="svd", svd_rank=4)
    theirs.set_adapter("s")
    with torch.no_grad():
        expected = theirs.eval()(TOKENS).logits
    assert torch.allclose(answer(model, handle, "ours"), expected, atol=1e-4)


def test_a_combined_adapter_is_saved_and_merged_as_any(base: Path, tmp_path: Path) -> None:
    model, handle = attached(base)
    handle.combine_adapters(["a", "b"], "both")
    regraft.save(handle, tmp_path / "saved", name="both")
    expected = answer(model, handle, "both")
    regraft.merge(base, tmp_path / "saved", tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(TOKENS).logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("chosen", "options", "said"),
    [
        ([], {}, "no adapter was named"),
        (["a", "nobody"], {}, "nobody"),
        (["a", "b"], {"method": "average"}, "no such method"),
        (["a", "b"], {"rank": 4, "energy": 0.5}, "two ways"),
    ],
)
def test_what_contradicts_itself_is_refused(
    base: Path, chosen: list[str], options: dict[str, Any], said: str
) -> None:
    _, handle = attached(base)
    with pytest.raises(regraft.UsageError, match=said):
        handle.combine_adapters(chosen, "both", **options)
    assert handle.names == ("a", "b")


def test_dora_and_a_taken_name_are_refused(base: Path) -> None:
    _, handle = attached(base)
    adapter(base, "dora", r=4, target_modules=["q_proj"], use_dora=True)
    handle.load_adapter(base.parent / "dora", "dora")
    with pytest.raises(regraft.UnsupportedError, match=r"dora.*q_proj"):
        handle.combine_adapters(["a", "dora"], "both")
    with pytest.raises(regraft.UsageError, match="a"):
        handle.combine_adapters(["a", "b"], "b")


def test_methods_on_factors_take_one_rank(base: Path) -> None:
    _, handle = attached(base)
    with pytest.raises(regraft.UnsupportedError, match="one rank"):
        handle.combine_adapters(["a", "b"], "both", method="peft_linear")
