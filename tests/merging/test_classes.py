"""Which class an output is of, what that class lacks in it, and adapters one prefix away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regraft
from merging import toys
from merging.quantized_bases import four_bit
from regraft.errors import MismatchError

WIDE, TALL = toys.HIDDEN, toys.VOCAB
HEAD = f"{toys.PREFIX}score.weight"


def merged(base: Path, adapter: Path, out: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the output's config and the receipt's warnings."""
    receipt = regraft.merge(base, adapter, out)
    return toys.read_json(out / "config.json"), tuple(receipt.warnings)


def with_head(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    modules = sorted({key.removeprefix(toys.PREFIX).rpartition(".")[0] for key in tensors})
    return toys.write_adapter(folder, toys.attention() | tensors, modules_to_save=modules, **config)


def seeing(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a llama's tensors as LLaVA holds them, with a layer of its eyes."""
    inner = {
        name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()
    }
    eye = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    return inner | {eye: toys.draw(12, 12)}


def eyes_config() -> dict[str, Any]:
    text = {k: v for k, v in toys.CONFIG.items() if k != "architectures"}
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": text, "vision_config": {"model_type": "clip_vision_model"},
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


# --- what the class needs -------------------------------------------------------------------------


def deberta(folder: Path) -> Path:
    tensors = {
        "deberta.embeddings.word_embeddings.weight": toys.draw(TALL, WIDE),
        "deberta.encoder.layer.0.attention.self.query_proj.weight": toys.draw(WIDE, WIDE),
    }
    config = {"architectures": ["DebertaV2ForMaskedLM"], "model_type": "deberta-v2"}
    return toys.write_base(folder, tensors, config)


QUERY = "deberta.encoder.layer.0.attention.self.query_proj"
POOLER = {f"{toys.PREFIX}pooler.dense.{x}": toys.draw(*s) for x, s in
          (("weight", (WIDE, WIDE)), ("bias", (WIDE,)))}  # fmt: skip
CLASSIFIER = {f"{toys.PREFIX}classifier.{x}": toys.draw(*s) for x, s in
              (("weight", (3, WIDE)), ("bias", (3,)))}  # fmt: skip


def classifier(folder: Path, *parts: dict[str, np.ndarray], **config: Any) -> Path:
    tensors = toys.lora(QUERY, WIDE, WIDE)
    for part in parts:
        tensors |= part
    chosen = {"target_modules": ["query_proj"], "modules_to_save": ["classifier", "pooler"]}
    return toys.write_adapter(folder, tensors, **chosen | config)


def test_a_pooler_that_nobody_holds_is_named(tmp_path: Path) -> None:
    base = deberta(tmp_path / "base")
    adapter = classifier(tmp_path / "a", CLASSIFIER, task_type="SEQ_CLS")
    _, warnings = merged(base, adapter, tmp_path / "out")
    (note,) = warnings
    assert "DebertaV2ForSequenceClassification needs" in note
    assert "pooler.dense.bias, pooler.dense.weight" in note
    assert note in regraft.check(base, adapter).warnings


def test_a_pooler_that_the_adapter_brings_is_not_missed(tmp_path: Path) -> None:
    adapter = classifier(tmp_path / "a", CLASSIFIER, POOLER, task_type="SEQ_CLS")
    _, warnings = merged(deberta(tmp_path / "base"), adapter, tmp_path / "out")
    assert warnings == ()


def test_an_output_head_that_is_neither_there_nor_tied_is_named(tmp_path: Path) -> None:
    tensors = toys.llama_tensors()
    del tensors["lm_head.weight"]
    base, adapter = toys.write_base(tmp_path / "base", tensors), toys.write_adapter(tmp_path / "a")
    _, warnings = merged(base, adapter, tmp_path / "out")
    assert len(warnings) == 1
    assert "neither the base nor an adapter holds: lm_head.weight" in warnings[0]


def test_a_tied_head_and_keys_beside_the_class_are_not_missed(tmp_path: Path) -> None:
    tensors = toys.llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": toys.draw(4)}
    del tensors["lm_head.weight"]
    config = toys.CONFIG | {"tie_word_embeddings": True}
    base = toys.write_base(tmp_path / "base", tensors, config)
    _, warnings = merged(base, toys.write_adapter(tmp_path / "a"), tmp_path / "out")
    assert warnings == ()


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """A gpt-oss in 4 bits with its experts apart, under names that tell of no stack."""
    experts = "model.layers.0.mlp.experts"
    quantize = four_bit("nf4", nested=False)
    tensors = {f"{toys.Q0}.weight": toys.draw(WIDE, WIDE)}
    for e in range(2):
        for leaf, shape in (("w1", (8, WIDE)), ("w2", (WIDE, 4))):
            name = f"{experts}.{leaf}.{e}.weight"
            stored = quantize(name, torch.from_numpy(toys.draw(*shape)))
            tensors |= {key: value.numpy() for key, value in stored.items()}
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "quantization_config": {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"
        },
    }  # fmt: skip
    return toys.write_base(tmp_path / "base", tensors, config)


def test_experts_apart_are_not_merged_out_to_what_no_class_reads(
    apart: Path, tmp_path: Path
) -> None:
    adapter = toys.write_adapter(tmp_path / "a", toys.lora(toys.Q0, WIDE, WIDE))
    with pytest.raises(MismatchError, match=r"experts.w1.*Merge into the model as it was publ"):
        regraft.merge(apart, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_apart_that_stay_in_their_format_are_named(apart: Path, tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a", toys.lora(toys.Q0, WIDE, WIDE))
    receipt = regraft.merge(apart, adapter, tmp_path / "out", quantize="keep")
    assert any("looks for" in note and "experts.w1" in note for note in receipt.warnings)


# --- the head tells the class ---------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_score_makes_a_sequence_classifier_whatever_the_task(
    base: Path, tmp_path: Path, task: str | None, labels: int
) -> None:
    adapter = with_head(tmp_path / "a", {HEAD: toys.draw(labels, WIDE)}, task_type=task)
    config, _ = merged(base, adapter, tmp_path / "out")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == len(config["label2id"]) == labels


def test_a_score_with_a_bias_makes_a_token_classifier(base: Path, tmp_path: Path) -> None:
    head = {HEAD: toys.draw(5, WIDE), f"{toys.PREFIX}score.bias": toys.draw(5)}
    config, warnings = merged(base, with_head(tmp_path / "a", head), tmp_path / "out")
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert len(config["id2label"]) == 5
    assert any("makes the output a LlamaForTokenClassification" in note for note in warnings)


def test_a_head_of_another_task_than_the_config_says_is_taken_for_what_it_is(
    base: Path, tmp_path: Path
) -> None:
    head = {f"{toys.PREFIX}score.{x}": v for x, v in
            (("weight", toys.draw(5, WIDE)), ("bias", toys.draw(5)))}  # fmt: skip
    adapter = with_head(tmp_path / "a", head, task_type="SEQ_CLS")
    config, warnings = merged(base, adapter, tmp_path / "out")
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert any("its config says LlamaForSequenceClassification" in note for note in warnings)


def test_a_head_of_several_classes_needs_a_task(tmp_path: Path) -> None:
    tensors = {"bert.encoder.layer.0.attention.self.query.weight": toys.draw(WIDE, WIDE)}
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    base = toys.write_base(tmp_path / "base", tensors, config)
    query = "bert.encoder.layer.0.attention.self.query"
    factors = toys.lora(query, WIDE, WIDE) | CLASSIFIER
    chosen = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    adapter = toys.write_adapter(tmp_path / "a", factors, **chosen)
    with pytest.raises(MismatchError, match="Set task_type") as caught:
        regraft.merge(base, adapter, tmp_path / "out")
    assert "BertForTokenClassification" in str(caught.value)


def test_a_head_that_no_class_has_is_said_to_be_left_out(base: Path, tmp_path: Path) -> None:
    head = {f"{toys.PREFIX}v_head.summary.weight": toys.draw(1, WIDE)}
    config, warnings = merged(base, with_head(tmp_path / "a", head), tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert any("LlamaForCausalLM has no v_head.summary.weight" in note for note in warnings)


# --- one prefix away ------------------------------------------------------------------------------


def moved(folder: Path, before: str, after: str, **config: Any) -> Path:
    """Write the adapter of the llama under names with another prefix."""
    tensors = {key.replace(before, after): value for key, value in toys.attention().items()}
    return toys.write_adapter(folder, tensors, **config)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"task_type": "CAUSAL_LM"},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": toys.RANK}},
    ],
)
def test_an_adapter_of_the_text_alone_fits_the_model_that_sees(
    tmp_path: Path, base: Path, more: dict[str, Any]
) -> None:
    regraft.merge(base, toys.write_adapter(tmp_path / "text"), tmp_path / "plain")
    sees = toys.write_base(tmp_path / "sees", seeing(toys.llama_tensors()), eyes_config())
    adapter = toys.write_adapter(tmp_path / "a", **more)
    config, warnings = merged(sees, adapter, tmp_path / "out")
    assert any("model.* is taken for model.language_model.*" in note for note in warnings)
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    plain = toys.load_file(tmp_path / "plain" / "model.safetensors")
    found = toys.load_file(tmp_path / "out" / "model.safetensors")
    for name, value in seeing(plain).items():
        assert found[name].tobytes() == value.astype(found[name].dtype).tobytes(), name


