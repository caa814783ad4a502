"""An adapter that MiCA began goes on in training as with PEFT: A alone."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
from torch import nn

import regraft


def test_only_a_is_trained_on_and_b_is_saved_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="mica")
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    live = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    expected = {key for key, value in live.named_parameters() if value.requires_grad}
    handle = regraft.attach(base, tmp_path, is_trainable=True)
    found = {name for name, _ in handle.named_parameters()}
    assert len(found) == len(expected) == 2
    assert all(".lora_A." in name for name in found | expected)
    x = torch.randn(3, 8)
    base(x).square().sum().backward()
    live(x).square().sum().backward()
    ours = [value.grad for _, value in sorted(handle.named_parameters())]
    theirs = [value.grad for _, value in sorted(live.named_parameters()) if value.requires_grad]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
