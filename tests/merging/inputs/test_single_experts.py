"""Adapters of single experts meet stacks of them, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

import regraft
from merging import toys
from merging.toys import draw, lora, write_adapter

EXPERTS, HIDDEN, INTER = 3, 6, 6
SCALE = toys.ALPHA / toys.RANK
MOE = "model.layers.0.mlp.experts"
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": EXPERTS,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SIZES = {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
"""Outputs and inputs; the second is square, as in the published models."""

FORMS = ("{stack}s.{expert}", "{expert}.{stack}")


def stacks() -> dict[str, np.ndarray]:
    """Return gpt-oss's experts: weights (experts, in, out) and biases (experts, out)."""
    tensors = {}
    for name, (out, inputs) in SIZES.items():
        tensors[f"{MOE}.{name}"] = draw(EXPERTS, inputs, out)
        tensors[f"{MOE}.{name}_bias"] = draw(EXPERTS, out)
    return tensors


def singles() -> dict[str, np.ndarray]:
    """Return the same, each expert a linear layer."""
    tensors = {}
    for name, stack in stacks().items():
        leaf = "bias" if name.endswith("_bias") else "weight"
        plural = name.removesuffix("_bias") + "s"
        for expert, value in enumerate(stack):
            tensors[f"{plural}.{expert}.{leaf}"] = np.ascontiguousarray(value.T)
    return tensors


def module(stack: str, expert: int, form: str = FORMS[0]) -> str:
    return f"{MOE}.{form.format(stack=stack, expert=expert)}"


def factors(stack: str, expert: int, form: str = FORMS[0]) -> dict[str, Any]:
    return lora(module(stack, expert, form), *SIZES[stack], seed=expert)


def delta(stack: str, expert: int) -> np.ndarray:
    """Return B A of an expert, (out, in), times the scale."""
    a, b = factors(stack, expert).values()
    return np.asarray(SCALE * b @ a)


