"""A model with adapters is freed once nobody holds it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import regraft  # noqa: E402
from merging import toys  # noqa: E402


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x: Any) -> Any:
        return self.q_proj(x)


def _idle(model: Any, handle: regraft.Adapters) -> None:
    del model, handle


def _answers(model: Any, handle: regraft.Adapters) -> None:
    with handle.using("a"), torch.no_grad():
        model(torch.ones(2, 16))
    with handle.rows(["a", None]), torch.no_grad():
        model(torch.ones(2, 16))


def _trains(model: Any, handle: regraft.Adapters) -> None:
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()


def _merges(model: Any, handle: regraft.Adapters) -> None:
    del model
    handle.merge_adapter()


def _loses_an_adapter(model: Any, handle: regraft.Adapters) -> None:
    model(torch.ones(2, 16))
    handle.set_adapter(None)
    handle.delete_adapter("a")


def _detaches(model: Any, handle: regraft.Adapters) -> None:
    model(torch.ones(2, 16))
    handle.detach()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("use", [_idle, _answers, _trains, _merges, _loses_an_adapter, _detaches])
def test_a_model_that_nobody_holds_is_freed(
    tmp_path: Path, use: Callable[[Any, regraft.Adapters], None], cached: bool
) -> None:
    adapter = toys.write_adapter(
        tmp_path / "a", toys.lora("q_proj", 16, 16), target_modules=["q_proj"]
    )

    def live() -> weakref.ref[Any]:
        model = _Net()
        cache = regraft.AdapterCache("1MiB") if cached else None
        handle = regraft.attach(model, adapter, "a", is_trainable=use is _trains, cache=cache)
        use(model, handle)
        return weakref.ref(model)

    held = live()
    gc.collect()
    assert held() is None


@pytest.mark.slow
def test_the_handle_alone_keeps_its_model(tmp_path: Path) -> None:
    adapter = toys.write_adapter(
        tmp_path / "a", toys.lora("q_proj", 16, 16), target_modules=["q_proj"]
    )
    handle = regraft.attach(_Net(), adapter)
    gc.collect()
    assert handle.model(torch.ones(1, 16)).shape == (1, 16)
    assert regraft.handle_of(handle.model) is handle


@pytest.mark.slow
def test_the_model_alone_keeps_its_handle(tmp_path: Path) -> None:
    adapter = toys.write_adapter(
        tmp_path / "a", toys.lora("q_proj", 16, 16), target_modules=["q_proj"]
    )
    model = _Net()
    number = id(regraft.attach(model, adapter))
    gc.collect()
    assert id(regraft.handle_of(model)) == number
