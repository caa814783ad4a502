"""Every merged element is the float64 result rounded once; every other tensor is the base's bytes.

The expectation is computed from the stored bytes in float64, by formulas written out here. What is
allowed: half a unit in the last place of the output's dtype, for the one rounding, and the rounding
of float32 arithmetic, which shows only where W and the delta all but cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from faithful.cases import lora
from faithful.harness import Workshop
from regraft.testing.adapters import cast_adapter

DTYPES = ("float32", "bfloat16", "float16")
FRACTION_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}
SMALLEST_EXPONENT = {"float32": -126, "bfloat16": -126, "float16": -14}
SLACK = 8 * 2.0**-24
"""Roundings of float32 allowed, as a share of the terms' absolute values."""

PREFIX = "base_model.model."
SCALE = 6 / 4

Exact = tuple[np.ndarray, np.ndarray]
"""A float64 result, and the sum of the absolute values of the terms it was added up from."""


def tensors(folder: Path) -> dict[str, Any]:
    """Return every tensor in the safetensors files of ``folder``, as torch tensors."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def exact(folder: Path) -> dict[str, np.ndarray]:
    """Return every tensor of ``folder`` in float64."""
    return {name: tensor.double().numpy() for name, tensor in tensors(folder).items()}


def added(weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> Exact:
    """Return W + s B A and the size of its terms."""
    return weight + SCALE * (b @ a), np.abs(weight) + SCALE * (np.abs(b) @ np.abs(a))


def linear(weight: np.ndarray, adapter: Mapping[str, np.ndarray], name: str) -> Exact:
    """Return the merged weight of a linear layer, with DoRA where the adapter has a magnitude."""
    a, b = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
    total, size = added(weight, a, b)
    magnitude = adapter.get(f"{name}.lora_magnitude_vector")
    if magnitude is None:
        return total, size
    factor = (magnitude / np.linalg.norm(total, axis=1))[:, None]
    return factor * total, np.abs(factor) * size


def embedding(weight: np.ndarray, adapter: Mapping[str, np.ndarray], name: str) -> Exact:
    """Return the merged table; DoRA's norm there runs over the vocabulary, per dimension."""
    a, b = adapter[f"{name}.lora_embedding_A"], adapter[f"{name}.lora_embedding_B"]
    total, size = added(weight, b.T, a.T)
    magnitude = adapter.get(f"{name}.lora_magnitude_vector")
    if magnitude is None:
        return total, size
    factor = (magnitude / np.linalg.norm(total, axis=0))[None, :]
    return factor * total, np.abs(factor) * size


def llama_expectation(base: Path, adapter: Path) -> dict[str, Exact]:
    """Return the merged tensors of a llama, by name in the checkpoint."""
    weights, pairs = exact(base), exact(adapter)
    merged = {}

    def starting_weight(name: str) -> np.ndarray:
        """A targeted embedding or head travels in the adapter, and PEFT then starts from that."""
        return pairs.get(f"{PREFIX}{name}.base_layer.weight", weights[f"{name}.weight"])

    for key in pairs:
        name, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        if kind == "A.weight":
            merged[f"{name}.weight"] = linear(starting_weight(name), pairs, PREFIX + name)
        if kind == "embedding_A":
            merged[f"{name}.weight"] = embedding(starting_weight(name), pairs, PREFIX + name)
    return merged


