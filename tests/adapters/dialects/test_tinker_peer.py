"""Tinker's dialect against tinker-cookbook: a merge is that of what it exports to PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from adapters.dialects.test_experts_in_peft_files import EXPERTS, WIDTH, head, tinker, write_base
from merging import toys

cookbook = pytest.importorskip(
    "tinker_cookbook.weights._adapter", reason="tinker-cookbook runs in an environment of its own"
)


def merges(base: Path, adapter: Path, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the merge of an adapter, and that of what tinker-cookbook makes of it."""
    cookbook.build_lora_adapter(
        base_model=str(base), adapter_path=str(adapter), output_path=str(tmp_path / "theirs")
    )
    regraft.merge(base, adapter, tmp_path / "ours-merged")
    regraft.merge(base, tmp_path / "theirs", tmp_path / "theirs-merged")
    return toys.load(tmp_path / "ours-merged"), toys.load(tmp_path / "theirs-merged")


@pytest.mark.parametrize("shared", ["", "A"])
def test_experts_and_output_layer(tmp_path: Path, shared: str) -> None:
    base = write_base(tmp_path / "base")
    ours, theirs = merges(base, tinker(tmp_path / "tinker", shared, **head()), tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    before = toys.load(base)
    changed = [name for name in ours if not np.array_equal(ours[name], before[name])]
    assert len(changed) == 3 * EXPERTS + 2


def test_split_rows_of_a_fused_matrix(tmp_path: Path) -> None:
    import torch
    from tinker_cookbook.weights._merge import apply_merge_op, detect_merge_profile, plan_merge_ops

    key = "model.language_model.layers.0.linear_attn.in_proj_qkv.weight"
    config = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    base = toys.write_base(tmp_path / "base", {key: toys.draw(16, WIDTH)}, config)
    tensors: dict[str, Any] = {}
    for seed, (part, out) in enumerate({"q": 4, "k": 5, "v": 7}.items()):
        tensors |= toys.lora(f"model.layers.0.linear_attn.in_proj_{part}", out, WIDTH, seed=seed)
    adapter = toys.write_adapter(tmp_path / "tinker", tensors)
    profile = detect_merge_profile(config, {key})
    ops = plan_merge_ops(
        {name: torch.from_numpy(value) for name, value in tensors.items()},
        {"lora_alpha": toys.ALPHA, "r": toys.RANK}, {key}, profile,
    )  # fmt: skip
    merged = {key: torch.from_numpy(toys.load(base)[key].copy())}
    for op in ops[key]:
        apply_merge_op(merged, op)
    regraft.merge(base, adapter, tmp_path / "merged")
    assert np.allclose(toys.load(tmp_path / "merged")[key], merged[key].numpy(), atol=1e-5)