def test_an_adapter_of_the_model_that_sees_fits_the_text_alone(tmp_path: Path, base: Path) -> None:
    regraft.merge(base, toys.write_adapter(tmp_path / "text"), tmp_path / "plain")
    adapter = moved(tmp_path / "a", "model.layers", "model.language_model.layers")
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    assert any("model.language_model.* is taken for model.*" in note for note in receipt.warnings)
    plain, found = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "out")
    )
    assert found == plain


def test_such_a_merge_is_verified_and_taken_back(tmp_path: Path) -> None:
    sees = toys.write_base(tmp_path / "sees", seeing(toys.llama_tensors()), eyes_config())
    adapter = toys.write_adapter(tmp_path / "a")
    regraft.merge(sees, adapter, tmp_path / "out")
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    before, back = ((p / "model.safetensors").read_bytes() for p in (sees, tmp_path / "back"))
    assert back == before
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == eyes_config()


def test_names_that_fit_in_several_places_are_refused(tmp_path: Path) -> None:
    config = {"architectures": ["Unheard"], "model_type": "unheard"}
    sides = ("encoder", "decoder")
    tensors = {
        f"model.{side}.layers.0.self_attn.q_proj.weight": toys.draw(WIDE, WIDE) for side in sides
    }
    base = toys.write_base(tmp_path / "base", tensors, config)
    adapter = toys.write_adapter(tmp_path / "a", toys.lora(toys.Q0, WIDE, WIDE))
    with pytest.raises(MismatchError, match="several places") as caught:
        regraft.merge(base, adapter, tmp_path / "out")
    assert "model.decoder.*, model.encoder.*" in str(caught.value)


