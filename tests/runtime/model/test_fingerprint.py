"""Is this the base that the adapter was made for?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from regraft.adapters.fingerprint import parsed, places_of
from regraft.formats.files.reading import FilePool
from regraft.formats.hub import locate
from regraft.merging.another_base import SeenBase
from regraft.merging.inputs.base import open_base, see
from regraft.merging.inputs.source import FileSource
from regraft.runtime.model.fingerprint import (
    Parameter,
    compare,
    fingerprint_of,
    parameters_of,
    sampled,
)
from regraft.runtime.model.live_base import LiveBase
from regraft.testing import zoo

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = NF4 | {"bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}


def build(seed: int = 0) -> Any:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )
    )  # fmt: skip
    zoo.randomize(model, seed)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    build().save_pretrained(path)
    return path


def quantized(folder: Path, options: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )


def taken(model: Any) -> str:
    """Return the fingerprint of a model's projections."""
    base = LiveBase(model)
    names = [name for name in base.checkpoint.tensors if name.endswith("_proj.weight")]
    found = fingerprint_of(parameters_of(base, names))
    assert found is not None
    return found


def run(model: Any) -> Any:
    """Let a model run, at which bitsandbytes moves its weights about."""
    with torch.no_grad():
        model.eval()(torch.arange(4)[None])
    return model


def test_the_same_base_is_the_same_whatever_dtype_holds_its_values() -> None:
    model = build().bfloat16()
    found = taken(model)
    assert compare(found, LiveBase(model)) == "same"
    assert compare(found, LiveBase(model.float())) == "same"


@pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, torch.nn.Module.half])
def test_rounding_is_another_precision_both_ways(change: Callable[[Any], Any]) -> None:
    rounded = change(build())
    assert compare(taken(build()), LiveBase(rounded)) == "other precision"
    assert compare(taken(rounded), LiveBase(build())) == "other precision"


@pytest.mark.parametrize("options", [NF4, DOUBLE, FP4, INT8], ids=["nf4", "double", "fp4", "int8"])
def test_a_quantized_base_is_another_precision_before_and_after_it_runs(
    folder: Path, options: dict[str, Any]
) -> None:
    model, plain, other = quantized(folder, options), build(), build(seed=1)
    for found in (model, run(model)):
        assert compare(taken(plain), LiveBase(found)) == "other precision"
        assert compare(taken(found), LiveBase(plain)) == "other precision"
        assert compare(taken(other), LiveBase(found)) == "another"
        assert compare(taken(found), LiveBase(other)) == "another"
    assert compare(taken(model), LiveBase(model)) == "same"


@pytest.mark.parametrize("options", [NF4, DOUBLE, FP4])
def test_sampled_codes_are_decoded_as_bitsandbytes_does(
    folder: Path, options: dict[str, Any]
) -> None:
    seen = 0
    for module in quantized(folder, options).modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            whole = functional.dequantize_4bit(weight.data, weight.quant_state).flatten()
            expected = whole[places_of(whole.numel())].float().numpy()
            assert (sampled(Parameter(module, weight)) == expected).all()
            seen += 1
    assert seen == 14


def test_another_base_of_the_same_shapes_is_told() -> None:
    assert compare(taken(build()), LiveBase(build(seed=1))) == "another"


@pytest.mark.parametrize("share", [0.01, 0.003])
def test_a_fine_tuned_base_is_another_one(share: float) -> None:
    model = build()
    found = taken(model)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += share * parameter.data.std() * torch.randn_like(parameter)
    assert compare(found, LiveBase(model)) == "another"
    assert compare(found, LiveBase(model.bfloat16())) == "another"


@pytest.mark.parametrize("scale", [1.01, 0.995])
def test_a_base_of_another_scale_is_another_one(scale: float) -> None:
    model = build()
    found = taken(model)
    for parameter in model.parameters():
        parameter.data *= scale
    assert compare(found, LiveBase(model)) == "another"


def test_other_shapes_and_other_names_are_another_base() -> None:
    found = taken(build())
    assert compare(found, LiveBase(zoo.make_model("llama"))) == "another"
    assert compare(found, LiveBase(zoo.make_model("gpt2"))) == "another"


def test_a_vocabulary_that_grew_is_the_same_base() -> None:
    model = build()
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    found = fingerprint_of(parameters_of(LiveBase(model), names))
    assert found is not None
    model.resize_token_embeddings(72, mean_resizing=False)
    assert compare(found, LiveBase(model)) == "same"


@pytest.mark.parametrize(
    "architecture", ["gpt2", "mixtral", "gpt_oss", "bert_seqcls", "llava", "t5", "llama_tied"]
)
def test_files_hold_the_base_by_other_names_and_in_other_parts(
    tmp_path: Path, architecture: str
) -> None:
    model = zoo.make_model(architecture)
    live = LiveBase(model)
    text = fingerprint_of(parameters_of(live, live.checkpoint.tensors))
    assert text is not None
    model.save_pretrained(tmp_path / "same", max_shard_size="20KB")
    zoo.randomize(model, seed=5)
    model.save_pretrained(tmp_path / "other")
    assert on_files(text, tmp_path / "same") == "same"
    assert on_files(text, tmp_path / "other") == "another"


def on_files(text: str, folder: Path) -> str:
    """Return what the base in a folder is to the one of a fingerprint; every value has to count."""
    base, quantization = see(open_base(locate(folder, kind="base")))
    with FilePool() as files:
        seen = SeenBase(base, quantization, FileSource(files), at_hand=False)
        fingerprint = parsed(text)
        assert fingerprint is not None
        assert seen.compared(fingerprint) == sum(map(len, fingerprint.values))
        return seen.compare(text)


def test_the_base_without_its_head_is_the_same() -> None:
    model = build()
    assert compare(taken(model), LiveBase(model.model)) == "same"


def test_weights_that_cannot_be_read_are_left_out() -> None:
    model = build().to("meta")
    base = LiveBase(model)
    assert fingerprint_of(parameters_of(base, base.checkpoint.tensors)) is None
    assert compare(taken(build()), base) == "unknown"


def test_it_is_small_and_says_the_same_each_time() -> None:
    assert taken(build()) == taken(build())
    assert len(taken(build())) < 6000


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2}', "[1]", '"x"', "[" * 100_000])
def test_what_is_no_fingerprint_says_nothing(text: str) -> None:
    assert compare(text, LiveBase(build())) == "unknown"


BAD_SHAPES: tuple[Any, ...] = ([0], [-1, 4], ["a"], 3, [1.5], [10**30])


def test_a_damaged_fingerprint_says_nothing() -> None:
    model = build()
    fields = json.loads(taken(model))
    names = fields["sampled"]
    for change in (
        *({"values": "AAAA"}, {"values": "!"}, {"sampled": {}}, {"version": 9}, {"values": 1}),
        *({"sampled": dict.fromkeys(names, shape)} for shape in BAD_SHAPES),
    ):
        found = compare(json.dumps(fields | change), LiveBase(model))
        assert found in ("unknown", "another"), change
