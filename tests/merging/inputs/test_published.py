"""Experts that a quantized base stores apart come out as the stacks that their class reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

import regraft
from merging import toys
from merging.quantized_bases import four_bit, int8
from merging.toys import draw, lora, write_adapter
from regraft.adapters.fingerprint import KEY, Fingerprint, places_of
from regraft.errors import MismatchError
from regraft.merging.inputs import dequantized_view as quantized
from regraft.merging.inputs import stacking

EXPERTS, HIDDEN, INTER = 3, 64, 48
SCALE = toys.ALPHA / toys.RANK
MOE = "model.layers.0.mlp.experts"
ROUTER = "model.layers.0.mlp.router"
Q_PROJ = "model.layers.0.self_attn.q_proj"
SIZES = {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
"""Outputs and inputs."""
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss as it is published, in 16 bits, with experts whose values NF4 can say."""
    config = GptOssConfig(
        vocab_size=32, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=1, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS,
        num_experts_per_tok=2, max_position_embeddings=32, layer_types=["full_attention"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    made = GptOssForCausalLM(config).to(torch.bfloat16)
    state = made.state_dict()
    for name, value in state.items():
        if "experts" in name or "router" in name:
            value.copy_(torch.randn(value.shape))
    for stack in SIZES:
        for expert in state[f"{MOE}.{stack}"]:
            packed, how = functional.quantize_4bit(expert.T.contiguous(), quant_type="nf4")
            expert.copy_(functional.dequantize_4bit(packed, how).T)
    folder = tmp_path_factory.mktemp("published")
    made.save_pretrained(folder)
    return folder


def apart(published: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as Unsloth names them."""
    for name, value in published.items():
        if ".experts." not in name:
            yield name.replace(".router.", ".router.linear."), value
            continue
        leaf = "bias" if name.endswith("_bias") else "weight"
        for number, expert in enumerate(value):
            plain = expert if leaf == "bias" else expert.T.contiguous()
            yield f"{name.removesuffix('_bias')}s.{number}.{leaf}", plain


def write(folder: Path, model: Path, quantize: Any = None, **config: Any) -> Path:
    """Write a model as Unsloth saves it in 4 bits, in two files."""
    quantize = quantize or four_bit("nf4", nested=False)
    stored: Tensors = {}
    for name, value in apart(load_file(model / "model.safetensors")):
        coded = ".experts." in name and name.endswith(".weight")
        stored |= quantize(name, value) if coded else {name: value.clone()}
    folder.mkdir()
    weight_map = {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        half = {k: v.contiguous() for k, v in sorted(stored.items())[number::2]}
        save_file(half, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    toys.write_json(folder / toys.INDEX, {"metadata": {}, "weight_map": weight_map})
    settings = json.loads((model / "config.json").read_text()) | {"quantization_config": BNB}
    toys.write_json(folder / "config.json", settings | config)
    return folder


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("apart") / "base", model)


def of_singles(folder: Path) -> Path:
    """Write an adapter of attention and of single experts, with biases."""
    tensors: dict[str, Any] = lora(Q_PROJ, 8, HIDDEN)
    for stack, expert in (("gate_up_proj", 0), ("gate_up_proj", 2), ("down_proj", 1)):
        module = f"{MOE}.{stack}s.{expert}"
        tensors |= lora(module, *SIZES[stack], seed=expert)
        tensors[f"{toys.PREFIX}{module}.lora_B.bias"] = draw(SIZES[stack][0], seed=expert)
    targets = ["q_proj", "gate_up_projs.0", "gate_up_projs.2", "down_projs.1"]
    return write_adapter(folder, tensors, target_modules=targets, lora_bias=True)


def of_stacks(folder: Path) -> Path:
    """Write an adapter that PEFT's ``target_parameters`` made for the published model."""
    rank, tensors = toys.RANK, {}
    for stack, layer in (("down_proj", ""), ("gate_up_proj", ".base_layer")):
        out, inputs = SIZES[stack]
        key = f"{toys.PREFIX}{MOE}{layer}"
        tensors[f"{key}.lora_A.weight"] = draw(EXPERTS * rank, inputs, seed=out) / 4
        tensors[f"{key}.lora_B.weight"] = draw(out, EXPERTS * rank, seed=inputs) / 4
    parameters = [f"mlp.experts.{stack}" for stack in SIZES]
    return write_adapter(
        folder, tensors, target_modules=[], target_parameters=parameters, peft_version="0.21.0"
    )


def of_attention(folder: Path) -> Path:
    return write_adapter(folder, lora(Q_PROJ, 8, HIDDEN), target_modules=["q_proj"])


ADAPTERS = {"single experts": of_singles, "stacks": of_stacks, "attention": of_attention}


def merged_by_hand(model: Path, kind: str) -> dict[str, np.ndarray]:
    """Return the published weights with the delta of single experts added by numpy."""
    tensors = {k: v.float().numpy() for k, v in load_file(model / "model.safetensors").items()}
    a, b = lora(Q_PROJ, 8, HIDDEN).values()
    if kind != "stacks":
        tensors[f"{Q_PROJ}.weight"] += SCALE * b @ a
    if kind == "single experts":
        for stack, expert in (("gate_up_proj", 0), ("gate_up_proj", 2), ("down_proj", 1)):
            a, b = lora("x", *SIZES[stack], seed=expert).values()
            tensors[f"{MOE}.{stack}"][expert] += (SCALE * b @ a).T
            tensors[f"{MOE}.{stack}_bias"][expert] += SCALE * draw(SIZES[stack][0], seed=expert)
    return tensors


def merged_by_peft(model: Path, adapter: Path) -> dict[str, np.ndarray]:
    """Return the published weights as PEFT merges them in float32."""
    loaded = GptOssForCausalLM.from_pretrained(model, dtype=torch.float32)
    done = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    return {name: value.numpy() for name, value in done.state_dict().items()}


def loaded(folder: Path) -> Tensors:
    """Load a model with transformers, which has to find all tensors, and only these."""
    found, info = GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state: Tensors = found.state_dict()
    return state


@pytest.mark.parametrize("kind", ADAPTERS)
def test_any_adapter_on_experts_apart_comes_out_as_published(
    model: Path, base: Path, tmp_path: Path, kind: str
) -> None:
    adapter = ADAPTERS[kind](tmp_path / "a")
    assert regraft.check(base, adapter).ok
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    assert not receipt.warnings
    by_peft = kind != "single experts"
    expected = merged_by_peft(model, adapter) if by_peft else merged_by_hand(model, kind)
    found = loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounded = torch.from_numpy(value).bfloat16()
        torch.testing.assert_close(found[name], rounded, rtol=2**-7, atol=2**-9, msg=name)
    assert regraft.verify(tmp_path / "out", base=base, adapters=adapter).verdict == "exact"
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    for path in base.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_without_an_adapter_the_weights_are_those_that_were_quantized(
    model: Path, base: Path, tmp_path: Path
) -> None:
    regraft.dequantize(base, tmp_path / "out")
    found, expected = loaded(tmp_path / "out"), load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_model_merged_at_load_is_the_merge(base: Path, tmp_path: Path) -> None:
    adapter = of_singles(tmp_path / "a")
    regraft.merge(base, adapter, tmp_path / "out")
    found, expected = regraft.load_merged(base, adapter).state_dict(), loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_experts_are_the_same_whatever_is_turned_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = of_singles(tmp_path / "a")
    regraft.merge(base, adapter, tmp_path / "one", dtype="float32")
    monkeypatch.setattr(quantized, "BAND_BYTES", 5 * 2 * INTER * 2)
    monkeypatch.setattr(stacking, "_STRIP", 3 * INTER)
    monkeypatch.setattr("regraft.merging.planning.planner.LARGEST_TILE", 0)
    monkeypatch.setattr("regraft.merging.planning.planner.SMALLEST_TILE", 4096)
    monkeypatch.setattr(stacking, "_FEW", 1)
    for threads in (1, 8):
        regraft.merge(base, adapter, tmp_path / f"{threads}", dtype="float32", threads=threads)
        for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            assert (tmp_path / f"{threads}" / file).read_bytes() == (
                tmp_path / "one" / file
            ).read_bytes()


# -- other ways in and out -------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [four_bit("fp4", nested=True), int8])
def test_every_format_of_single_experts_is_stacked(
    model: Path, tmp_path: Path, quantize: Any
) -> None:
    kind = {"load_in_8bit": True} if quantize is int8 else BNB | {"bnb_4bit_quant_type": "fp4"}
    settings = kind | {"quant_method": "bitsandbytes"}
    base = write(tmp_path / "base", model, quantize, quantization_config=settings)
    regraft.dequantize(base, tmp_path / "out", dtype="bfloat16")
    found, expected = loaded(tmp_path / "out"), load_file(model / "model.safetensors")
    for name, value in expected.items():
        close = {"rtol": 0.3, "atol": 1.0} if ".experts." in name else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[name], value, **close, msg=name)
    regraft.merge(base, of_attention(tmp_path / "a"), tmp_path / "merged")
    regraft.unmerge(tmp_path / "merged", tmp_path / "back")
    for path in base.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_merge_out_is_swapped_for_another(base: Path, tmp_path: Path) -> None:
    one, other = of_singles(tmp_path / "one"), of_stacks(tmp_path / "other")
    regraft.merge(base, one, tmp_path / "merged")
    regraft.swap(tmp_path / "merged", other, tmp_path / "swapped")
    regraft.swap(tmp_path / "merged", other, tmp_path / "kept", quantize="keep")
    for folder, options in (("swapped", {}), ("kept", {"quantize": "keep"})):
        regraft.merge(base, other, tmp_path / f"as {folder}", **options)
        for path in (tmp_path / f"as {folder}").glob("*.safetensors"):
            assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()


def test_the_format_that_is_kept_keeps_the_names(base: Path, tmp_path: Path) -> None:
    adapter = of_singles(tmp_path / "a")
    receipt = regraft.merge(base, adapter, tmp_path / "out", quantize="keep")
    assert any("looks for" in note and "gate_up_projs" in note for note in receipt.warnings)
    assert toys.load(tmp_path / "out").keys() == toys.load(base).keys()


def test_in_another_format_stacks_stay_plain(base: Path, tmp_path: Path) -> None:
    adapter = of_singles(tmp_path / "a")
    regraft.merge(base, adapter, tmp_path / "plain")
    regraft.merge(base, adapter, tmp_path / "int8", quantize="int8")
    plain, found = toys.load(tmp_path / "plain"), toys.load(tmp_path / "int8")
    for name in plain:
        if ".mlp." in name:
            np.testing.assert_array_equal(found[name], plain[name])
    assert f"{Q_PROJ}.SCB" in found


def test_the_base_of_training_may_have_its_experts_apart(
    model: Path, base: Path, tmp_path: Path
) -> None:
    adapter = of_singles(tmp_path / "a")
    for number, into in enumerate((model, base)):
        receipt = regraft.merge(into, adapter, tmp_path / f"{number}", trained_on=base)
        gaps = [tensor.base_gap for tensor in receipt.tensors if tensor.base_gap is not None]
        assert len(gaps) == 5
        assert not any(gaps)


@pytest.mark.parametrize("saved", [False, True])
def test_a_router_in_a_linear_layer_is_the_router(
    model: Path, base: Path, tmp_path: Path, saved: bool
) -> None:
    expected = load_file(model / "model.safetensors")[f"{ROUTER}.weight"].float().numpy()
    module = f"{ROUTER}.linear"
    if saved:
        new = draw(EXPERTS, HIDDEN, seed=5)
        tensors: dict[str, Any] = {f"{toys.PREFIX}{module}.weight": new}
        tensors |= lora(Q_PROJ, 8, HIDDEN)
        modules = {"target_modules": ["q_proj"], "modules_to_save": ["router.linear"]}
        adapter, expected = write_adapter(tmp_path / "a", tensors, **modules), new
    else:
        tensors = lora(module, EXPERTS, HIDDEN)
        adapter = write_adapter(tmp_path / "a", tensors, target_modules=["router.linear"])
        a, b = tensors.values()
        expected = expected + SCALE * b @ a
    for number, into in enumerate((base, model)):
        regraft.merge(into, adapter, tmp_path / f"{number}")
        found = loaded(tmp_path / f"{number}")[f"{ROUTER}.weight"].float().numpy()
        np.testing.assert_allclose(found, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("same", [True, False])
def test_a_fingerprint_of_the_published_model_is_compared(
    model: Path, base: Path, tmp_path: Path, same: bool
) -> None:
    """Also by the merge at load, which sees the stacks."""
    names = [f"{MOE}.{stack}" for stack in SIZES]
    there = load_file(model / "model.safetensors")
    values = [(there[n] if same else -there[n]).float().numpy() for n in names]
    taken = tuple(value.ravel()[places_of(value.size)] for value in values)
    text = Fingerprint({n: tuple(there[n].shape) for n in names}, taken, coded=False).to_text()
    adapter = of_attention(tmp_path / "a")
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", KEY: text})
    for call in (regraft.check, regraft.load_merged):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", regraft.BaseMismatchWarning)
            call(base, adapter)
        found = [w for w in caught if issubclass(w.category, regraft.BaseMismatchWarning)]
        assert bool(found) is not same


# -- what is refused -------------------------------------------------------------------------------

Edit = Callable[[Tensors], Any]
DOWN, GATE_UP = f"{MOE}.down_projs", f"{MOE}.gate_up_projs"

EDITS: dict[str, tuple[Edit, str]] = {
    "one in the middle lacks": (
        lambda t: t.pop(f"{DOWN}.1.bias"),
        "down_proj_bias: .* expected experts 0 to 2, each once; found 0, 2",
    ),
    "the last lacks": (
        lambda t: [t.pop(name) for name in list(t) if f"{GATE_UP}.2.weight" in name],
        "gate_up_proj: .* expected experts 0 to 2, each once; found 0, 1",
    ),
    "all biases lack": (
        lambda t: [t.pop(f"{DOWN}.{e}.bias") for e in range(EXPERTS)],
        "down_proj_bias: .* expected these parameters of its experts; found nothing",
    ),
    "shapes differ": (
        lambda t: t.update({f"{DOWN}.1.bias": torch.zeros(5, dtype=torch.bfloat16)}),
        r"down_proj_bias: .* expected one shape and dtype; found BF16 \[5\], BF16 \[64\]",
    ),
    "dtypes differ": (
        lambda t: t.update({f"{DOWN}.1.bias": torch.zeros(HIDDEN)}),
        r"down_proj_bias: .* expected one shape and dtype; found BF16 \[64\], F32 \[64\]",
    ),
    "numbers": (
        lambda t: t.update({f"{DOWN}.{e}.bias": torch.zeros(HIDDEN).int() for e in range(3)}),
        r"down_proj_bias: .* expected F32 or BF16 or F16 of 1 axes.*; found I32 \[64\]",
    ),
    "both": (
        lambda t: t.update({f"{MOE}.down_proj_bias": torch.zeros(EXPERTS, HIDDEN)}),
        "down_proj_bias: .* expected single experts or a stack of them; found both",
    ),
    "twice": (
        lambda t: t.update({f"{MOE}.1.down_proj.bias": t[f"{DOWN}.1.bias"].clone()}),
        "down_proj_bias: .* expected experts 0 to 2, each once; found 0, 1, 1, 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", EDITS)
def test_experts_that_make_up_no_stack_are_refused_and_named(
    base: Path, tmp_path: Path, kind: str
) -> None:
    edit, message = EDITS[kind]
    tensors: Tensors = {}
    for path in base.glob("*.safetensors"):
        tensors |= load_file(path)
    edit(tensors)
    broken, adapter = tmp_path / "broken", of_attention(tmp_path / "a")
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(MismatchError, match=message) as caught:
        regraft.merge(broken, adapter, tmp_path / "out")
    assert "--quantize keep" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not regraft.check(broken, adapter).ok
    assert regraft.check(broken, adapter, quantize="keep").ok
