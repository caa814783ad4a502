"""Tinker's and NeMo Automodel's dialects: stacks of experts in files that have PEFT's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.errors import InputError, UnsupportedError, UsageError
from regraft.translating import convert_adapter

EXPERTS, WIDTH, INNER, RANK = 3, 16, 12, 3
SCALE = toys.ALPHA / toys.RANK
OWNER = "model.layers.0.mlp"
Q = "model.layers.0.self_attn.q_proj"
CONFIG = {
    **toys.CONFIG, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 1, "num_experts": EXPERTS, "moe_intermediate_size": INNER,
    "head_dim": 8,
}  # fmt: skip
SHAPES = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}


def weights(tied: bool = False) -> dict[str, np.ndarray]:
    found = {k: v for k, v in toys.llama_tensors(np.float32).items()
             if ".layers.1." not in k and ".mlp." not in k}  # fmt: skip
    found |= {
        f"{OWNER}.experts.{e}.{role}_proj.weight": toys.draw(*shape, seed=e)
        for e in range(EXPERTS) for role, shape in SHAPES.items()
    }  # fmt: skip
    found[f"{OWNER}.gate.weight"] = toys.draw(EXPERTS, WIDTH)
    if tied:
        del found["lm_head.weight"]
    return found


def write_base(folder: Path, *, tied: bool = False) -> Path:
    return toys.write_base(folder, weights(tied), {**CONFIG, "tie_word_embeddings": tied})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def tinker(folder: Path, shared: str = "", **more: np.ndarray) -> Path:
    """Write an adapter as Tinker saves one; ``shared`` is the factor that all experts share."""
    tensors = toys.lora(Q, WIDTH, WIDTH)
    for seed, (leaf, role) in enumerate((("w1", "gate"), ("w2", "down"), ("w3", "up"))):
        out, inputs = SHAPES[role]
        key = f"{toys.PREFIX}{OWNER}.experts.{leaf}.lora_"
        counts = {n: 1 if n == shared else EXPERTS for n in "AB"}
        tensors[f"{key}A.weight"] = toys.draw(counts["A"], RANK, inputs, seed=seed) / 4
        tensors[f"{key}B.weight"] = toys.draw(counts["B"], out, RANK, seed=seed) / 4
    tensors |= {f"{toys.PREFIX}{name}.weight": value for name, value in more.items()}
    return toys.write_adapter(folder, tensors, target_modules=["q_proj", "experts"])


def head(seed: int = 5) -> dict[str, np.ndarray]:
    return {"model.unembed_tokens.lora_A": toys.draw(RANK, WIDTH, seed=seed) / 4,
            "model.unembed_tokens.lora_B": toys.draw(toys.VOCAB, RANK, seed=seed) / 4}  # fmt: skip


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.allclose(one, other, atol=1e-5))


@pytest.mark.parametrize("shared", ["", "A", "B"])
def test_tinkers_experts_are_gate_down_and_up(base: Path, tmp_path: Path, shared: str) -> None:
    adapter = tinker(tmp_path / "tinker", shared, **head())
    regraft.merge(base, adapter, tmp_path / "merged")
    found, before, after = toys.load(adapter), toys.load(base), toys.load(tmp_path / "merged")
    for leaf, role in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        key = f"{toys.PREFIX}{OWNER}.experts.{leaf}.lora_"
        delta = SCALE * found[f"{key}B.weight"] @ found[f"{key}A.weight"]  # broadcast over experts
        for expert in range(EXPERTS):
            name = f"{OWNER}.experts.{expert}.{role}_proj.weight"
            assert close(after[name], before[name] + delta[expert])
    more = head()
    delta = SCALE * more["model.unembed_tokens.lora_B"] @ more["model.unembed_tokens.lora_A"]
    assert close(after["lm_head.weight"], before["lm_head.weight"] + delta)
    assert np.array_equal(after[f"{toys.EMBED}.weight"], before[f"{toys.EMBED}.weight"])


def test_tinkers_output_layer_is_the_embedding_where_they_are_tied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    adapter = tinker(tmp_path / "tinker", **head())
    regraft.merge(base, adapter, tmp_path / "merged")
    before, after, more = toys.load(base), toys.load(tmp_path / "merged"), head()
    delta = SCALE * more["model.unembed_tokens.lora_B"] @ more["model.unembed_tokens.lora_A"]
    name = f"{toys.EMBED}.weight"
    assert close(after[name], before[name] + delta)
    assert "lm_head.weight" not in after
    assert toys.read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is True
    with pytest.raises(UsageError, match="unembed_tokens"):
        convert_adapter(adapter, tmp_path / "out")
    convert_adapter(adapter, tmp_path / "peft", base=base)
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="tinker", base=base)
    assert_same(adapter, tmp_path / "back")


def assert_same(one: Path, other: Path) -> None:
    before, after = toys.load(one), toys.load(other)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_tinkers_adapter_comes_back(base: Path, tmp_path: Path) -> None:
    adapter = tinker(tmp_path / "tinker", **head())
    convert_adapter(adapter, tmp_path / "peft", base=base)
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="tinker", base=base)
    assert_same(adapter, tmp_path / "back")
    assert regraft.check(base, tmp_path / "back").ok


def test_an_empty_w3_makes_up_of_w1(base: Path, tmp_path: Path) -> None:
    adapter = tinker(tmp_path / "tinker")
    tensors = toys.load(adapter)
    for name in tensors:
        if ".w3." in name:
            tensors[name] = np.zeros((EXPERTS, 0, 0), np.float32)
    toys.write_adapter(adapter, tensors)
    convert_adapter(adapter, tmp_path / "peft", base=base)
    names = {
        name.split(".experts.")[1] for name in toys.load(tmp_path / "peft") if "experts" in name
    }
    assert names == {f"{e}.{leaf}_proj.lora_{n}.weight" for e in range(EXPERTS)
                     for leaf in ("up", "down") for n in "AB"}  # fmt: skip


def test_split_rows_of_a_fused_matrix_are_one_module(tmp_path: Path) -> None:
    rows = {"q": 4, "k": 5, "v": 7}
    tensors: dict[str, Any] = {}
    for seed, (part, out) in enumerate(rows.items()):
        tensors |= toys.lora(f"model.layers.0.linear_attn.in_proj_{part}", out, WIDTH, seed=seed)
    adapter = toys.write_adapter(tmp_path / "tinker", tensors)
    convert_adapter(adapter, tmp_path / "peft")
    found = toys.load(tmp_path / "peft")
    key = f"{toys.PREFIX}model.layers.0.linear_attn.in_proj_"
    delta = found[f"{key}qkv.lora_B.weight"] @ found[f"{key}qkv.lora_A.weight"]
    expected = [
        tensors[f"{key}{p}.lora_B.weight"] @ tensors[f"{key}{p}.lora_A.weight"] for p in rows
    ]
    assert close(delta, np.concatenate(expected))
    said = toys.read_json(tmp_path / "peft" / "adapter_config.json")
    assert said["lora_alpha"] / said["r"] == SCALE
    del tensors[f"{key}v.lora_A.weight"], tensors[f"{key}v.lora_B.weight"]
    toys.write_adapter(adapter, tensors)
    with pytest.raises(InputError, match=r"in_proj_qkv.*all three|all three.*in_proj_qkv"):
        convert_adapter(adapter, tmp_path / "out")


def automodel(folder: Path, *, gated: bool = True) -> Path:
    """Write an adapter as NeMo Automodel keeps its grouped experts."""
    key = f"{toys.PREFIX}{OWNER}.experts.lora_"
    inner = 2 * INNER if gated else INNER
    tensors = toys.lora(Q, WIDTH, WIDTH) | {
        f"{key}gate_and_up_A": toys.draw(EXPERTS, WIDTH, RANK) / 4,
        f"{key}gate_and_up_B": toys.draw(EXPERTS, RANK, inner) / 4,
        f"{key}down_A": toys.draw(EXPERTS, INNER, RANK, seed=2) / 4,
        f"{key}down_B": toys.draw(EXPERTS, RANK, WIDTH, seed=2) / 4,
    }
    return toys.write_adapter(folder, tensors, target_modules=["q_proj", "experts"])


def test_automodels_grouped_experts_have_gate_first(base: Path, tmp_path: Path) -> None:
    adapter = automodel(tmp_path / "automodel")
    regraft.merge(base, adapter, tmp_path / "merged")
    found, before, after = toys.load(adapter), toys.load(base), toys.load(tmp_path / "merged")
    key = f"{toys.PREFIX}{OWNER}.experts.lora_"
    inner = SCALE * found[f"{key}gate_and_up_A"] @ found[f"{key}gate_and_up_B"]  # (E, in, 2 I)
    down = SCALE * found[f"{key}down_A"] @ found[f"{key}down_B"]
    deltas = {"gate": inner[:, :, :INNER], "up": inner[:, :, INNER:], "down": down}
    for role, delta in deltas.items():
        for expert in range(EXPERTS):
            name = f"{OWNER}.experts.{expert}.{role}_proj.weight"
            assert close(after[name], before[name] + delta[expert].T)
    convert_adapter(adapter, tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="automodel")
    assert_same(adapter, tmp_path / "back")


def test_automodels_experts_without_a_gate(tmp_path: Path) -> None:
    adapter = automodel(tmp_path / "automodel", gated=False)
    convert_adapter(adapter, tmp_path / "peft")
    assert not [name for name in toys.load(tmp_path / "peft") if "gate_proj" in name]
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="automodel")
    assert_same(adapter, tmp_path / "back")


def test_gate_and_up_with_an_a_of_their_own_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = tinker(tmp_path / "tinker")
    with pytest.raises(UnsupportedError, match=r"mlp\.experts.*share A|share A.*mlp\.experts"):
        convert_adapter(adapter, tmp_path / "out", to="automodel", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [tinker, automodel])
@pytest.mark.parametrize("what", ["no alpha", "patterns", "counts", "a factor", "another tensor"])
def test_what_is_wrong_is_refused(
    base: Path, tmp_path: Path, write: Callable[[Path], Path], what: str
) -> None:
    adapter = write(tmp_path / "a")
    config, tensors = toys.read_json(adapter / "adapter_config.json"), toys.load(adapter)
    last = [name for name in sorted(tensors) if "experts" in name][-1]
    if what == "no alpha":
        config["lora_alpha"] = None
    elif what == "patterns":
        config["rank_pattern"] = {"q_proj": 2}
    elif what == "counts":
        tensors[last] = tensors[last][:2]
    elif what == "a factor":
        del tensors[last]
    else:
        tensors[f"{toys.PREFIX}model.norm.weight"] = toys.draw(WIDTH)
    toys.write_adapter(adapter, tensors)
    toys.write_json(adapter / "adapter_config.json", config)
    with pytest.raises(InputError):
        regraft.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
