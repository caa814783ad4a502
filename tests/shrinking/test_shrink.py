"""``regraft.shrink``: dtypes, ranks, and kinds of layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from shrinking.small import (
    EXPERTS,
    MODULES,
    OUT,
    RANK,
    STACK,
    WIDTH,
    Arrays,
    best,
    config_of,
    lowrank,
    product,
    stack,
    write_adapter,
)

# -- dtype


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bfloat16", toys.BF16), ("bf16", toys.BF16), ("fp16", np.float16), ("fp32", np.float32)],
)
def test_factors_are_rounded_once_and_the_config_stays_byte_for_byte(
    tmp_path: Path, dtype: str, kind: Any
) -> None:
    adapter = write_adapter(tmp_path / "a", made_up={"x": 1})
    report = regraft.shrink(adapter, tmp_path / "s", dtype=dtype)
    new = toys.load(tmp_path / "s")
    old = toys.load(adapter)
    assert new.keys() == old.keys()
    for name, values in old.items():
        assert new[name].dtype == kind
        assert new[name].tobytes() == values.astype(kind).tobytes()
    name = "adapter_config.json"
    assert (tmp_path / "s" / name).read_bytes() == (adapter / name).read_bytes()
    for module in report.modules:
        delta, rounded = product(old, module.name), product(new, module.name)
        assert module.delta_norm == pytest.approx(1.5 * np.linalg.norm(delta), rel=1e-12)
        error = np.linalg.norm(delta - rounded) / np.linalg.norm(delta)
        assert module.error == pytest.approx(error, rel=1e-9)
    assert (report.error == 0) == (kind is np.float32)
    assert report.dtypes_before == ("float32",)


def test_the_default_is_bfloat16(tmp_path: Path) -> None:
    report = regraft.shrink(write_adapter(tmp_path / "a"), tmp_path / "s")
    assert report.dtype == "bfloat16"
    assert {t.dtype for t in toys.load(tmp_path / "s").values()} == {np.dtype(toys.BF16)}
    assert all(m.rank_after == m.rank_before == 8 and m.kept == 1 for m in report.modules)


def test_the_header_is_the_reference_librarys(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = lowrank() | {f"{toys.PREFIX}score.weight": toys.draw(3, 5)}
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["score"])
    regraft.shrink(adapter, tmp_path / "s", dtype="float32")
    save_file(tensors, tmp_path / "expected", {"format": "pt"})
    written = (tmp_path / "s" / "adapter_model.safetensors").read_bytes()
    assert written == (tmp_path / "expected").read_bytes()


def test_only_wider_tensors_besides_the_factors_are_rounded(tmp_path: Path) -> None:
    score, norm = f"{toys.PREFIX}score.weight", f"{toys.PREFIX}norm.weight"
    rows = f"{toys.PREFIX}{toys.EMBED}.token_adapter.trainable_tokens_delta"
    tensors = lowrank() | {
        score: toys.draw(3, 5),
        norm: toys.draw(7, dtype=np.float16),
        rows: toys.draw(2, 16),
    }
    adapter = write_adapter(
        tmp_path / "a", tensors, modules_to_save=["score", "norm"], trainable_token_indices=[3, 5]
    )
    regraft.shrink(adapter, tmp_path / "s")
    new = toys.load(tmp_path / "s")
    assert new[score].tobytes() == tensors[score].astype(toys.BF16).tobytes()
    assert new[rows].tobytes() == tensors[rows].astype(toys.BF16).tobytes()
    assert new[norm].dtype == np.float16
    assert np.array_equal(new[norm], tensors[norm])


def test_magnitudes_stay_and_the_report_says_what_the_error_is_of(tmp_path: Path) -> None:
    magnitude = f"{toys.PREFIX}{MODULES[0]}.lora_magnitude_vector"
    tensors = lowrank() | {magnitude: toys.draw(WIDTH)}
    adapter = write_adapter(tmp_path / "a", tensors, use_dora=True)
    report = regraft.shrink(adapter, tmp_path / "s", rank=3)
    new = toys.load(tmp_path / "s")
    assert new[magnitude].dtype == np.float32
    assert np.array_equal(new[magnitude], tensors[magnitude])
    assert any("DoRA" in note for note in report.notes)


# -- rank


def test_a_lower_rank_is_the_best_there_is_at_the_scale_there_was(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    report = regraft.shrink(adapter, tmp_path / "s", rank=3, dtype="float32")
    old, new = toys.load(adapter), toys.load(tmp_path / "s")
    for module in report.modules:
        delta = product(old, module.name)
        wanted = best(delta, 3)
        assert np.allclose(product(new, module.name), wanted, atol=1e-6 * np.linalg.norm(delta))
        error = np.linalg.norm(delta - wanted) / np.linalg.norm(delta)
        assert module.error == pytest.approx(error, rel=1e-4)
        assert module.kept == pytest.approx(1 - error**2, rel=1e-6)
    squares = [(m.error_norm**2, m.delta_norm**2) for m in report.modules]
    whole = math.sqrt(sum(e for e, _ in squares) / sum(d for _, d in squares))
    assert report.error == pytest.approx(whole)
    assert config_of(tmp_path / "s") == config_of(adapter) | {"r": 3, "lora_alpha": 4.5}


def test_the_merge_is_that_of_the_best_approximations(tmp_path: Path) -> None:
    base = toys.llama_tensors(np.float32)
    folder = toys.write_base(tmp_path / "base", base)
    adapter = toys.write_adapter(tmp_path / "a", toys.attention(rank=6), r=6)
    regraft.shrink(adapter, tmp_path / "s", rank=2, dtype="float32")
    regraft.merge(folder, adapter, tmp_path / "m", dtype="float32")
    regraft.merge(folder, tmp_path / "s", tmp_path / "ms", dtype="float32")
    whole, reduced = toys.load(tmp_path / "m"), toys.load(tmp_path / "ms")
    for module in MODULES:
        name = f"{module}.weight"
        wanted = base[name] + best(whole[name] - base[name].astype(np.float64), 2)
        assert np.abs(wanted - base[name]).max() > 0.1
        assert np.allclose(reduced[name], wanted, atol=2e-6)


def test_a_rank_that_is_not_lower_leaves_a_module_as_it_is(tmp_path: Path) -> None:
    tensors = lowrank(MODULES[:2], rank=8) | lowrank(MODULES[2:], rank=2)
    patterns = {"layers.1.self_attn.q_proj": 2, "layers.1.self_attn.v_proj": 2}
    adapter = write_adapter(tmp_path / "a", tensors, rank_pattern=patterns)
    report = regraft.shrink(adapter, tmp_path / "s", rank=4, uniform=False)
    assert [(m.rank_before, m.rank_after) for m in report.modules] == [(8, 4)] * 2 + [(2, 2)] * 2
    new = toys.load(tmp_path / "s")
    for module in MODULES[2:]:
        for x in "AB":
            name = f"{toys.PREFIX}{module}.lora_{x}.weight"
            assert new[name].tobytes() == tensors[name].astype(toys.BF16).tobytes()
    config = config_of(tmp_path / "s")
    assert config["rank_pattern"] == dict.fromkeys(MODULES[2:], 2)
    assert (config["r"], config["lora_alpha"]) == (4, 6)  # scale 1.5; the others had 12 / 2
    assert config["alpha_pattern"] == dict.fromkeys(MODULES[2:], 12)
    assert regraft.shrink(adapter, tmp_path / "t", rank=8).bytes_after > report.bytes_after


def test_a_rank_above_the_sizes_of_a_layer_is_filled_up_with_zeros(tmp_path: Path) -> None:
    tensors = toys.lora(MODULES[0], 3, WIDTH, rank=8)
    adapter = write_adapter(tmp_path / "a", tensors)
    regraft.shrink(adapter, tmp_path / "s", rank=5, dtype="float32")
    new = toys.load(tmp_path / "s")
    assert new[f"{toys.PREFIX}{MODULES[0]}.lora_A.weight"].shape == (5, WIDTH)
    assert np.allclose(product(new, MODULES[0]), product(tensors, MODULES[0]), atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999, 1.0])
def test_energy_gives_every_module_the_smallest_rank_that_keeps_it(
    tmp_path: Path, energy: float
) -> None:
    adapter = write_adapter(tmp_path / "a")
    report = regraft.shrink(adapter, tmp_path / "s", energy=energy, dtype="float32")
    old, new = toys.load(adapter), toys.load(tmp_path / "s")
    for module in report.modules:
        squares = np.linalg.svd(product(old, module.name), compute_uv=False) ** 2
        shares = np.cumsum(squares) / squares.sum()
        rank = module.rank_after
        assert shares[rank - 1] >= energy * (1 - 1e-12)
        assert rank == 1 or shares[rank - 2] < energy
        assert new[f"{toys.PREFIX}{module.name}.lora_A.weight"].shape == (rank, WIDTH)
    assert regraft.check(_fitting_base(tmp_path / "base"), tmp_path / "s").ok


def test_ranks_that_differ_are_told(tmp_path: Path) -> None:
    report = regraft.shrink(write_adapter(tmp_path / "a"), tmp_path / "s", energy=0.99)
    ranks = [m.rank_after for m in report.modules]
    assert len(set(ranks)) > 1
    assert config_of(tmp_path / "s")["r"] == max(ranks)
    assert any("rank_pattern" in note for note in report.notes)


def test_a_delta_of_nothing_becomes_rank_1_and_is_not_off(tmp_path: Path) -> None:
    tensors = {name: 0 * values for name, values in lowrank().items()}
    report = regraft.shrink(write_adapter(tmp_path / "a", tensors), tmp_path / "s", energy=0.9)
    assert {m.rank_after for m in report.modules} == {1}
    assert report.error == 0


def _fitting_base(folder: Path) -> Path:
    config = toys.CONFIG | {"architectures": ["Mine"], "model_type": "mine"}
    tensors = {f"{module}.weight": toys.draw(WIDTH, WIDTH) for module in MODULES}
    return toys.write_base(folder, tensors, config)


# -- kinds of layers


def test_convolutions_keep_their_kernel(tmp_path: Path) -> None:
    a, b = toys.draw(6, 4, 3, 3), toys.draw(10, 6, 1, 1)
    key = f"{toys.PREFIX}stem.conv"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "a", tensors, r=6, target_modules=["conv"])
    report = regraft.shrink(adapter, tmp_path / "s", rank=2, dtype="float32")
    new = toys.load(tmp_path / "s")
    assert new[f"{key}.lora_A.weight"].shape == (2, 4, 3, 3)
    assert new[f"{key}.lora_B.weight"].shape == (10, 2, 1, 1)
    found = new[f"{key}.lora_B.weight"][:, :, 0, 0] @ new[f"{key}.lora_A.weight"].reshape(2, 36)
    assert np.allclose(found, best(b[:, :, 0, 0] @ a.reshape(6, 36), 2), atol=1e-4)
    assert [m.layer for m in report.modules] == ["convolution"]


def test_embeddings_keep_their_factors_the_other_way_round(tmp_path: Path) -> None:
    tensors = dict(toys.embedding(toys.EMBED, 40, 16, rank=6))
    adapter = write_adapter(tmp_path / "a", tensors, r=6, target_modules=["embed_tokens"])
    report = regraft.shrink(adapter, tmp_path / "s", rank=2, dtype="float32")
    key = f"{toys.PREFIX}{toys.EMBED}.lora_embedding_"
    new = toys.load(tmp_path / "s")
    assert (new[f"{key}A"].shape, new[f"{key}B"].shape) == ((2, 40), (16, 2))
    wanted = best(tensors[f"{key}B"] @ tensors[f"{key}A"], 2)
    assert np.allclose(new[f"{key}B"] @ new[f"{key}A"], wanted, atol=1e-6)
    assert [m.layer for m in report.modules] == ["embedding"]


def _of_expert(tensors: Arrays, expert: int, rank: int) -> np.ndarray[Any, Any]:
    a = tensors[f"{toys.PREFIX}{STACK}.lora_A.weight"].reshape(EXPERTS, rank, WIDTH)
    b = tensors[f"{toys.PREFIX}{STACK}.lora_B.weight"].reshape(OUT, rank, EXPERTS)
    return b[:, :, expert].astype(np.float64) @ a[expert]


def test_a_stack_is_reduced_expert_by_expert_to_one_rank(tmp_path: Path) -> None:
    tensors = stack()
    parameters = ["experts.down_proj"]
    adapter = write_adapter(
        tmp_path / "a", tensors, r=RANK, target_modules=None, target_parameters=parameters
    )
    report = regraft.shrink(adapter, tmp_path / "s", energy=0.8, dtype="float32")
    (module,) = report.modules
    assert (module.name, module.layer) == (f"{STACK}.down_proj", "experts")
    rank, new = module.rank_after, toys.load(tmp_path / "s")
    whole = [_of_expert(tensors, e, RANK) for e in range(EXPERTS)]
    for expert, delta in enumerate(whole):
        assert np.allclose(_of_expert(new, expert, rank), best(delta, rank), atol=1e-5)
    squares = sum(np.linalg.svd(delta, compute_uv=False)[:RANK] ** 2 for delta in whole)
    shares = np.cumsum(squares) / np.sum(squares)
    assert shares[rank - 1] >= 0.8 > shares[rank - 2]
    assert module.kept == pytest.approx(shares[rank - 1])


def test_parameters_of_one_module_get_one_rank(tmp_path: Path) -> None:
    key = f"{toys.PREFIX}{STACK}.base_layer"
    inner = {
        f"{key}.lora_A.weight": np.outer(np.ones(EXPERTS * RANK), toys.draw(OUT, seed=3)),
        f"{key}.lora_B.weight": toys.draw(WIDTH, RANK * EXPERTS, seed=4),
    }
    tensors = stack() | {name: value.astype(np.float32) for name, value in inner.items()}
    parameters = ["experts.down_proj", "experts.gate_up_proj"]
    adapter = write_adapter(
        tmp_path / "a", tensors, r=RANK, target_modules=None, target_parameters=parameters
    )
    report = regraft.shrink(adapter, tmp_path / "s", energy=0.8)
    names = {m.name.rpartition(".")[2]: m for m in report.modules}
    assert names.keys() == {"gate_up_proj", "down_proj"}
    assert names["gate_up_proj"].kept == pytest.approx(1)  # of rank 1, all of it
    assert names["gate_up_proj"].rank_after == names["down_proj"].rank_after > 1


def test_the_two_projections_of_an_attention_get_one_rank(tmp_path: Path) -> None:
    key = f"{toys.PREFIX}attention"
    flat = np.outer(toys.draw(WIDTH, seed=1), toys.draw(4, seed=2)).astype(np.float32)
    tensors: Arrays = {
        f"{key}.lora_A.weight": toys.draw(4, WIDTH, seed=3),
        f"{key}.lora_B.weight": flat,
        f"{key}.base_layer.out_proj.lora_A.weight": toys.draw(4, WIDTH, seed=4),
        f"{key}.base_layer.out_proj.lora_B.weight": toys.draw(WIDTH, 4, seed=5),
    }
    adapter = write_adapter(tmp_path / "a", tensors, r=4, target_modules=["attention"])
    report = regraft.shrink(adapter, tmp_path / "s", energy=0.9)
    ranks = {m.name: m.rank_after for m in report.modules}
    assert ranks["attention"] == ranks["attention.out_proj"] > 1


def falling(rank: int, pace: float, seed: int, out: int = WIDTH) -> tuple[Any, Any]:
    """Return A and B whose singular values fall at a pace."""
    left = np.linalg.qr(toys.draw(out, rank, seed=seed))[0] * pace ** np.arange(rank)
    right = np.ascontiguousarray(np.linalg.qr(toys.draw(WIDTH, rank, seed=seed + 1))[0].T)
    return right.astype(np.float32), left.astype(np.float32)


PAIRS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "attention": (
        ("attention", "attention.base_layer.out_proj"), {"target_modules": ["attention"]},
    ),
    "tie": (
        ("model.embed_tokens", "lm_head"),
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
}  # fmt: skip
"""Pairs of modules that have one rank."""


@pytest.mark.parametrize("paces", [(0.9, 0.3), (0.3, 0.9)], ids=["first", "second"])
@pytest.mark.parametrize("group", PAIRS)
def test_each_of_a_pair_of_one_rank_keeps_the_share_that_was_asked_for(
    tmp_path: Path, group: str, paces: tuple[float, float]
) -> None:
    names, config = PAIRS[group]
    tensors: Arrays = {}
    for number, (name, pace) in enumerate(zip(names, paces, strict=True)):
        a, b = falling(8, pace, 10 * number)
        key = f"{toys.PREFIX}{name}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    report = regraft.shrink(
        write_adapter(tmp_path / "a", tensors, **config), tmp_path / "s", energy=0.9,
        dtype="float32",
    )  # fmt: skip
    assert len(report.modules) == 2
    needed = 1 + int(np.argmax(np.cumsum(0.9 ** (2 * np.arange(8))) >= 0.9 * _total(0.9)))
    assert {module.rank_after for module in report.modules} == {needed}
    assert min(module.kept for module in report.modules) >= 0.9
    assert needed > 2  # more than the other one would have needed


def _total(pace: float) -> float:
    return float(np.sum(pace ** (2 * np.arange(8))))


def test_the_bias_of_b_goes_along(tmp_path: Path) -> None:
    bias = f"{toys.PREFIX}{MODULES[0]}.lora_B.bias"
    tensors = lowrank() | {bias: toys.draw(WIDTH)}
    adapter = write_adapter(tmp_path / "a", tensors, lora_bias=True)
    regraft.shrink(adapter, tmp_path / "s", rank=2)
    assert toys.load(tmp_path / "s")[bias].tobytes() == tensors[bias].astype(toys.BF16).tobytes()
