"""PEFT's stacks of experts, in all the ways they lie, in other dialects; and Unsloth's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from adapters.dialects.test_experts_in_peft_files import (
    EXPERTS,
    INNER,
    OWNER,
    RANK,
    WIDTH,
    write_base,
)
from merging import toys
from regraft.errors import UnsupportedError, UsageError
from regraft.translating import convert_adapter

STACKS = {"gate_up_proj": (2 * INNER, WIDTH), "down_proj": (WIDTH, INNER)}
LIES: dict[str, dict[str, Any]] = {
    "since 0.19": {"peft_version": "0.21.0"},
    "up to 0.18": {"peft_version": "0.18.1"},
    "as Unsloth trained": {"peft_version": "0.21.0", "lora_B_layout": "grouped_by_expert"},
    "as Unsloth says of one": {"peft_version": "0.21.0", "unsloth_fused_expert_lora": {
        "parameters": {"gate_up_proj": {"lora_B_layout": "grouped_by_expert"}}}},
}  # fmt: skip
"""How B's columns, and the two factors, lie by what the config says."""


def write(folder: Path, how: str) -> Path:
    """Write an adapter of both stacks; the one registered first is the inner wrapper."""
    tensors: dict[str, Any] = {}
    for seed, (name, (out, inputs)) in enumerate(STACKS.items()):
        if how == "up to 0.18":
            out, inputs = inputs, out
        within = "base_layer." if name == "gate_up_proj" else ""
        key = f"{toys.PREFIX}{OWNER}.experts.{within}lora_"
        tensors[f"{key}A.weight"] = toys.draw(EXPERTS * RANK, inputs, seed=seed) / 4
        tensors[f"{key}B.weight"] = toys.draw(out, RANK * EXPERTS, seed=seed) / 4
    return toys.write_adapter(
        folder, tensors, target_modules=[],
        target_parameters=[f"mlp.experts.{name}" for name in STACKS], **LIES[how],
    )  # fmt: skip


@pytest.mark.parametrize("to", ["mlx", "tinker", "automodel", "peft"])
@pytest.mark.parametrize("how", LIES)
def test_a_stack_says_the_same_in_another_dialect(tmp_path: Path, how: str, to: str) -> None:
    base = write_base(tmp_path / "base")
    adapter = write(tmp_path / "peft", how)
    convert_adapter(adapter, tmp_path / "there", to=to, base=base)
    regraft.merge(base, adapter, tmp_path / "one")
    regraft.merge(base, tmp_path / "there", tmp_path / "other")
    before, one, other = (toys.load(tmp_path / name) for name in ("base", "one", "other"))
    changed = [name for name in one if not np.array_equal(one[name], before[name])]
    assert len(changed) == 3 * EXPERTS
    assert all(np.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("to", ["mlx", "tinker", "automodel", "peft"])
def test_the_base_says_how_a_stack_lies(tmp_path: Path, to: str) -> None:
    with pytest.raises(UsageError, match="stacks of experts"):
        convert_adapter(write(tmp_path / "peft", "since 0.19"), tmp_path / "out", to=to,
                        uniform=True)  # fmt: skip


@pytest.mark.parametrize("to", ["mlx", "tinker", "automodel"])
def test_unsloths_names_of_single_experts_are_refused_where_they_mean_nothing(
    tmp_path: Path, to: str
) -> None:
    """gpt-oss has gate and up of an expert in one matrix, in turn; these dialects have not."""
    tensors = {
        **toys.lora(f"{OWNER}.experts.gate_up_projs.1", 2 * INNER, WIDTH),
        **toys.lora(f"{OWNER}.experts.down_projs.2", WIDTH, INNER),
    }
    adapter = toys.write_adapter(
        tmp_path / "peft", tensors, target_modules=["gate_up_projs.1", "down_projs.2"]
    )
    with pytest.raises(UnsupportedError, match=r"gate_up_projs\.1") as caught:
        convert_adapter(adapter, tmp_path / "out", to=to, base=write_base(tmp_path / "base"))
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out").exists()
