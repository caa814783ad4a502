"""Any dialect to any other and back: what both can say keeps every bit, the rest is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.adapters.dialects.registry import DIALECTS
from regraft.errors import UnsupportedError, UsageError
from regraft.translating import convert_adapter

pytest.importorskip("torch")

BOTH = [name for name, dialect in DIALECTS.items() if dialect.writes and not dialect.of_images]
"""Dialects of images are for parts of pipelines; test_images has their way there and back."""

EXPERTS, INNER = 3, 12
ATTENTION = {f"self_attn.{name}_proj": (16, 16) for name in "qkvo"}
MLP = {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}


def every_layer(shapes: dict[str, tuple[int, int]], **fields: Any) -> dict[str, Any]:
    make = toys.dora if fields.get("dora") else toys.lora
    found: dict[str, Any] = {}
    for layer, (seed, (name, shape)) in itertools.product(
        range(toys.LAYERS), enumerate(shapes.items())
    ):
        found |= make(f"model.layers.{layer}.{name}", *shape, fields.get("rank", toys.RANK), seed)
    return found


def experts(shared: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    roles = {"gate": (INNER, 16), "up": (INNER, 16), "down": (16, INNER)}
    for layer, expert, (role, (out, inputs)) in itertools.product(
        range(toys.LAYERS), range(EXPERTS), roles.items()
    ):
        seed = 100 * layer + 10 * expert + (0 if shared else len(role))
        key = f"{toys.PREFIX}model.layers.{layer}.mlp.experts.{expert}.{role}_proj.lora_"
        found[f"{key}A.weight"] = toys.draw(toys.RANK, inputs, seed=seed) / 4
        found[f"{key}B.weight"] = toys.draw(out, toys.RANK, seed=seed + len(role)) / 4
    return found


def plain(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    return toys.write_adapter(folder, tensors, target_modules=targets, **config)


def mixed_ranks(folder: Path) -> Path:
    few = {f"self_attn.{name}_proj": (16, 16) for name in "qk"}
    rest = {name: shape for name, shape in ATTENTION.items() if name not in few}
    tensors = every_layer(few, rank=2) | every_layer(rest)
    return plain(folder, tensors, rank_pattern={"q_proj": 2, "k_proj": 2},
                 alpha_pattern={"v_proj": 12})  # fmt: skip


FEATURES: dict[str, Any] = {
    "attention": lambda folder: plain(folder, every_layer(ATTENTION)),
    "bfloat16": lambda folder: plain(
        folder, {k: v.astype(toys.BF16) for k, v in every_layer(ATTENTION).items()}),
    "attention and mlp": lambda folder: plain(folder, every_layer({**ATTENTION, **MLP})),
    "output layer": lambda folder: plain(
        folder, every_layer(ATTENTION) | toys.lora("lm_head", toys.VOCAB, toys.HIDDEN)),
    "several ranks and scales": mixed_ranks,
    "DoRA": lambda folder: plain(folder, every_layer(ATTENTION, dora=True), use_dora=True),
    "embedding": lambda folder: plain(
        folder, every_layer(ATTENTION)
        | dict(toys.embedding(toys.EMBED, toys.VOCAB, toys.HIDDEN))),
    "experts": lambda folder: plain(folder, experts(shared=False)),
    "experts of one A": lambda folder: plain(folder, experts(shared=True)),
    "bias of B": lambda folder: plain(
        folder, every_layer(ATTENTION) | {f"{toys.PREFIX}{toys.Q0}.lora_B.bias": toys.draw(16)},
        lora_bias=True),
    "a module of its own": lambda folder: plain(
        folder, every_layer(ATTENTION) | {f"{toys.PREFIX}model.norm.weight": toys.draw(16)},
        modules_to_save=["norm"]),
}  # fmt: skip

SAYABLE = {
    "mlx": {"attention", "bfloat16", "attention and mlp", "output layer",
            "several ranks and scales", "DoRA", "embedding", "experts", "experts of one A"},
    "torchtune": {"attention", "bfloat16", "attention and mlp", "output layer",
                  "several ranks and scales", "DoRA"},
    "litgpt": {"attention", "bfloat16", "attention and mlp", "output layer",
               "several ranks and scales"},
    "mistral": {"attention", "bfloat16", "attention and mlp", "several ranks and scales"},
    "tinker": {"attention", "bfloat16", "attention and mlp", "output layer",
               "several ranks and scales", "experts", "experts of one A"},
    "automodel": {"attention", "bfloat16", "attention and mlp", "output layer",
                  "several ranks and scales", "experts of one A"},
}  # fmt: skip
"""What dialects are known to say, so that none of it can come to be refused unseen."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Write a Llama, and a model of experts."""
    root = tmp_path_factory.mktemp("bases")
    tensors = {k: v for k, v in toys.llama_tensors().items() if ".mlp." not in k}
    for layer, expert in itertools.product(range(toys.LAYERS), range(EXPERTS)):
        key = f"model.layers.{layer}.mlp.experts.{expert}."
        shapes = {"gate": (INNER, 16), "up": (INNER, 16), "down": (16, INNER)}
        tensors |= {f"{key}{role}_proj.weight": toys.draw(*s, seed=expert, dtype=toys.BF16)
                    for role, s in shapes.items()}  # fmt: skip
    for layer in range(toys.LAYERS):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = toys.draw(3, 16, dtype=toys.BF16)
    moe = {**toys.CONFIG, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
           "num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 8}  # fmt: skip
    return {
        False: toys.write_base(root / "llama"),
        True: toys.write_base(root / "moe", tensors, moe),
    }


def deltas(folder: Path, base: Path) -> dict[str, np.ndarray]:
    """Return an adapter's tensors in PEFT's uniform form; two that say the same have the same."""
    made = folder.parent / f"{folder.name}-uniform"
    convert_adapter(folder, made, base=base, uniform=True)
    return toys.load(made)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name].astype(np.float32), other[name].astype(np.float32)) for name in one
    )


