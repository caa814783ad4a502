"""Layers that compute their weight from other parameters take adapters as they do with PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import regraft
from regraft.errors import MismatchError, RegraftError, UnsupportedError
from runtime.toys import Mlp


class Doubled(nn.Module):
    """Twice the weight."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return it."""
        return weight * 2


MAKERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "parametrize": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
                    "remove_parametrizations"),
    "weight norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "old weight norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "old spectral norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["lin0", "lin1"], "lora_bias": True},
    {"target_modules": ["lin0"], "use_dora": True},
]
X = torch.linspace(-1, 1, 30).reshape(3, 10)


def base_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MAKERS[kind][0](model.lin0)
    return model.eval()


def theirs(kind: str, config: dict[str, Any], folder: Path) -> torch.Tensor:
    """Save an adapter of PEFT, and return what it answers."""
    model, config = base_of(kind), {"r": 2, "init_lora_weights": False, **config}
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(X)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(config))
def test_adapters_answer_as_with_peft_and_are_saved(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    expected = theirs(kind, config, tmp_path / "theirs")
    model = base_of(kind)
    plain = model(X).detach()
    adapters = regraft.attach(model, tmp_path / "theirs", "a", is_trainable=True)
    torch.testing.assert_close(model(X).detach(), expected)
    model(X).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())
    regraft.save(model, tmp_path / "ours")
    adapters.detach()
    assert torch.equal(model(X), plain)
    regraft.attach(model, tmp_path / "ours", "b")
    torch.testing.assert_close(model(X).detach(), expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_merge_in_memory_is_refused_with_the_way_on(tmp_path: Path, kind: str) -> None:
    expected = theirs(kind, CONFIGS[1], tmp_path)
    model = base_of(kind)
    adapters = regraft.attach(model, tmp_path, "a")
    with pytest.raises(MismatchError, match=f"computed from other parameters.*{MAKERS[kind][1]}"):
        adapters.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)


def test_the_way_on_leads_to_a_merge(tmp_path: Path) -> None:
    expected = theirs("weight norm", CONFIGS[0], tmp_path)
    model = base_of("weight norm")
    parametrize.remove_parametrizations(model.lin0, "weight")
    merged = regraft.attach(model, tmp_path, "a").merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(X), expected)


@pytest.mark.parametrize(
    ("kind", "config", "error"),
    [
        ("parametrize", {"target_modules": ["lin1"], "target_parameters": ["lin0.weight"]},
         UnsupportedError),
        ("weight norm", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]},
         UnsupportedError),
        ("old weight norm", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]},
         UnsupportedError),
        ("parametrize", {"target_modules": ["lin0"], "init_lora_weights": "pissa"}, MismatchError),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_a_computed_weight_is_refused(
    kind: str, config: dict[str, Any], error: type[RegraftError]
) -> None:
    with pytest.raises(error, match="computed"):
        regraft.attach(base_of(kind), {"r": 2, **config}, "new")


def test_copies_of_a_parametrized_module_are_refused_with_the_reason(tmp_path: Path) -> None:
    theirs("parametrize", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}, tmp_path)
    with pytest.raises(MismatchError, match=r"computed from other.*remove_parametrizations"):
        regraft.attach(base_of("parametrize"), tmp_path, "a")


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_with_a_computed_weight_answers_as_with_peft(
    tmp_path: Path, rank: int, dora: bool
) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("table", nn.Embedding(16, 8))
        parametrize.register_parametrization(model.table, "weight", _Doubled())
        return model

    config = peft.LoraConfig(
        r=rank, target_modules=["table"], use_dora=dora, init_lora_weights=False
    )
    theirs = peft.get_peft_model(made(), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    ids, model = torch.arange(6).view(2, 3), made().eval()
    regraft.attach(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids), atol=1e-5)
