"""New adapters: what PEFT makes of the same config, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import regraft
from regraft.errors import MismatchError, UnsupportedError, UsageError
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.saving.saved import of_live, write_saved
from regraft.runtime.training.new_adapter import LoraConfig, as_config, new_adapter
from regraft.runtime.training.selecting import shortest_names
from regraft.testing.zoo import example_inputs, make_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}),
    ("llama", {"target_modules": r".*\.1\..*(q|v)_proj", "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5},
               "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"],
               "trainable_token_indices": [1, 5]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["1.self_attn.v_proj"]}),
    ("llama", {"target_modules": None}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all", "lora_bias": True}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "use_dora": True}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gemma3", {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
    ("gemma3", {"target_modules": "all-linear"}),
    ("qwen2_tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                    "ensure_weight_tying": True}),
    ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("qwen2_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3]}),
    ("qwen2_tied", {"target_modules": ["q_proj"],
                    "trainable_token_indices": {"embed_tokens": [2], "lm_head": [2]}}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ("qwen3_moe", {"target_parameters": EXPERTS[1:], "rank_pattern": {"experts.down_proj": 5}}),
    ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ("toynet", {"target_modules": ["conv1d", "conv2d", "conv3d", "attention"], "r": 4}),
    ("toynet", {"target_modules": ["conv1d", "conv2d", "head"], "use_dora": True}),
    ("toynet", {"target_modules": ["attention", "head"], "bias": "all"}),
    ("toynet", {"target_modules": ["head"], "modules_to_save": ["norm"]}),
    ("bert_seqcls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("t5", {"target_modules": ["q", "wo"]}),
    ("vit_conv", {"target_modules": ["projection", "query"]}),
    ("llava", {"target_modules": "all-linear"}),
]  # fmt: skip


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}-{'-'.join(map(str, case[1]))}"


def theirs(architecture: str, settings: dict[str, Any]) -> Any:
    """Return PEFT's model for a case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(make_model(architecture), peft.LoraConfig(**settings))


def their_tensors(model: Any) -> dict[str, torch.Tensor]:
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tensor for key, tensor in found.items() if ".original_module." not in key}


def ours(architecture: str, settings: dict[str, Any], **more: Any) -> tuple[nn.Module, Any]:
    """Return a model, and a new adapter for it."""
    model = make_model(architecture)
    return model, new_adapter(LiveBase(model), settings, "new", **more)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_peft_loads_what_was_saved_and_answers_as_the_base(
    tmp_path: Path, case: tuple[str, dict[str, Any]]
) -> None:
    architecture, given = case
    model, adapter = ours(architecture, {"r": 3, "lora_alpha": 5, **given})
    write_saved(of_live(adapter, LiveBase(model), None), tmp_path)
    inputs = example_inputs(architecture)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits_of(model(**inputs))
        loaded = PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
        torch.testing.assert_close(logits_of(loaded(**inputs)), expected, rtol=1e-4, atol=1e-4)
    again = their_tensors(loaded)
    assert again.keys() == adapter.tensors.keys()
    assert all(torch.equal(again[key], adapter.tensors[key]) for key in again)


def logits_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_and_olora_begin_with_pefts_factors(start: str) -> None:
    for architecture, target in (("llama", "q_proj"), ("gpt2", "c_attn"))[: 1 + (start == "pissa")]:
        settings = {"r": 3, "target_modules": [target], "init_lora_weights": start}
        expected = their_tensors(theirs(architecture, settings))
        _, adapter = ours(architecture, settings)
        pairs = [key.removesuffix("A.weight") for key in expected if key.endswith("A.weight")]
        for key in pairs:
            products = [found[f"{key}B.weight"] @ found[f"{key}A.weight"]
                        for found in (expected, adapter.tensors)]  # fmt: skip
            torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


def test_the_same_generator_gives_the_same_adapter() -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return ours("llama", {"target_modules": "all-linear"}, generator=generator)[1].tensors

    assert all(torch.equal(a, b) for a, b in zip(made(1).values(), made(1).values(), strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(made(1).values(), made(2).values(), strict=True)
    )


def test_factors_of_a_tie_stay_one() -> None:
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    _, adapter = ours("qwen2_tied", settings)
    a = adapter.tensors["base_model.model.lm_head.lora_A.weight"]
    b = adapter.tensors["base_model.model.model.embed_tokens.lora_embedding_B"]
    with torch.no_grad():
        b += 1
    assert torch.equal(a, b.t())
    for _ in range(2):
        (a.sum() * 2 + b.sum()).backward()
    assert torch.equal(b.grad, torch.full_like(b, 6.0))


# -- quantized bases -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def quantized(folder: Path, **options: Any) -> Any:
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )


@pytest.mark.parametrize(
    "options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}]
)
def test_a_quantized_base_gets_what_peft_gives_it(wide: Path, options: dict[str, Any]) -> None:
    settings = {"r": 4, "target_modules": "all-linear", "use_dora": True}
    model = quantized(wide, **options)
    torch.manual_seed(7)
    adapter = new_adapter(LiveBase(model), settings, "new")
    torch.manual_seed(7)
    expected = their_tensors(get_peft_model(model, peft.LoraConfig(**settings)))
    assert adapter.tensors.keys() == expected.keys()
    for key, tensor in adapter.tensors.items():
        assert tensor.shape == expected[key].shape
        if "magnitude" in key:
            torch.testing.assert_close(tensor.detach(), expected[key].float(), rtol=0.01, atol=0)
        else:
            assert torch.equal(tensor, expected[key].float())


def test_pissa_on_codes_is_refused(wide: Path) -> None:
    model = quantized(wide, load_in_4bit=True)
    with pytest.raises(UnsupportedError, match="plain weights"):
        new_adapter(
            LiveBase(model), {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "new"
        )


# -- configs ---------------------------------------------------------------------------------------


def test_pefts_config_and_a_mapping_are_taken() -> None:
    theirs = peft.LoraConfig(
        r=5, target_modules=["v_proj", "q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    config = as_config(theirs)
    assert config == as_config(config.to_dict())
    assert config == LoraConfig(
        r=5, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
    )


def test_the_defaults_are_pefts() -> None:
    expected = peft.LoraConfig().to_dict()
    found = LoraConfig().to_dict()
    assert {key: expected[key] for key in found} == found | {"peft_type": peft.PeftType.LORA}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_qalora": True}, UnsupportedError, "QALoRA"),
        ({"alora_invocation_tokens": [1]}, UnsupportedError, "aLoRA"),
        ({"init_lora_weights": "eva"}, UnsupportedError, "eva"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, UnsupportedError, "LoftQ"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, UnsupportedError, "DoRA"),
        ({"peft_type": "LOHA"}, UnsupportedError, "LOHA"),
        ({"target_moduls": ["q_proj"]}, UsageError, "target_moduls"),
        ({"r": 0}, UsageError, "'r'"),
        ({"bias": "some"}, UsageError, "'bias'"),
        ({"lora_dropout": 1.0}, UsageError, "'lora_dropout'"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, UsageError, "layers"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        as_config(fields)


@pytest.mark.parametrize(
    ("architecture", "settings", "error", "message"),
    [
        ("llama", {"target_modules": ["q_porj"]}, MismatchError, "nearest names: q_proj"),
        ("llama", {"target_parameters": ["experts.up"]}, MismatchError, "selects nothing"),
        ("llama", {"target_modules": ["input_layernorm"]}, UnsupportedError, "cannot be adapted"),
        ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "olora"}, UnsupportedError,
         "Conv1D"),
        ("toynet", {"target_modules": ["grouped"], "r": 4}, UnsupportedError, "2 groups"),
        ("toynet", {"target_modules": ["attention"], "use_dora": True}, UnsupportedError, "DoRA"),
        ("toynet", {"target_modules": None}, UsageError, "what to adapt"),
        ("llama", {"target_modules": ["embed_tokens"], "lora_bias": True}, UnsupportedError,
         "lora_bias"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [61]}, MismatchError,
         "rows below 61"),
        ("llama", {"target_modules": ["q_proj"], "r": 25, "init_lora_weights": "pissa"},
         MismatchError, "at most 24"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(
    architecture: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ours(architecture, settings)


def test_names_are_as_short_as_they_can_be() -> None:
    chosen = ["a.0.q", "a.1.q", "a.0.up", "b.out"]
    assert shortest_names(chosen, ["a", "b", "c.out", "a.0"]) == ["b.out", "q", "up"]


def test_all_linear_is_saved_by_names() -> None:
    _, adapter = ours("llama", {"target_modules": "all-linear"})
    assert adapter.config["target_modules"] == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]


# -- live ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c[0] != "gpt_oss"], ids=name_of)
def test_a_new_adapter_changes_nothing_and_gets_gradients(case: tuple[str, dict[str, Any]]) -> None:
    architecture, given = case
    model = make_model(architecture)
    inputs = example_inputs(architecture)
    with torch.no_grad():
        expected = logits_of(model(**inputs))
    adapters = regraft.attach(model, {"r": 3, "lora_alpha": 5, **given}, "new")
    found = logits_of(model(**inputs))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    parameters = dict(adapters.named_parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    without = [name for name, p in parameters.items() if p.grad is None]
    assert [name for name in without if "lm_head" not in name and "pooler" not in name] == []


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_factors_of_the_weight_change_nothing_at_first(start: str) -> None:
    model = make_model("llama")
    inputs = example_inputs("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
        config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
        regraft.attach(model, config, "new")
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_copies_are_the_adapters_own() -> None:
    settings = {"target_modules": ["head"], "bias": "all", "modules_to_save": ["norm", "embed"]}
    model, adapter = ours("toynet", settings)
    there = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert len(adapter.tensors) > 8
    assert [k for k, tensor in adapter.tensors.items() if tensor.data_ptr() in there] == []


def test_velora_is_served_and_not_trained(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], velora_config={"num_groups": 4}, init_lora_weights=False
    )
    theirs = get_peft_model(make_model("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    model, reason = make_model("llama"), "VeLoRA has a backward pass of its own"
    with pytest.raises(UnsupportedError, match=reason):
        regraft.attach(model, config, "new")
    with pytest.raises(UnsupportedError, match=reason):
        regraft.attach(model, tmp_path, "new", is_trainable=True)
    regraft.attach(model, tmp_path, "served")
    inputs = example_inputs("llama")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize(
    ("targets", "told"), [("all-linear", "'all-linear'"), (["q_proj", "down_proj"], "'down_proj'")]
)
def test_experts_that_names_of_modules_do_not_reach_are_told_of(targets: Any, told: str) -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=32, num_experts=2,
        num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    with pytest.warns(UserWarning, match=f"stacks.*{told}.*experts.down_proj"):
        regraft.attach(model, regraft.LoraConfig(r=2, target_modules=targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = transformers.Qwen3MoeForCausalLM(config)
        regraft.attach(again, regraft.LoraConfig(r=2, target_modules=["q_proj"]))


def _tied() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    ))  # fmt: skip


SHARED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_what_two_sides_of_a_tie_share_is_trained_once(tmp_path: Path, modules: list[str]) -> None:
    fields: dict[str, Any] = SHARED | {"modules_to_save": modules}
    model = _tied()
    made = regraft.attach(model, regraft.LoraConfig(r=2, target_modules=["q_proj"], **fields))
    regraft.save(model, tmp_path / "a")
    for handle in (made, regraft.attach(_tied(), tmp_path / "a", is_trainable=True)):
        found = list(handle.parameters())
        assert len(found) == len({id(parameter) for parameter in found}) == 3
        assert len(found) == len(list(handle.named_parameters()))


@pytest.mark.parametrize("fields", [SHARED, {"target_modules": ["q_proj", "embed_tokens"],
                                             "ensure_weight_tying": True}])  # fmt: skip
def test_a_tie_that_goes_on_in_training_is_saved_as_one(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | fields
    first = _tied()
    regraft.attach(first, regraft.LoraConfig(**config))
    regraft.save(first, tmp_path / "first")
    model = _tied()
    handle = regraft.attach(model, tmp_path / "first", is_trainable=True)
    optimizer, ids = torch.optim.SGD(handle.parameters(), lr=0.3), torch.arange(8).view(1, 8)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    regraft.save(model, tmp_path / "second")
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        other = _tied()
        regraft.attach(other, tmp_path / "second")
        assert torch.allclose(other.eval()(ids).logits, wanted, atol=1e-6)
        loaded = peft.PeftModel.from_pretrained(_tied(), tmp_path / "second").eval()
        assert torch.allclose(loaded(ids).logits, wanted, atol=1e-5)


def test_other_rows_for_the_two_sides_of_a_tie_are_refused() -> None:
    rows = {"lm_head": [1, 2], "embed_tokens": [3]}
    with pytest.raises(regraft.UnsupportedError, match="other rows for the two sides of a tie"):
        regraft.attach(_tied(), regraft.LoraConfig(r=2, target_modules=["q_proj"],
                                                   trainable_token_indices=rows))  # fmt: skip