def adapter_of(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    keys = {key.removeprefix(toys.PREFIX).partition(".lora_")[0] for key in tensors}
    targets = [key.removeprefix(f"{MOE}.") for key in sorted(keys)]
    return write_adapter(folder, tensors, **{"target_modules": targets} | config)


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "fused", stacks(), GPT_OSS)


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_is_a_transposed_slice_of_its_stack(
    fused: Path, tmp_path: Path, form: str
) -> None:
    chosen = [("gate_up_proj", 0), ("gate_up_proj", 2), ("down_proj", 1)]
    pairs = [factors(stack, expert, form) for stack, expert in chosen]
    adapter = adapter_of(tmp_path / "a", {k: t for pair in pairs for k, t in pair.items()})
    regraft.merge(fused, adapter, tmp_path / "out")
    expected = stacks()
    for stack, expert in chosen:
        expected[f"{MOE}.{stack}"][expert] += delta(stack, expert).T
    found = toys.load(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_magnitudes_of_an_expert_are_those_of_its_slice(
    fused: Path, tmp_path: Path, form: str
) -> None:
    key = f"{toys.PREFIX}{module('down_proj', 1, form)}.lora_magnitude_vector"
    magnitude = 4 + draw(HIDDEN)
    tensors = {**factors("down_proj", 1, form), key: magnitude}
    adapter = adapter_of(tmp_path / "a", tensors, use_dora=True)
    regraft.merge(fused, adapter, tmp_path / "out")
    expected = stacks()[f"{MOE}.down_proj"]
    grown = expected[1].T + delta("down_proj", 1)
    expected[1] = (magnitude[:, None] / np.linalg.norm(grown, axis=1, keepdims=True) * grown).T
    np.testing.assert_allclose(toys.load(tmp_path / "out")[f"{MOE}.down_proj"], expected, atol=1e-5)


def test_biases_of_experts_are_rows_and_all_is_given_back(fused: Path, tmp_path: Path) -> None:
    key = toys.PREFIX + module("down_proj", 2)
    replaced, added = draw(HIDDEN, seed=7), draw(2 * INTER, seed=8)
    tensors = {
        **factors("down_proj", 2), f"{key}.base_layer.bias": replaced,
        **factors("gate_up_proj", 1),
        f"{toys.PREFIX}{module('gate_up_proj', 1)}.lora_B.bias": added,
    }  # fmt: skip
    adapter = adapter_of(
        tmp_path / "a", tensors, bias="lora_only", lora_bias=True,
        target_modules=["down_projs.2", "gate_up_projs.1"],
    )  # fmt: skip
    regraft.merge(fused, adapter, tmp_path / "out")
    expected = stacks()
    expected[f"{MOE}.down_proj_bias"][2] = replaced
    expected[f"{MOE}.gate_up_proj_bias"][1] += SCALE * added
    found = toys.load(tmp_path / "out")
    for name in (f"{MOE}.down_proj_bias", f"{MOE}.gate_up_proj_bias"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    before = (fused / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["single", "stacked"])
def test_a_base_may_have_its_experts_apart(tmp_path: Path, kind: str) -> None:
    base = toys.write_base(tmp_path / "apart", singles(), GPT_OSS)
    if kind == "single":
        pairs = [factors("down_proj", expert) for expert in range(EXPERTS)]
        adapter = adapter_of(tmp_path / "a", {k: t for pair in pairs for k, t in pair.items()})
        deltas = [delta("down_proj", expert) for expert in range(EXPERTS)]
    else:
        a, b = draw(EXPERTS * toys.RANK, INTER), draw(HIDDEN, toys.RANK * EXPERTS)
        keys = [f"{toys.PREFIX}{MOE}.lora_{x}.weight" for x in "AB"]
        adapter = write_adapter(
            tmp_path / "a", dict(zip(keys, (a, b), strict=True)), target_modules=[],
            target_parameters=["mlp.experts.down_proj"], peft_version="0.21.0",
        )  # fmt: skip
        per_expert = a.reshape(EXPERTS, toys.RANK, INTER), b.reshape(HIDDEN, toys.RANK, EXPERTS)
        deltas = list(SCALE * np.einsum("eri,ore->eoi", *per_expert))
    regraft.merge(base, adapter, tmp_path / "out")
    found = toys.load(tmp_path / "out")
    for expert, added in enumerate(deltas):
        name = f"{module('down_proj', expert)}.weight"
        np.testing.assert_allclose(found[name], singles()[name] + added, atol=1e-5)


def test_sizes_tell_where_the_model_is_not_known_and_squares_are_refused(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base", stacks(), config=None)
    wide = adapter_of(tmp_path / "wide", factors("gate_up_proj", 1))
    regraft.merge(base, wide, tmp_path / "out")
    expected = stacks()[f"{MOE}.gate_up_proj"]
    expected[1] += delta("gate_up_proj", 1).T
    found = toys.load(tmp_path / "out")[f"{MOE}.gate_up_proj"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    square = adapter_of(tmp_path / "square", factors("down_proj", 1))
    (problem,) = regraft.check(base, square).problems
    assert "whether the base keeps these square experts transposed" in problem.what


def test_an_expert_that_the_base_does_not_have_is_refused(fused: Path, tmp_path: Path) -> None:
    report = regraft.check(fused, adapter_of(tmp_path / "a", factors("down_proj", EXPERTS)))
    assert [problem.what for problem in report.problems] == [
        "the adapter was made for another shape"
    ]


def test_a_live_model_answers_as_the_merge_of_its_files(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS,
        num_experts_per_tok=2, max_position_embeddings=32, layer_types=["full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(tmp_path / "base")
    sizes = {"gate_up_proj": (16, 8), "down_proj": (8, 8)}
    tensors: dict[str, Any] = {}
    for number, (stack, size) in enumerate(sizes.items()):
        for expert in range(EXPERTS):
            tensors |= lora(module(stack, expert), *size, seed=number + expert)
            key = f"{toys.PREFIX}{module(stack, expert)}.lora_B.bias"
            tensors[key] = draw(size[0], seed=expert)
    magnitude = f"{toys.PREFIX}{module('down_proj', 0)}.lora_magnitude_vector"
    tensors[magnitude] = 1 + draw(8) ** 2
    adapter = write_adapter(
        tmp_path / "a", tensors, target_modules="all-linear", lora_bias=True, use_dora=True
    )
    regraft.merge(tmp_path / "base", adapter, tmp_path / "out")
    model = GptOssForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(8)[None]
    handle = regraft.attach(model, adapter)
    with torch.no_grad():
        live = model(ids).logits
        expected = GptOssForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
        torch.testing.assert_close(live, expected, atol=1e-5, rtol=1e-4)
        with handle.using([]):
            assert not torch.allclose(model(ids).logits, live, atol=1e-3)
        handle.merge_adapter()
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_live_model_may_have_its_experts_apart(tmp_path: Path) -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (torch.nn.Linear(INTER, HIDDEN) for _ in range(EXPERTS))
            self.down_projs = torch.nn.ModuleList(layers)

    model = torch.nn.ModuleDict({"experts": Experts()})
    tensors = lora("experts.down_projs.1", HIDDEN, INTER)
    regraft.attach(model, write_adapter(tmp_path / "a", tensors, target_modules=["down_projs.1"]))
    x = torch.ones(1, INTER)
    a, b = (torch.from_numpy(value) for value in tensors.values())
    layer = model["experts"].down_projs[1]
    torch.testing.assert_close(layer(x), x @ (layer.weight + SCALE * b @ a).T + layer.bias)
