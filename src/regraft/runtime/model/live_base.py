"""A running model seen as a checkpoint: its parameters by name, as adapters are matched with them.

Adapters are matched with a live model by the code that matches them with files. What it is given
are the model's own parameters, under their own names, so nothing is renamed on this side; an
adapter's names still are, from whatever version of transformers they come.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.formats.checkpoint import Checkpoint
from regraft.merging.inputs.base_index import BaseIndex, ResolvedName, StoredPart
from regraft.merging.inputs.single_experts import as_slice
from regraft.names import NameMap, Piece
from regraft.names.architecture import Config
from regraft.runtime.model.parametrized import computed_leaves
from regraft.runtime.model.quantized_parameters import Scales, plain_form, remembered
from regraft.runtime.model.wrappers import plain_paths
from regraft.tensors import BY_CONFIG_NAME, DTYPES, VIRTUAL, TensorSpec, nbytes_of

IN_MEMORY = Path("memory")
"""Stands for the file of a tensor that lies in no file."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype, ``"?"`` for one it does not have."""
    found = BY_CONFIG_NAME.get(str(dtype).removeprefix("torch."))
    return found.name if found else "?"


def torch_dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of a safetensors name, such as ``"BF16"``.

    Raises:
        AttributeError: torch does not have it.
    """
    found: torch.dtype = getattr(torch, DTYPES[name].config_name)
    return found


def spec_of(name: str, shape: Iterable[int], dtype: torch.dtype) -> TensorSpec:
    """Return the description of a tensor in memory."""
    kind, sizes = dtype_name(dtype), tuple(shape)
    size = nbytes_of(kind, sizes) if kind != "?" else 0
    return TensorSpec(name, kind, sizes, IN_MEMORY, VIRTUAL, size)


class LiveBase:
    """A model's parameters, and where each lies in its module tree.

    Attributes:
        modules: every module by its path; one that has several by each.
        config: as ``config.json`` would have it; None if the model has none.
        tied: parameters that are another one's, which is named.
        checkpoint: the parameters as a checkpoint; of a tie one side.
        index: the same, by every name an adapter may use.
        quantized: names of the parameters that are quantized.
        scales: those of 4-bit ones that a forward pass on this CPU would lose, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.scales: dict[str, Scales] = {}
        self.look()

    def look(self) -> None:
        """Look at the model as it is now: again after modules or parameters were replaced."""
        model = self.model
        paths = list(plain_paths(model))
        self.modules: dict[str, nn.Module] = {path: module for _, path, module in paths}
        self.config = config_of(model)
        self._paths = {id(module): path for path, module in reversed(self.modules.items())}
        first: dict[int, str] = {}
        self.tied: dict[str, str] = {}
        self.quantized: list[str] = []
        tensors: dict[str, TensorSpec] = {}
        for name, parameter in _parameters(self.modules):
            owner = first.setdefault(id(parameter), name)
            if owner != name:
                self.tied[name] = owner
            else:
                tensors[name] = self._spec(name, parameter)
        tensors |= self._without_weight() | self._computed()
        kept = {name: scales for name, scales in self.scales.items() if name in self.quantized}
        self.scales = kept | remembered({name: self.owner(name)[1:] for name in self.quantized})
        self._seen = _outline(self.modules)
        self.checkpoint = Checkpoint(
            root=IN_MEMORY,
            source=_source_of(model, self.config),
            revision=None,
            shards=(),
            tensors=tensors,
            config=self.config,
            index_metadata=None,
            container="safetensors",
            single_file=False,
        )
        architecture = type(model).__name__ if self.config is not None else None
        names = NameMap.for_config(self.config, architecture)
        self.index = LiveIndex(self.checkpoint, names, self)

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            ReferenceError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("the model is gone")
        return model

    @property
    def plain(self) -> Checkpoint:
        """The parameters as a checkpoint of plain weights, which they are seen as."""
        config = {k: v for k, v in (self.config or {}).items() if k != "quantization_config"}
        return replace(self.checkpoint, config=config or None)

    def is_current(self) -> bool:
        """Whether modules and parameters still are what they were when this was looked at."""
        now = {path: module for _, path, module in plain_paths(self.model)}
        known = self.modules
        same = now.keys() == known.keys() and all(now[path] is known[path] for path in now)
        return same and _outline(now) == self._seen

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in: the one that it states, or that of most of its
        weights.
        """
        named = getattr(self.model, "dtype", None)
        if isinstance(named, torch.dtype):
            return named
        plain = (p for p in self.model.parameters() if p.is_floating_point())
        found: torch.dtype | None = _of_most(plain, "dtype")
        return found or torch.float16

    @property
    def device(self) -> torch.device:
        """The device that most of the model's weights are on, for its adapters to begin on."""
        parameters = {id(parameter): parameter for _, parameter in _parameters(self.modules)}
        there = (p for p in parameters.values() if p.device.type != "meta")
        found: torch.device | None = _of_most(there, "device")
        return found or torch.device("cpu")

    def owner(self, parameter: str) -> tuple[str, nn.Module, str]:
        """Return the module path, the module and the attribute of a parameter."""
        path, _, leaf = parameter.rpartition(".")
        return path, self.modules[path], leaf

    def canonical(self, path: str) -> str:
        """Return the first path of the module that a path leads to."""
        return self._paths[id(self.modules[path])]

    def _without_weight(self) -> dict[str, TensorSpec]:
        """Return the weights of linear layers that are quantized in a way of their own."""
        found = {}
        for path, module in self.modules.items():
            if is_linear_without_weight(module):
                name = f"{path}.weight"
                shape: Any = (module.out_features, module.in_features)
                found[name] = spec_of(name, shape, self.dtype)
        return found

    def _computed(self) -> dict[str, TensorSpec]:
        """Return the weights that layers compute from other parameters."""
        found = {}
        for path, module in self.modules.items():
            for leaf in computed_leaves(module):
                weight, name = getattr(module, leaf), f"{path}.{leaf}".removeprefix(".")
                found[name] = spec_of(name, weight.shape, weight.dtype)
        return found

    def _spec(self, name: str, parameter: torch.Tensor) -> TensorSpec:
        """Return a parameter's description; of a quantized one that of its plain weight."""
        form = plain_form(parameter)
        if form is None:
            return spec_of(name, parameter.shape, parameter.dtype)
        shape, dtype = form
        self.quantized.append(name)
        return spec_of(name, shape, dtype or self.dtype)