def expert_factors(
    adapter: Mapping[str, np.ndarray], key: str, experts: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (A, B) per expert: A is stored expert by expert, B interleaves them rank by rank."""
    a, b = adapter[f"{key}.lora_A.weight"], adapter[f"{key}.lora_B.weight"]
    return [(a.reshape(experts, -1, a.shape[1])[e], b[:, e::experts]) for e in range(experts)]


def mixtral_expectation(base: Path, adapter: Path) -> dict[str, Exact]:
    """Return the merged experts of a Mixtral in its per-expert names."""
    weights, pairs = exact(base), exact(adapter)
    merged = {}
    for layer in range(2):
        key = f"{PREFIX}model.layers.{layer}.mlp.experts"
        fused = expert_factors(pairs, f"{key}.base_layer", 3)
        down = expert_factors(pairs, key, 3)
        for expert in range(3):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            (a, b), rows = fused[expert], fused[expert][1].shape[0] // 2
            for leaf, factors in {
                "w1": (a, b[:rows]),
                "w3": (a, b[rows:]),
                "w2": down[expert],
            }.items():
                merged[f"{name}.{leaf}.weight"] = added(weights[f"{name}.{leaf}.weight"], *factors)
    return merged


def gpt_oss_expectation(base: Path, adapter: Path) -> dict[str, Exact]:
    """Return the merged experts of a gpt-oss, which stores them (experts, in, out)."""
    weights, pairs = exact(base), exact(adapter)
    merged = {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        for leaf, key in {"gate_up_proj": f"{name}.base_layer", "down_proj": name}.items():
            weight = weights[f"{name}.{leaf}"]
            parts = [
                added(weight[e].T, a, b)
                for e, (a, b) in enumerate(expert_factors(pairs, PREFIX + key, 3))
            ]
            total, size = (np.stack([part[side].T for part in parts]) for side in (0, 1))
            merged[f"{name}.{leaf}"] = total, size
    return merged


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS: dict[str, tuple[str, Mapping[str, Any], Any]] = {
    "linear": ("llama", lora(["q_proj", "down_proj", "lm_head"]), llama_expectation),
    "embedding": ("llama", lora(["embed_tokens", "v_proj"]), llama_expectation),
    "dora": ("llama", lora(["k_proj", "up_proj"], use_dora=True), llama_expectation),
    "dora-embedding": ("llama", lora(["embed_tokens"], use_dora=True), llama_expectation),
    "experts-apart": ("mixtral", lora([], **EXPERTS), mixtral_expectation),
    "experts-fused": ("gpt_oss", lora([], **EXPERTS), gpt_oss_expectation),
}


def half_ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return half the distance between the neighbours of ``values`` in ``dtype``."""
    exponents = np.frexp(values)[1] - 1
    exponents = np.maximum(exponents, SMALLEST_EXPONENT[dtype])
    return np.ldexp(0.5, exponents - FRACTION_BITS[dtype])


def assert_rounded(merged: Any, expected: Exact, dtype: str, name: str) -> None:
    """Fail unless each element of ``merged`` is ``expected`` rounded once to ``dtype``."""
    values, size = expected
    assert str(merged.dtype) == f"torch.{dtype}", name
    assert tuple(merged.shape) == values.shape, name
    error = np.abs(merged.double().numpy() - values)
    allowed = half_ulp(values, dtype) + SLACK * size
    worst = np.max(error / allowed)
    assert worst <= 1, f"{name}: off by {worst:.2f} of what rounding allows"


def assert_untouched(merged: Any, base: Any, dtype: str, name: str) -> None:
    """Fail unless ``merged`` is ``base``, bit for bit, cast to ``dtype`` if it was another."""
    import torch

    expected = base.to(getattr(torch, dtype)) if base.is_floating_point() else base
    assert merged.dtype == expected.dtype, name
    bits = torch.int32 if merged.element_size() == 4 else torch.int16
    assert torch.equal(merged.view(bits), expected.view(bits)), name


def check(kind: str, workshop: Workshop, stored: str, trained: str, dtype: str | None) -> None:
    """Merge and compare every tensor of the output."""
    architecture, config, expectation = KINDS[kind]
    base = workshop.base(architecture, stored)
    adapter = workshop.adapter(base, config)
    adapter = cast_adapter(adapter, workshop.fresh("cast"), trained)
    out = workshop.fresh("rounded")
    regraft.merge(base, adapter, out, dtype=dtype, threads=1)
    before, after, changed = tensors(base), tensors(out), expectation(base, adapter)
    assert changed
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name in changed:
            assert_rounded(tensor, changed[name], dtype or stored, name)
        else:
            assert_untouched(tensor, before[name], dtype or stored, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_in_the_bases_dtype(kind: str, stored: str, trained: str, workshop: Workshop) -> None:
    check(kind, workshop, stored, trained, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(stored, dtype) for stored in DTYPES for dtype in DTYPES if stored != dtype],
)
def test_in_a_chosen_dtype(kind: str, stored: str, dtype: str, workshop: Workshop) -> None:
    check(kind, workshop, stored, "float32", dtype)
