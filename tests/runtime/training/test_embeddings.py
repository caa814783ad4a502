"""Embeddings with settings of their own are trained as PEFT trains them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import regraft
from regraft.errors import MismatchError


class Scaled(nn.Embedding):
    """Multiplies what it looks up, as Gemma's embedding does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (..., dim) of (...) ids."""
        return super().forward(ids) * self.embed_scale

    embed_scale = 3.0


class Net(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.emb = embedding
        self.lin = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (batch, n, 4) of (batch, n) ids."""
        return self.lin(torch.tanh(self.emb(ids)))


IDS = torch.tensor([[1, 1, 5, 7, 0], [5, 2, 1, 0, 19]])
ROWS: dict[str, Any] = {"target_modules": ["lin"], "trainable_token_indices": {"emb": [5, 1, 7]}}
CONFIGS: list[dict[str, Any]] = [
    ROWS,
    {"target_modules": ["emb"]},
    {"target_modules": ["emb"], "use_dora": True, "init_lora_weights": False},
    {"target_modules": ["lin"], "modules_to_save": ["emb"]},
]
SETTINGS: list[dict[str, Any]] = [
    {"padding_idx": 1}, {"padding_idx": 5}, {"padding_idx": 19}, {"scale_grad_by_freq": True},
    {"scale_grad_by_freq": True, "padding_idx": 0},
]  # fmt: skip


def steps(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    """Return the losses of three optimizer steps."""
    optimizer, found = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.5), []
    for _ in range(3):
        loss = model(IDS).square().mean() + model(IDS).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def both(base: nn.Module, config: dict[str, Any]) -> tuple[Any, Any, list[float], list[float]]:
    """Return PEFT's model and the handle after three steps from one seed, and their losses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(config)))
    torch.manual_seed(1)
    ours = regraft.attach(base, config, "new")
    return theirs, ours, steps(theirs, [*theirs.parameters()]), steps(base, [*ours.parameters()])


CASES = [(config, settings) for config in CONFIGS for settings in SETTINGS]
CASES += [(config, {"max_norm": 0.7}) for config in CONFIGS if config["target_modules"] == ["lin"]]


@pytest.mark.parametrize("cls", [nn.Embedding, Scaled])
@pytest.mark.parametrize(("config", "settings"), CASES, ids=str)
def test_an_embedding_with_settings_is_trained_as_by_peft(
    cls: type[nn.Embedding], settings: dict[str, Any], config: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    theirs, ours, expected, found = both(Net(cls(20, 6, **settings)), {"r": 4, **config})
    assert found == pytest.approx(expected, rel=1e-5)
    trained = peft.get_peft_model_state_dict(theirs)
    for key, tensor in ours.adapter("new").tensors.items():
        torch.testing.assert_close(tensor, trained[key], rtol=1e-5, atol=1e-6)


def test_a_padding_row_keeps_its_value_and_others_move() -> None:
    base = Net(nn.Embedding(20, 6, padding_idx=1))
    before = base.emb.weight[[5, 1, 7]].clone()
    _, ours, _, _ = both(base, {"r": 4, **ROWS})
    rows = ours.adapter("new").tensors["base_model.model.emb.token_adapter.trainable_tokens_delta"]
    assert [torch.equal(a, b) for a, b in zip(rows, before, strict=True)] == [False, True, False]


def test_a_sparse_embedding_gives_factors_gradients_that_any_optimizer_takes() -> None:
    for cls in (nn.Embedding, Scaled):
        base = Net(cls(20, 6, sparse=True))
        adapters = regraft.attach(base, {"r": 4, "target_modules": ["emb"]}, "new")
        base(IDS).sum().backward()
        assert all(not p.grad.is_sparse for p in adapters.parameters() if p.grad is not None)


def test_lora_on_an_embedding_with_max_norm_is_served_and_neither_trained_nor_merged(
    tmp_path: Path,
) -> None:
    base = Net(nn.Embedding(20, 6, max_norm=0.7))
    config = {"r": 4, "target_modules": ["emb"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"modules_to_save.*trainable_token_indices"):
        regraft.attach(base, config, "new")
    with pytest.raises(MismatchError, match="max_norm"):
        regraft.attach(base, tmp_path, "new", is_trainable=True)
    adapters = regraft.attach(base, tmp_path, "served")
    with torch.no_grad():
        torch.testing.assert_close(base(IDS), theirs(IDS))
    with pytest.raises(MismatchError, match=r"not be merged.*max_norm=0\.7"):
        adapters.merge_adapter()
