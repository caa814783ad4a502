"""How adapters come to be heard as a model runs: hooks on its modules, and nothing else of it.

Outputs are changed by forward hooks. Where a module has to run on other weights, its forward pass
is found through an attribute of the instance, as accelerate does it. Neither shows in the module
tree, in ``state_dict()`` or in the class. Copies of the model (``copy.deepcopy``) share the
adapters; a pickled model is the plain one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regraft.errors import UsageError
from regraft.runtime.forward import scopes
from regraft.runtime.forward.answer import Answer
from regraft.runtime.model.live_base import LiveBase, input_embedding
from regraft.runtime.model.watching import Watch, lost_in_copy
from regraft.runtime.model.wrappers import plain_paths
from regraft.runtime.whole import whole


class State:
    """What hooks ask: which selection answers now.

    Attributes:
        key: the handle's number.
        default: the selection of the handle, where no scope says otherwise.
        is_merged: whether the adapters are in the weights, so that nothing is to be added.
        in_tasks: whether scopes were opened in asyncio tasks.
        is_torn: whether some weights are merged and others are not; the model is not run then.
        open_scopes: the scopes that are open now, in whatever thread.
    """

    def __init__(self, key: int) -> None:
        self.key = key
        self.default: Answer | None = None
        self.is_merged = False
        self.in_tasks = self.is_torn = False
        self.open_scopes: set[Any] = set()

    def selection(self) -> Answer | None:
        """Return the selection that answers here, or None."""
        if self.is_merged:
            return None
        found: Any = scopes.find(self.key)
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

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        """Return the output as the adapters have it, or None to leave it.

        Args:
            module: the layer.
            args: what it was called with.
            rest: its keyword arguments and its output; the output alone where a library has moved
                the hook to another module, as torch.ao does.
        """
        selection = self.state.selection()
        if selection is None:
            return None
        kwargs, output = rest if len(rest) == 2 else ({}, rest[0])
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

    def __init__(self, base: LiveBase, state: State, follow: Callable[[], None]) -> None:
        """Put hooks on the whole model.

        Args:
            base: the model.
            state: what all hooks ask.
            follow: called before a forward pass of a model in which a module was replaced.
        """
        self._base, self._state = base, state
        self._outputs: dict[str, tuple[nn.Module, OutputHook, RemovableHandle]] = {}
        self._forwards: dict[str, Forward] = {}
        self._keeping: tuple[nn.Module, RemovableHandle] | None = None
        self.watch = Watch()
        forget_compiled()
        model = base.model
        before = RootBefore(state, self, follow)
        self._root = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(RootAfter(state)),
        ]
        for part in parts_called_alone(model):
            self._root.append(part.register_forward_pre_hook(PartBefore(state), with_kwargs=True))

    def cover(self, outputs: Iterable[str], forwards: Iterable[str]) -> None:
        """Put hooks on the modules that a selection needs, where there are none yet."""
        outputs, forwards = tuple(outputs), tuple(forwards)
        if all(p in self._outputs for p in outputs) and all(p in self._forwards for p in forwards):
            return
        whole(functools.partial(self._cover, outputs, forwards))

    def _cover(self, outputs: Sequence[str], forwards: Sequence[str]) -> None:
        new = [path for path in outputs if path not in self._outputs]
        for path in new:
            self._outputs[path] = self._hooked(path)
        for path in forwards:
            if path not in self._forwards:
                self._forwards[path] = self._stand_in(path)
                self._cover((path,), ())  # a hook also keeps torch from its fused fast paths
        if new:
            self.look()

    def _hooked(self, path: str) -> tuple[nn.Module, OutputHook, RemovableHandle]:
        hook, module = OutputHook(self._state, path), self._base.modules[path]
        _drop_hooks(module, self._state)
        return module, hook, module.register_forward_hook(hook, with_kwargs=True)

    def _stand_in(self, path: str) -> Forward:
        module: Any = self._base.modules[path]
        inner = module.__dict__.get("forward")
        if isinstance(inner, Forward) and inner.state is self._state:  # it came with a copy
            inner = inner.inner
        forward = Forward(self._state, path, module, inner)
        module.forward = forward
        return forward

    def look(self) -> None:
        """Note the modules that have hooks, so that a replaced one is noticed."""
        self.watch = Watch(self._base.model, self._touched())

    def _touched(self) -> set[str]:
        kept = [] if self._keeping is None else [self._keeping[0]]
        there = {id(module) for module in kept}
        return {*self._outputs, *(p for p, m in self._base.modules.items() if id(m) in there)}

    @property
    def paths(self) -> list[str]:
        """Paths of the modules that hooks are on."""
        return list(self._outputs)

    def watch_of(self, model: nn.Module) -> Watch:
        """Return the same for another model that shares the hooks: a copy, or a twin.

        Raises:
            MismatchError: a module of it lacks the hook.
        """
        modules = {path: module for _, path, module in plain_paths(model)}
        lost = [path for path in self._outputs if not _has_hook(modules.get(path), self._state)]
        if lost:
            raise lost_in_copy(lost)
        return Watch(model, set(self._outputs))

    def follow(self) -> None:
        """Move hooks from modules that were replaced to the modules in their places."""
        for path, forward in list(self._forwards.items()):
            if forward.module is not self._base.modules[path]:
                _take_out(forward.module, forward)
                self._forwards[path] = self._stand_in(path)
        for path, (module, _, handle) in list(self._outputs.items()):
            if module is not self._base.modules[path]:
                handle.remove()
                self._outputs[path] = self._hooked(path)
        if self._keeping is not None:
            self._keeping[1].remove()
            self._keeping = None
            self.keep_gradients()
        self.look()
        forget_compiled()

    def keep_gradients(self) -> None:
        """Let gradients reach adapters through checkpoints of a frozen model.

        torch's reentrant checkpointing gives no gradients to what is inside of one if nothing
        that goes in requires them; a frozen model's embeddings do not.
        """
        model = self._base.model
        embeddings = input_embedding(model)
        if embeddings is not None and self._keeping is None:
            handle = embeddings.register_forward_hook(GradientHook(model))
            self._keeping = embeddings, handle
            self.look()

    def remove(self) -> None:
        """Leave the model as it was before."""
        outputs = [handle for _, _, handle in self._outputs.values()]
        for handle in (*outputs, *self._root):
            handle.remove()
        if self._keeping is not None:
            self._keeping[1].remove()
        for forward in self._forwards.values():
            _take_out(forward.module, forward)
        self._outputs.clear()
        self._forwards.clear()
        self._root, self._keeping, self.watch = [], None, Watch()


def _has_hook(module: nn.Module | None, state: State) -> bool:
    hooks = module._forward_hooks.values() if module is not None else ()
    return any(isinstance(hook, OutputHook) and hook.state is state for hook in hooks)


def _drop_hooks(module: nn.Module, state: State) -> None:
    """Take a handle's hooks off that a library has copied to a module in the place of another."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, OutputHook) and hook.state is state:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


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
    """Before the whole model runs: are the adapters' modules there, and does the batch fit?"""

    def __init__(self, state: State, hooks: Hooks, follow: Callable[[], None]) -> None:
        self.state, self._hooks, self._follow = state, hooks, follow
        self._others: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Look for modules that were replaced, and check the batch."""
        if self.state.in_tasks:
            scopes.refresh_mirror()
        if not torch.compiler.is_compiling():
            self._before(module, args, kwargs)
        elif not self._holds():
            self._check(module)

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.state.is_torn:
            raise torn()
        self._look(module)
        if self.state.open_scopes and scopes.find(self.state.key) is scopes.UNSET:
            check_thread()
        selection = self.state.selection()
        if selection is not None:
            batch = batch_of(args, kwargs)
            if batch is not None:
                selection.check(batch, kwargs)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
    def _holds(self) -> bool:
        """Whether all modules are there; asked while code is compiled, and not in the code."""
        return self._hooks.watch.holds()

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _check(self, module: nn.Module) -> None:
        self._look(module)

    def _look(self, module: nn.Module) -> None:
        """See whether the model that runs has the modules that the hooks are on.

        Raises:
            MismatchError: it has others, which the adapters do not fit.
        """
        if module is not self._hooks.watch.model():
            self._look_at_other(module)
        elif not self._hooks.watch.holds():
            self._follow()

    def _look_at_other(self, module: nn.Module) -> None:
        """See to a copy, or to the twin that transformers' Trainer has."""
        if "_regraft_model" in vars(module) and not self._hooks.watch.holds():
            self._follow()
        if getattr(module, "_is_replica", False):
            raise on_several_devices()
        watch = self._others.get(module)
        if watch is None or not watch.holds():
            self._others[module] = self._hooks.watch_of(module)


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


