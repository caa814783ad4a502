"""Weights that torch computes from other parameters: weight_norm, spectral_norm and the like.

Such a layer has no parameter called ``weight``: the parameters have other names, and the weight is
computed from them whenever it is used. A delta can be added to what the layer gives; there is no
tensor that it could be merged into.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize


def computed_leaves(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's weights that are computed from other parameters.

    Those of ``torch.nn.utils.parametrize``, and those that the older ``weight_norm`` and
    ``spectral_norm`` compute in a hook before the forward pass.
    """
    found = list(module.parametrizations) if parametrize.is_parametrized(module) else []
    hooks = getattr(module, "_forward_pre_hooks", {}).values()
    # torch.nn.utils.prune calls it by another name.
    by_hooks = [getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks]
    found += [
        name for name in by_hooks
        if isinstance(name, str) and isinstance(module.__dict__.get(name), Tensor)
    ]  # fmt: skip
    return tuple(found)


def is_computed(module: nn.Module, leaf: str) -> bool:
    """Whether a module's weight is computed from other parameters."""
    return leaf not in module._parameters and leaf in computed_leaves(module)


def computing_module(modules: Mapping[str, nn.Module], path: str, leaf: str) -> nn.Module | None:
    """Return the layer that a parameter is a computed weight of, or that a weight is computed from.

    Args:
        modules: those of the model, by path.
        path: of the module that has the parameter.
        leaf: the parameter.

    Returns:
        The layer; None for a plain parameter that is used as it is.
    """
    outer, below, _ = path.rpartition(".parametrizations.")
    if below:
        return modules[outer]
    module = modules[path]
    computed = computed_leaves(module)
    from_it = any(leaf.startswith(f"{each}_") for each in computed)
    return module if leaf in computed or from_it else None


def way_back(module: nn.Module, leaf: str) -> str:
    """Return what makes a computed weight a plain parameter again."""
    names = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
    old = next((call for name, call in _OLD.items() if name in names), None)
    call = old or f"parametrize.remove_parametrizations(module, {_leaf(module, leaf)!r})"
    return f"Make it plain before attaching: torch.nn.utils.{call}"


_OLD = {"WeightNorm": "remove_weight_norm(module)", "SpectralNorm": "remove_spectral_norm(module)"}


def _leaf(module: nn.Module, leaf: str) -> str:
    found = computed_leaves(module)
    return leaf if leaf in found or not found else found[0]
