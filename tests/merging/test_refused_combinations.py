"""Combinations that would merge to something, but not to what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest

import regraft
from merging import toys

EXPERTS, RANK = 3, 2
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": EXPERTS,
    "tie_word_embeddings": False,
}
MOE = "model.layers.0.mlp.experts"


def stacked_base(folder: Path) -> Path:
    """Write a base that keeps its experts' down projections as one stack (experts, out, in)."""
    return toys.write_base(folder, {f"{MOE}.down_proj": toys.draw(EXPERTS, 8, 6)}, MIXTRAL)


def stacked_factors() -> dict[str, object]:
    key = f"{toys.PREFIX}{MOE}"
    return {
        f"{key}.lora_A.weight": toys.draw(EXPERTS * RANK, 6),
        f"{key}.lora_B.weight": toys.draw(8, EXPERTS * RANK),
    }


def test_dora_on_a_stack_of_experts_is_not_merged_as_lora(tmp_path: Path) -> None:
    base = stacked_base(tmp_path / "base")
    chosen = {"r": RANK, "target_modules": [], "target_parameters": [f"{MOE}.down_proj"]}
    plain = toys.write_adapter(tmp_path / "plain", stacked_factors(), **chosen)
    assert regraft.check(base, plain).ok
    magnitude = {f"{toys.PREFIX}{MOE}.lora_magnitude_vector": toys.draw(8)}
    adapter = toys.write_adapter(
        tmp_path / "a", stacked_factors() | magnitude, **chosen, use_dora=True
    )
    with pytest.raises(regraft.MismatchError, match="DoRA on a stack"):
        regraft.merge(base, adapter, tmp_path / "out")


def test_pissa_on_a_part_of_a_stored_tensor_is_refused(tmp_path: Path) -> None:
    base = stacked_base(tmp_path / "base")
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    factors = toys.lora(module, 8, 6, RANK)
    chosen = {"r": RANK, "target_modules": ["w2"]}
    plain = toys.write_adapter(tmp_path / "plain", factors, **chosen)
    assert regraft.check(base, plain).ok
    adapter = toys.write_adapter(tmp_path / "a", factors, **chosen, init_lora_weights="pissa")
    with pytest.raises(regraft.MismatchError, match="pissa on a part"):
        regraft.merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("other", ["pissa", True])
def test_pissa_shares_no_tensor_with_another_adapter(tmp_path: Path, other: object) -> None:
    base = toys.write_base(tmp_path / "base")
    factors = toys.lora(toys.Q0, toys.HIDDEN, toys.HIDDEN)
    first = toys.write_adapter(tmp_path / "a", factors, init_lora_weights="pissa")
    second = toys.write_adapter(tmp_path / "b", factors, init_lora_weights=other)
    assert regraft.check(base, first).ok
    for pair in ([first, second], [second, first]):
        report = regraft.check(base, pair)
        assert "cannot share a tensor" in str(report.problems[0])