with contextlib.suppress(ImportError, AttributeError):
    # A compiled model calls the hook outside of the code that is compiled. It would be compiled by
    # itself then, once, and look at nothing any more; in one graph with the model it still can be.
    from torch._dynamo.eval_frame import skip_code

    skip_code(RootBefore.__call__.__code__)


def torn() -> UsageError:
    """Return the error of weights that are partly merged, because a failure was not undone."""
    return UsageError(
        "a merge failed, and so did taking it back: some weights are merged and others are not",
        hint="Call unmerge_adapter() to take back the rest; if it fails, load the model again",
    )


def check_thread() -> None:
    """Refuse a library's thread that answers for a scope which it does not have.

    Raises:
        UsageError: it is the thread of transformers' ``generate_batch``.
    """
    target = getattr(threading.current_thread(), "_target", None)
    if type(getattr(target, "__self__", None)).__name__ == "ContinuousBatchingManager":
        raise UsageError(
            "generate_batch() runs in a thread of its own, which has not the adapters of this "
            "scope", where="using(), rows() or disable_adapter()",
            hint="Choose adapters with set_adapter() before generate_batch(), outside of scopes; "
            "or use generate(), which runs in the scope",
        )  # fmt: skip


def on_several_devices() -> UsageError:
    """Return the error of a copy of the model that DataParallel has made for another device."""
    return UsageError(
        "adapters do not work in torch.nn.DataParallel on several devices", where="forward()",
        expected="one device, or DistributedDataParallel", found="a replica of DataParallel",
        hint="Start one process for each device (torchrun, accelerate launch), or let the process "
        "see one device only (CUDA_VISIBLE_DEVICES=0)",
    )  # fmt: skip


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
