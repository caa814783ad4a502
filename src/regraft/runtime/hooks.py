"""How adapters come to be heard as a model runs: hooks on its modules, and nothing else of it.

Outputs are changed by forward hooks. Where a module has to run on other weights, its forward pass
is found through an attribute of the instance, as accelerate does it. Neither shows in the module
tree, in ``state_dict()`` or in the class. Copies of the model (``copy.deepcopy``) share the
adapters; a pickled model is the plain one.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regraft.runtime import scopes
from regraft.runtime.live_base import LiveBase


class State:
    """What hooks ask: which selection answers now.

    Attributes:
        key: the handle's number.
        default: the selection of the handle, where no scope says otherwise.
        is_merged: whether the adapters are in the weights, so that nothing is to be added.
        in_tasks: whether scopes were opened in asyncio tasks.
    """

    def __init__(self, key: int) -> None:
        self.key = key
        self.default: Any | None = None
        self.is_merged = False
        self.in_tasks = False

    def selection(self) -> Any | None:
        """Return the selection that answers here, or None."""
        if self.is_merged:
            return None
        found = scopes.find(self.key)
        return self.default if found is scopes.UNSET else found

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self


class Hook:
    """A hook on a module: copies of the model share it, and a pickled one has nothing of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> Any:
    """Return a hook that does nothing: what is left of ours in a pickled model."""
    return _pass


def _pass(*_: Any) -> None:
    return None


class OutputHook(Hook):
    """Changes a module's output; a forward hook that takes keyword arguments."""

    def __init__(self, state: State, path: str) -> None:
        self.state, self.path = state, path

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the output as the adapters have it, or None to leave it."""
        selection = self.state.selection()
        if selection is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return selection.after(self.path, module, x, output)


class Forward:
    """Stands in an instance for its class's forward pass."""

    def __init__(self, state: State, path: str, module: nn.Module, inner: Any) -> None:
        self.state, self.path, self.module, self.inner = state, path, module, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, on other weights where a selection has some."""
        selection = self.state.selection()
        other = selection.instead(self.path) if selection is not None else None
        if other is not None:
            return other(self.module, *args, **kwargs)
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return Forward(self.state, self.path, memo.get(id(self.module), self.module), None)

    def __reduce__(self) -> Any:
        return functools.partial, (type(self.module).forward, self.module)


def forget_compiled() -> None:
    """Let code be compiled anew: what was compiled before there were hooks does not notice them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Hooks:
    """The hooks of one handle, and their removal."""

    def __init__(self, base: LiveBase, state: State) -> None:
        self._base, self._state = base, state
        self._outputs: dict[str, RemovableHandle] = {}
        self._forwards: dict[str, Forward] = {}
        self._keeping = False
        forget_compiled()
        model = base.model
        self._root = [
            model.register_forward_pre_hook(RootBefore(state), with_kwargs=True),
            model.register_forward_hook(RootAfter(state)),
        ]
        for part in parts_called_alone(model):
            self._root.append(part.register_forward_pre_hook(PartBefore(state), with_kwargs=True))

    def cover(self, outputs: Iterable[str], forwards: Iterable[str]) -> None:
        """See to it that these modules are looked after."""
        for path in outputs:
            if path not in self._outputs:
                hook = OutputHook(self._state, path)
                module = self._base.modules[path]
                self._outputs[path] = module.register_forward_hook(hook, with_kwargs=True)
        for path in forwards:
            if path not in self._forwards:
                self._forwards[path] = self._stand_in(path)
                self.cover((path,), ())  # a hook also keeps torch from its fused fast paths

    def _stand_in(self, path: str) -> Forward:
        module: Any = self._base.modules[path]
        forward = Forward(self._state, path, module, module.__dict__.get("forward"))
        module.forward = forward
        return forward

    def keep_gradients(self) -> None:
        """Let gradients reach adapters through checkpoints of a frozen model.

        torch's reentrant checkpointing gives no gradients to what is inside of one if nothing
        that goes in requires them; a frozen model's embeddings do not.
        """
        model: Any = self._base.model
        find = getattr(model, "get_input_embeddings", None)
        embeddings = find() if find is not None else None
        if isinstance(embeddings, nn.Module) and not self._keeping:
            self._keeping = True
            self._root.append(embeddings.register_forward_hook(GradientHook(model)))

    def remove(self) -> None:
        """Leave the model as it was before."""
        for handle in (*self._outputs.values(), *self._root):
            handle.remove()
        for path, forward in self._forwards.items():
            _take_out(self._base.modules[path], forward)
        self._outputs.clear()
        self._forwards.clear()
        self._root = []


def _take_out(module: nn.Module, forward: Forward) -> None:
    """Take a stand-in out of an instance, also if another one was put over it."""
    for name in ("forward", "_old_forward"):  # accelerate keeps what it found as the second
        if module.__dict__.get(name) is forward:
            if forward.inner is not None:
                module.__dict__[name] = forward.inner
            elif name == "forward":
                del module.__dict__[name]
            else:
                module.__dict__[name] = functools.partial(type(module).forward, module)


class RootBefore(Hook):
    """Before the whole model runs: does the batch fit, and does compiled code know the scopes?"""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Check the batch."""
        if self.state.in_tasks:
            scopes.refresh_mirror()
        if torch.compiler.is_compiling():
            return
        selection = self.state.selection()
        if selection is not None:
            batch = batch_of(args, kwargs)
            if batch is not None:
                selection.check(batch, kwargs)


class PartBefore(Hook):
    """Before a part of the model runs that is also called by itself: does its batch fit?"""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Check the batch."""
        if torch.compiler.is_compiling():
            return
        selection = self.state.selection()
        batch = batch_of(args, kwargs) if selection is not None else None
        if selection is not None and batch is not None:
            selection.check(batch)


def parts_called_alone(model: Any) -> list[nn.Module]:
    """Return the parts of a model that generate, or a user, calls by themselves."""
    found: list[Any] = [getattr(model, "base_model", None)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found += [getattr(model, f"get_{side}", lambda: None)() for side in ("encoder", "decoder")]
    parts = {id(part): part for part in found if isinstance(part, nn.Module) and part is not model}
    return list(parts.values())


class RootAfter(Hook):
    """After the whole model ran: what the backward pass runs again has the same scopes."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Note the scopes with the outputs."""
        if torch.compiler.is_compiling():
            return
        selection = self.state.selection()
        if selection is not None:
            selection.done()
        if not torch.is_grad_enabled():
            return
        scopes.remember_for_backward(
            tensors_in(output), {**scopes.current(), self.state.key: selection}
        )


class GradientHook(Hook):
    """Lets an embedding's output require gradients where the model checkpoints its layers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Mark the output."""
        wanted = module.training and torch.is_grad_enabled() and not output.requires_grad
        if wanted and is_checkpointing(self._model()):
            output.requires_grad_(True)


def is_checkpointing(model: nn.Module | None) -> bool:
    """Whether a transformers model computes parts of its forward pass again for gradients."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # newer name first
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False


_BATCHED = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds",
            "input_features", "input_values", "pixel_values")  # fmt: skip


def batch_of(args: Any, kwargs: Any) -> int | None:
    """Return how many rows a call of the whole model has; None where it does not say."""
    for name in _BATCHED:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