class LiveIndex(BaseIndex):
    """The parameters of a live model by every name they can be asked for."""

    def __init__(self, base: Checkpoint, names: NameMap, live: LiveBase) -> None:
        self._live = live
        self._found: dict[str, ResolvedName] = {}  # an adapter asks for a name many times
        super().__init__(base, names)

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        return (as_slice(self.names, name) or Piece(name),)

    def _exact(self, name: str) -> ResolvedName | None:
        spec = self.base.tensors.get(name)
        if spec is None:
            return None
        found = self._found.get(name)
        if found is None:
            piece = Piece(name)
            found = self._found[name] = ResolvedName(piece, (StoredPart(spec, piece),))
        return found

    def _absent_ties(self) -> dict[str, str]:
        return dict(self._live.tied)

    def find(self, name: str) -> tuple[ResolvedName, ...]:
        """Return the parameter that a name means. A bias that a layer lacks is found too: one can
        be added.
        """
        found = super().find(name)
        if found or not name.endswith(".bias"):
            return found
        weights = super().find(f"{name.removesuffix('.bias')}.weight")
        if len(weights) != 1 or len(weights[0].held) != 1:
            return ()
        spec = weights[0].held[0].spec
        path, module, leaf = self._live.owner(weights[0].alias or spec.name)
        if leaf != "weight" or getattr(module, "bias", module) is not None:
            return ()
        outputs = spec.shape[-1] if is_conv1d(module) else spec.shape[0]
        bias = TensorSpec(f"{path}.bias", spec.dtype, (outputs,), IN_MEMORY, VIRTUAL, 0)
        return (ResolvedName(Piece(bias.name), (StoredPart(bias, Piece(bias.name)),)),)

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a module stores its weight as (in, out): here it can be looked at."""
        found = self._live.modules.get(module)
        return is_conv1d(found) if found is not None else None

    def is_transposed(self, module: str) -> bool | None:
        """Whether an experts module stores (in, out) matrices: it says so, as PEFT asks it."""
        found = self._live.modules.get(module)
        return bool(getattr(found, "is_transposed", False)) if found is not None else None


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters by name; one that has several names with each."""
    for path, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{leaf}".removeprefix("."), parameter


def _outline(modules: Mapping[str, nn.Module]) -> list[Any]:
    """Return what tells one state of the parameters from another: ties, shapes, dtypes."""
    first: dict[int, int] = {}
    return [
        (name, first.setdefault(id(p), at), p.dtype, p.shape)
        for at, (name, p) in enumerate(_parameters(modules))
    ]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, which stores its weight as (in, out)."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers")
        for cls in type(module).__mro__
    )


def is_linear_without_weight(module: nn.Module) -> bool:
    """Whether a module is a quantized linear layer that has sizes but no weight of its own."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    has_weight = isinstance(getattr(module, "weight", None), torch.Tensor)
    return all(isinstance(size, int) for size in sizes) and not has_weight


def input_embedding(model: Any) -> nn.Module | None:
    """Return a model's input embedding; None if it has none, or does not say which it is."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if get is not None else None
    except NotImplementedError:  # models of images and sound in transformers
        return None
    return found if isinstance(found, nn.Module) else None


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """Return a model's configuration as ``config.json`` would have it; None if it has none."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    return dict(config.to_dict())


def _source_of(model: nn.Module, config: Config | None) -> str:
    name = (config or {}).get("_name_or_path") or getattr(model, "name_or_path", None)
    return str(name or type(model).__name__)


def _of_most(parameters: Iterable[torch.Tensor], attribute: str) -> Any:
    """Return what most elements have in common as an attribute; None where there are none."""
    counts: dict[Any, int] = {}
    for parameter in parameters:
        value = getattr(parameter, attribute)
        counts[value] = counts.get(value, 0) + parameter.numel()
    return max(counts, key=lambda value: counts[value]) if counts else None
