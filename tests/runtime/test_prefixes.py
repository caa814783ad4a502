"""Adapters of a text model on one that sees, live: they fit its text part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import regraft
from regraft.testing import zoo


def text_model(sees: Any, folder: Path) -> Any:
    """Return the language model of a LLaVA as a model of its own."""
    text = AutoModelForCausalLM.from_config(sees.config.text_config).eval()
    text.model.load_state_dict(sees.model.language_model.state_dict())
    text.lm_head.load_state_dict(sees.lm_head.state_dict())
    text.save_pretrained(folder / "text")
    return text


def test_an_adapter_of_the_text_alone_answers_alike_in_the_model_that_sees(tmp_path: Path) -> None:
    sees = zoo.make_model("llava")
    text = text_model(sees, tmp_path)
    handle = regraft.attach(text, regraft.LoraConfig(r=2, target_modules=["q_proj"]), "new")
    with torch.no_grad():
        for key, tensor in handle.adapter("new").tensors.items():
            seeded = torch.Generator().manual_seed(len(key))
            tensor.copy_(torch.randn(tensor.shape, generator=seeded))
    handle.save_pretrained(tmp_path / "a")
    tokens = torch.arange(3, 12)[None]
    wanted = text(input_ids=tokens).logits
    with pytest.warns(
        UserWarning, match=r"model\.\* is taken for model\.language_model\.\*"
    ) as said:
        regraft.attach(sees, tmp_path / "a")
    assert not [each for each in said if each.category is regraft.BaseMismatchWarning]
    torch.testing.assert_close(sees(input_ids=tokens).logits, wanted)
