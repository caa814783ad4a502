"""The adapter of a grouped convolution: served and saved as PEFT's, and not merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import regraft


class Grouped(nn.Module):
    """A convolution in two groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 2) of images with 4 channels."""
        return self.lin(self.conv(x).mean((2, 3)))


@pytest.fixture
def served(tmp_path: Path) -> tuple[nn.Module, Any, Path]:
    """Return a model with an adapter of PEFT's attached, PEFT's model, and the adapter's folder."""
    torch.manual_seed(0)
    base = Grouped().eval()
    config = peft.LoraConfig(r=4, target_modules=["conv", "lin"], init_lora_weights=False)
    live = peft.get_peft_model(copy.deepcopy(base), config).eval()
    live.save_pretrained(tmp_path / "adapter")
    regraft.attach(base, tmp_path / "adapter")
    return base, live, tmp_path / "adapter"


def test_a_grouped_convolution_is_saved_as_it_was(
    served: tuple[nn.Module, Any, Path], tmp_path: Path
) -> None:
    model, live, adapter = served
    regraft.save(model, tmp_path / "saved")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = peft.PeftModel.from_pretrained(Grouped(), tmp_path / "saved").eval()
    again.base_model.model.load_state_dict(live.base_model.model.state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(model(x), again(x))


def test_merging_it_is_refused_for_what_it_is(served: tuple[nn.Module, Any, Path]) -> None:
    model, _, _ = served
    handle = regraft.handle_of(model)
    assert handle is not None
    with pytest.raises(regraft.UnsupportedError, match=r"grouped convolution.*2 groups"):
        handle.merge_adapter()


def test_dora_on_it_is_refused_without_the_advice_to_attach_it(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["conv"], use_dora=True)
    peft.get_peft_model(Grouped(), config).save_pretrained(tmp_path)
    with pytest.raises(
        regraft.MismatchError, match="DoRA on a grouped convolution is not"
    ) as error:
        regraft.attach(Grouped(), tmp_path)
    assert "train without DoRA" in str(error.value)
    assert "regraft.attach" not in str(error.value)
