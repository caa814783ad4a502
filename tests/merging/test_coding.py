"""Whatever is merged into a quantized base: out and kept, against references of other makers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes import functional
from blake3 import blake3
from transformers import AutoModelForCausalLM

import regraft
from merging import toys
from merging.quantized_bases import BASES, CONFIGS, write_quantized
from merging.test_made import plain_copy, quantized_modules, stored
from merging.test_undo import assert_restores
from merging.toys import EMBED, HIDDEN, INTER, PREFIX, Q0, VOCAB, write_adapter

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
BIASES = {f"{Q0}.bias": toys.draw(HIDDEN, seed=8, dtype=toys.BF16)}

Adapters = Callable[[Path], Any]


def small(tensors: toys.Tensors) -> dict[str, np.ndarray]:
    """Return factors whose delta is small against the steps between codes."""
    return {n: t * 0.2 if "lora_B" in n else t for n, t in tensors.items()}


def one(tensors: toys.Tensors, **config: Any) -> Adapters:
    """Return what writes one adapter into a folder."""
    return lambda folder: write_adapter(folder / "adapter", small(tensors), **config)


def several(folder: Path) -> Any:
    """Write two adapters on the same layers, and one more; return them with weights."""
    linear = toys.lora(Q0, HIDDEN, HIDDEN) | toys.lora(UP, INTER, HIDDEN, seed=3)
    first = write_adapter(folder / "one", small(linear), target_modules=["q_proj", "up_proj"])
    second = write_adapter(
        folder / "two", small(toys.dora(Q0, HIDDEN, HIDDEN, rank=2, seed=5)), r=2, lora_alpha=3,
        target_modules=["q_proj"], use_dora=True,
    )  # fmt: skip
    return [(first, 0.5), (second, 1.25), (first, -0.75)]


LINEAR = toys.lora(Q0, HIDDEN, HIDDEN) | toys.lora(DOWN, HIDDEN, INTER, seed=3)
TARGETS = ["q_proj", "down_proj"]
WHOLE = {
    f"{PREFIX}lm_head.weight": toys.draw(VOCAB, HIDDEN, seed=5),
    f"{PREFIX}{EMBED}.weight": toys.draw(VOCAB, HIDDEN, seed=6),
}
CASES: dict[str, Adapters] = {
    "lora": one(LINEAR, target_modules=TARGETS),
    "dora": one(toys.dora(Q0, HIDDEN, HIDDEN) | toys.dora(DOWN, HIDDEN, INTER, seed=4),
                target_modules=TARGETS, use_dora=True),
    "rslora": one(LINEAR, target_modules=TARGETS, use_rslora=True),
    "several": several,
    "large": lambda folder: write_adapter(folder / "adapter", LINEAR, target_modules=TARGETS,
                                          lora_alpha=40),
    "modules to save": one(LINEAR | WHOLE, target_modules=TARGETS,
                           modules_to_save=["lm_head", "embed_tokens"]),
    "token rows": one(
        LINEAR | {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": toys.draw(2, HIDDEN)},
        target_modules=TARGETS, trainable_token_indices={"embed_tokens": [3, 7]}),
    "lora bias": one(
        toys.lora(Q0, HIDDEN, HIDDEN) | {f"{PREFIX}{Q0}.lora_B.bias": toys.draw(HIDDEN, seed=9)},
        target_modules=["q_proj"], lora_bias=True),
    "embedding": one(LINEAR | dict(toys.embedding(EMBED, VOCAB, HIDDEN)),
                     target_modules=[*TARGETS, "embed_tokens"]),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Adapters:
    return CASES[request.param]


# -- references ------------------------------------------------------------------------------------


def bitsandbytes_state(tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Return the state of a 4-bit weight as bitsandbytes reads it."""
    parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    return functional.QuantState.from_dict(parts, torch.device("cpu"))


def codes_in(packed: torch.Tensor) -> np.ndarray:
    """Return 4-bit codes, the first of a byte in its upper half."""
    raw = packed.numpy().ravel()
    return np.stack([raw >> 4, raw & 15], axis=1).ravel()


def draws(seed: int, name: str, count: int) -> np.ndarray:
    """Return the numbers from 0 to 1 that stochastic rounding takes: SplitMix64, by element.

    All of it is done modulo 2**64.
    """
    key = np.uint64(int.from_bytes(blake3(f"{seed}\0{name}".encode()).digest()[:8], "little"))
    z = key + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (((z ^ (z >> np.uint64(31))) >> np.uint64(40)) / 2**24).astype(np.float32)


def rounded(values: np.ndarray, before: np.ndarray, absmax: np.ndarray, drawn: np.ndarray,
            blocksize: int) -> np.ndarray:  # fmt: skip
    """Return the codes that values are rounded to, walking from their old codes."""
    levels = functional.get_4bit_type("nf4", device="cpu").numpy()
    grids = (levels * absmax[:, None]).astype(ml_dtypes.bfloat16).astype(np.float32)
    found = before.copy()
    for at, (value, code, chance) in enumerate(zip(values, before, drawn, strict=True)):
        grid = grids[at // blocksize]
        step = 1 if value > grid[code] else -1
        near = int(code)
        while 0 <= near + step < 16 and (value - grid[near + step]) * step >= 0:
            near += step
        if 0 <= near + step < 16 and value != grid[near]:
            share = np.float32(value - grid[near]) / np.float32(grid[near + step] - grid[near])
            near += step * bool(chance < share)
        found[at] = near
    return found


# -- out -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4, double", "int8"])
def test_a_merge_out_is_that_into_the_dequantized_base(
    tmp_path: Path, case: Adapters, kind: str
) -> None:
    base, adapters = write_quantized(tmp_path / "base", kind, BIASES), case(tmp_path)
    regraft.dequantize(base, tmp_path / "plain")
    for dtype in (None, "float32"):
        direct, later = tmp_path / f"direct-{dtype}", tmp_path / f"later-{dtype}"
        regraft.merge(base, adapters, direct, dtype=dtype, undo=False)
        regraft.merge(tmp_path / "plain", adapters, later, dtype=dtype, undo=False)
        for path in later.glob("*.safetensors"):
            assert path.read_bytes() == (direct / path.name).read_bytes()


# -- kept ------------------------------------------------------------------------------------------


@cache
def merged_exactly(case: Adapters, kind: str) -> dict[str, torch.Tensor]:
    """Return what a merge of a case into a base of a kind gives in float32."""
    with tempfile.TemporaryDirectory() as place:
        base, adapters = write_quantized(Path(place, "base"), kind, BIASES), case(Path(place))
        regraft.merge(base, adapters, Path(place, "exact"), dtype="float32", undo=False)
        return stored(Path(place, "exact"))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "nf4, blocks of 128"])
def test_kept_codes_are_those_that_the_rule_gives(
    tmp_path: Path, case: Adapters, kind: str, rounding: str
) -> None:
    base, adapters = write_quantized(tmp_path / "base", kind, BIASES), case(tmp_path)
    receipt = regraft.merge(
        base, adapters, tmp_path / "kept", quantize="keep", rounding=rounding, seed=11
    )
    before, after, exact = stored(base), stored(tmp_path / "kept"), merged_exactly(case, kind)
    merged = [record.name for record in receipt.tensors if record.codes]
    assert f"{Q0}.weight" in merged
    moved = 0
    for name in merged:
        state = bitsandbytes_state(before, name)
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        values, old = exact[name].numpy().ravel(), codes_in(before[name])
        drawn = np.full(values.size, 0.5, np.float32)
        if rounding == "stochastic":
            drawn = draws(11, name, values.size)
        expected = rounded(values, old, absmax.numpy(), drawn, state.blocksize)
        assert np.array_equal(codes_in(after[name]), expected), name
        moved += int(np.count_nonzero(expected != old))
    assert moved
    plain = {record.name for record in receipt.tensors if record.action != "copy"} - {*merged}
    for name in plain:  # what is not quantized is merged as it always is
        direct = exact[name].to(after[name].dtype)
        assert torch.equal(after[name], direct), name


LOADS = ("nf4", "nf4, double", "nf4, blocks of 128", "fp4, double", "int8")
"""Kinds that transformers keeps quantized on a CPU. GPTQ and AWQ need GPTQModel, fp8 a GPU; packed
zeros of compressed-tensors it does not load, those of the base neither (5.23)."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADS)
def test_what_was_kept_is_read_by_its_library_as_by_regraft(tmp_path: Path, kind: str) -> None:
    transformers.logging.disable_progress_bar()
    base, adapters = write_quantized(tmp_path / "base", kind), several(tmp_path)
    regraft.merge(base, adapters, tmp_path / "kept", quantize="keep")
    regraft.dequantize(tmp_path / "kept", tmp_path / "plain")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "kept", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(quantized_modules(theirs)) == 14
    ours = stored(tmp_path / "plain")
    for name, weight in plain_copy(theirs).items():
        assert torch.equal(weight.to(ours[name].dtype), ours[name]), name
    assert CONFIGS[BASES[kind][0]] == toys.read_json(tmp_path / "kept" / "config.json")[
        "quantization_config"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp4, double", "int8", "fp8"])
def test_kept_codes_are_beside_the_merged_values(tmp_path: Path, case: Adapters, kind: str) -> None:
    """No code lies between a value and its code, whatever the format."""
    base, adapters = write_quantized(tmp_path / "base", kind, BIASES), case(tmp_path)
    found = {}
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / rounding
        regraft.merge(base, adapters, out, quantize="keep", rounding=rounding)
        regraft.dequantize(out, tmp_path / f"{rounding}-plain", dtype="float32")
        found[rounding] = stored(tmp_path / f"{rounding}-plain")
        assert_restores(base, out, tmp_path)
        (tmp_path / "back").rename(tmp_path / f"{rounding}-back")
    exact = merged_exactly(case, kind)
    for name in (f"{Q0}.weight",):
        nearest, chance = ((found[r][name] - exact[name]).abs() for r in ("nearest", "stochastic"))
        assert (chance >= nearest).all()
        assert chance.sum() > nearest.sum()