def test_of_places_whose_names_fit_the_one_is_taken_whose_sizes_do(tmp_path: Path) -> None:
    config = {"architectures": ["Unheard"], "model_type": "unheard"}
    widths = {"encoder": WIDE + 8, "decoder": WIDE, "other": WIDE - 8}
    names = {side: f"model.{side}.layers.0.self_attn.q_proj.weight" for side in widths}
    tensors = {names[side]: toys.draw(width, width) for side, width in widths.items()}
    base = toys.write_base(tmp_path / "base", tensors, config)
    adapter = toys.write_adapter(tmp_path / "a", toys.lora(toys.Q0, WIDE, WIDE))
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    assert [r.name for r in receipt.tensors if r.action == "merge"] == [names["decoder"]]


def test_a_change_that_is_not_right_for_all_names_is_not_made(base: Path, tmp_path: Path) -> None:
    strange = moved(tmp_path / "a", "model.layers.0", "model.language_model.layers.7")
    with pytest.raises(MismatchError, match="the base has no such tensor"):
        regraft.merge(base, strange, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bert", "GPT2"])
@pytest.mark.parametrize("task", ["QUESTION_ANS", None])
def test_a_head_for_questions_answers_as_with_peft(
    tmp_path: Path, family: str, task: str | None
) -> None:
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    width = "n_embd" if family == "GPT2" else "hidden_size"
    names = ("n_layer", "n_head") if family == "GPT2" else (
        "num_hidden_layers", "num_attention_heads")  # fmt: skip
    sizes = {width: 16, **dict.fromkeys(names, 2), "vocab_size": 48, "intermediate_size": 32}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = getattr(transformers, f"{family}Config")(**sizes, **special)
    whole = "GPT2LMHeadModel" if family == "GPT2" else "BertForMaskedLM"
    getattr(transformers, whole)(config).save_pretrained(tmp_path / "base")
    cls = getattr(transformers, f"{family}ForQuestionAnswering")
    model = peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), peft.LoraConfig(
        r=2, task_type=task, init_lora_weights=False, modules_to_save=["qa_outputs"],
        target_modules=["c_attn"] if family == "GPT2" else ["query", "value"],
    )).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "a")
    found, warnings = merged(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert found["architectures"] == [cls.__name__]
    assert warnings == ()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = model(input_ids=ids)
        got = cls.from_pretrained(tmp_path / "out").eval()(input_ids=ids)
    assert torch.allclose(got.start_logits, wanted.start_logits, atol=1e-5)
    assert torch.allclose(got.end_logits, wanted.end_logits, atol=1e-5)