def refusal_of(adapter: Path, out: Path, to: str, base: Path) -> UnsupportedError | None:
    try:
        convert_adapter(adapter, out, to=to, base=base)
    except UnsupportedError as error:
        return error
    return None


@pytest.mark.parametrize("feature", FEATURES)
def test_any_dialect_to_any_other_and_back(
    tmp_path: Path, bases: dict[bool, Path], feature: str
) -> None:
    base = bases[feature.startswith("experts")]
    adapter = FEATURES[feature](tmp_path / "adapter")
    expected = deltas(adapter, base)
    said: dict[str, Path] = {}
    for name in BOTH:
        refused = refusal_of(adapter, tmp_path / name, name, base)
        if refused is None:
            said[name] = tmp_path / name
            continue
        assert not (tmp_path / name).exists()
        assert feature not in SAYABLE.get(name, ())
        assert all(problem.where for problem in refused.problems), "a tensor without its name"
    assert {name for name, can in SAYABLE.items() if feature in can} <= said.keys()
    for name, folder in said.items():
        assert same(deltas(folder, base), expected), name
    for one, other in itertools.permutations(said, 2):
        there = tmp_path / f"{one}-{other}"
        convert_adapter(said[one], there, to=other, base=base)
        assert same(deltas(there, base), expected), (one, other)


@pytest.mark.parametrize("name", [name for name in BOTH if name != "peft"])
def test_a_merge_is_that_of_the_same_adapter(
    tmp_path: Path, bases: dict[bool, Path], name: str
) -> None:
    adapter = FEATURES["attention and mlp"](tmp_path / "adapter")
    try:
        convert_adapter(adapter, tmp_path / name, to=name, base=bases[False])
    except (UnsupportedError, UsageError):
        pytest.skip(f"{name} has no modules of this kind")
    regraft.merge(bases[False], adapter, tmp_path / "one")
    regraft.merge(bases[False], tmp_path / name, tmp_path / "other")
    one, other = toys.load(tmp_path / "one"), toys.load(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
