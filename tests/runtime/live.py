"""What tests of live models have in common: what a model is, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

import regraft

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
         "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
         "_load_state_dict_pre_hooks", "_non_persistent_buffers_set")  # fmt: skip


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's state, as far as it is in memory."""
    state = model.state_dict()
    return {key: value.clone() for key, value in state.items() if value.device.type != "meta"}


def tree_of(model: nn.Module) -> dict[str, type]:
    """Return the class of each module by its path."""
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def traces_of(model: nn.Module) -> dict[str, Any]:
    """Return whatever hooks, attributes and settings a model has beyond its state."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (
            sorted(module.__dict__),
            {hooks: list(getattr(module, hooks)) for hooks in HOOKS},
            {key: (id(p), p.requires_grad, p._version) for key, p in module._parameters.items()
             if p is not None and p.device.type != "meta"},
        )  # fmt: skip
    return found


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Fail unless a model has the keys and the bits that it had."""
    state = {k: v for k, v in model.state_dict().items() if v.device.type != "meta"}
    assert list(state) == list(before)
    for key, value in before.items():
        assert torch.equal(state[key], value), key


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Fail unless a model is after the block as it was before it, and has its state within it."""
    state, tree, traces = state_of(model), tree_of(model), traces_of(model)
    yield
    assert tree_of(model) == tree
    assert_same_state(model, state)
    assert traces_of(model) == traces


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference of two arrays, as a share of the second one's range."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    return float(np.abs(found - expected).max() / np.ptp(expected))


def losses_of(
    model: Any, handle: regraft.Adapters, *, steps: int, rate: float = 1e-2
) -> list[float]:
    """Train a handle's adapters on a language model for some steps; return the losses."""
    optimizer = torch.optim.AdamW(handle.parameters(), lr=rate)
    ids = torch.arange(14).reshape(2, 7)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses
