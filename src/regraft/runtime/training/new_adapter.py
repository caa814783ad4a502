"""New adapters to be trained: their tensors, under PEFT's keys and with PEFT's first values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regraft.adapters.lora_config import LoraConfig, as_config
from regraft.adapters.settings import LoraSettings, read_settings
from regraft.adapters.wrappers import PREFIX
from regraft.deltas.ranks.initial_factors import FACTORIZATIONS
from regraft.errors import MismatchError, Problem, UnsupportedError
from regraft.runtime.forward.layers.kinds import CONV1D, CONVOLUTION, EMBEDDING, LINEAR, kind_of
from regraft.runtime.forward.layers.plain import plain_weight
from regraft.runtime.model.live_base import LiveBase, input_embedding
from regraft.runtime.model.matching import LiveAdapter, adapter_of, match_live
from regraft.runtime.model.parametrized import computed_leaves, is_computed, way_back
from regraft.runtime.training.first_values import FirstValues, dtype_of_factors
from regraft.runtime.training.selecting import completed, modules_of, nothing_selected

__all__ = ["LoraConfig", "as_config", "new_adapter"]


def new_adapter(
    base: LiveBase,
    config: LoraConfig | Mapping[str, Any] | Any,
    name: str,
    *,
    generator: torch.Generator | None = None,
) -> LiveAdapter:
    """Return an adapter to be trained on a live model; the model is only looked at.

    Its tensors are parameters in float32, on the devices of what they adapt. Their keys, shapes and
    first values are those of PEFT, also by the seed (see
    :mod:`regraft.runtime.training.first_values`). A and B begin as Hu et al. (2021) have it, so
    that the adapter changes nothing yet: A uniform in ±1/sqrt(inputs), B zero; of an embedding A
    zero and B normal. DoRA's magnitudes are the norms of the weight, copies the base's values.

    Args:
        base: the model.
        config: what to train; PEFT's config and a mapping of its fields do too.
        name: the adapter's.
        generator: for the random values, on the CPU; torch's own by default.

    Raises:
        UnsupportedError: the config asks for what regraft does not train, or selects a layer that
            cannot be adapted.
        UsageError: the config contradicts itself, or names no targets.
        MismatchError: it selects nothing in this model.
    """
    fields = completed(base, as_config(config).to_dict())
    settings = read_settings(fields, f"the config of {name!r}")
    maker = _Maker(base, settings, generator)
    tensors = maker.made()
    if maker.has_conv1d:
        fields["fan_in_fan_out"] = True
    adapter = adapter_of(name, fields, tensors)
    match_live(base, [adapter])
    return LiveAdapter(name, fields, adapter, tensors)


class _Maker:
    """Makes the tensors of one adapter, module by module."""

    def __init__(
        self, base: LiveBase, settings: LoraSettings, generator: torch.Generator | None
    ) -> None:
        self._base, self._settings = base, settings
        self._start = settings.init_lora_weights
        self._first = FirstValues(self._start, generator)
        self._device = base.device
        self._tensors: dict[str, Tensor] = {}
        self._adapted: dict[str, str] = {}  # the key of each adapted module, by its path
        self._problems: list[Problem] = []
        self.has_conv1d = False

    def made(self) -> dict[str, Tensor]:
        """Return the tensors.

        Raises:
            UnsupportedError, MismatchError: as :func:`new_adapter`.
        """
        for path, module in modules_of(self._base):
            if self._settings.targets(path) and not self._is_tied_head(path):
                self._adapt(path, module)
        for path, module in modules_of(self._base):
            leaves = self._parameters(path, module)
            for place, leaf in enumerate(leaves):
                self._adapt_parameter(path, module, leaf, len(leaves) - 1 - place)
        if self._problems:
            raise UnsupportedError(self._problems)
        if not self._tensors and (
            self._settings.target_modules or self._settings.target_parameters
        ):
            raise nothing_selected(self._base, self._settings)
        self._tie_head()
        self._copy_biases()
        self._copy_rows()
        self._copy_modules()
        if not self._tensors:
            raise nothing_selected(self._base, self._settings)
        return self._tensors

    # -- factors ---------------------------------------------------------------------------------

    def _adapt(self, path: str, module: nn.Module) -> None:
        """Add the factors of one module that the config targets."""
        if isinstance(module, nn.MultiheadAttention):
            self._adapt_attention(path, module)
            return
        kind = kind_of(module)
        if kind is None:
            hint = "Name linear, embedding or convolution layers in target_modules"
            self._refuse(path, f"{type(module).__name__} cannot be adapted", hint)
            return
        self.has_conv1d |= kind is CONV1D
        self._adapted[path] = path
        if kind is EMBEDDING:
            self._adapt_embedding(path, module)
        elif kind is CONVOLUTION:
            self._adapt_convolution(path, module)
        else:
            inputs, outputs = _sizes(module)
            self._add_pair(path, path, (inputs,), (outputs,), path)
            self._add_magnitude(path, path, module, (outputs,))

    def _adapt_attention(self, path: str, module: nn.MultiheadAttention) -> None:
        """Add the factors of nn.MultiheadAttention: of its packed projection and its output."""
        if self._settings.use_dora or not module._qkv_same_embed_dim:
            why = "DoRA" if self._settings.use_dora else "inputs of several sizes"
            self._refuse(path, f"MultiheadAttention with {why} cannot be adapted",
                         "Leave it out, with exclude_modules")  # fmt: skip
            return
        width = module.embed_dim
        inner, key = f"{path}.out_proj", f"{path}.base_layer.out_proj"
        self._adapted |= {path: path, inner: key}
        self._add_pair(key, path, (width,), (width,), inner)
        self._add_pair(path, path, (width,), (3 * width,), path)
        self._add_pair(key, path, (width,), (width,), inner)  # PEFT draws it twice

    def _adapt_embedding(self, path: str, module: Any) -> None:
        if self._settings.lora_bias:
            self._refuse(path, "lora_bias on an embedding cannot be trained", "Leave it out")
            return
        rank, width = self._settings.rank_of(path), module.embedding_dim
        a, b = self._first.embedding(rank, module.num_embeddings, width)
        dtype = dtype_of_factors(module)
        self._add(f"{path}.lora_embedding_A", a, path, dtype)
        self._add(f"{path}.lora_embedding_B", b, path, dtype)
        self._add_magnitude(path, path, module, (width,))

    def _adapt_convolution(self, path: str, module: Any) -> None:
        if module.groups > 1:
            self._refuse(path, f"a convolution in {module.groups} groups cannot be adapted",
                         "Leave it out, with exclude_modules")  # fmt: skip
            return
        ones = (1,) * len(module.kernel_size)
        inputs, outputs = (module.in_channels, *module.kernel_size), (module.out_channels, *ones)
        self._add_pair(path, path, inputs, outputs, path)
        self._add_magnitude(path, path, module, (1, module.out_channels, *ones))

    def _add_pair(
        self, key: str, named: str, inputs: tuple[int, ...], outputs: tuple[int, ...], owner: str,
        *, experts: int = 1, leaf: str = "weight",
    ) -> None:  # fmt: skip
        """Add A and B.

        Args:
            key: where they are, in PEFT's names.
            named: the name that the config's patterns mean.
            inputs: the shape of a row of A.
            outputs: the channels that come out, and the ones that follow B's rank.
            owner: the module whose device they are on.
            experts: of a stack.
            leaf: the parameter of the owner that they adapt.
        """
        rank, dtype = self._settings.rank_of(named), None
        if self._start == "orthogonal":
            self._check_orthogonal(owner, rank)
        shapes = (rank * experts, *inputs), (outputs[0], rank * experts, *outputs[1:])
        a, b, bias = self._first.pair(*shapes, has_bias=self._settings.lora_bias, rank=rank)
        if self._start in ("pissa", "olora"):
            a, b = self._factors_of_weight(owner, rank, named)
        else:
            dtype = dtype_of_factors(self._base.modules[owner], leaf)
        self._add(f"{key}.lora_A.weight", a, owner, dtype)
        self._add(f"{key}.lora_B.weight", b, owner, dtype)
        if bias is not None:
            self._add(f"{key}.lora_B.bias", bias, owner, dtype)

    def _weight_to_begin_with(self, path: str) -> Tensor:
        """Return the weight of a layer that the config's start is for.

        Raises:
            UnsupportedError: the weight is quantized, or no linear layer's.
        """
        module, start = self._base.modules[path], str(self._start)
        weight = getattr(module, "weight", None)
        kinds = (LINEAR,) if start == "olora" else (LINEAR, CONV1D)  # PEFT's OLoRA turns none
        if kind_of(module) not in kinds or not isinstance(weight, Tensor):
            raise UnsupportedError(
                f"init_lora_weights={start!r} is for linear layers", where=path,
                found=type(module).__name__,
            )  # fmt: skip
        if not weight.is_floating_point():
            raise UnsupportedError(
                f"init_lora_weights={start!r} needs plain weights", where=path,
                found=type(weight).__name__, hint="Load the base unquantized, or begin with True",
            )  # fmt: skip
        return weight

    def _factors_of_weight(self, path: str, rank: int, named: str) -> tuple[Tensor, Tensor]:
        """Return A and B that PiSSA or OLoRA begins with (out, in).

        Raises:
            UnsupportedError: as :meth:`_weight_to_begin_with`.
        """
        module = self._base.modules[path]
        self._weight_to_begin_with(path)
        matrix = plain_weight(module, "weight", path).detach().float().cpu().numpy()
        matrix = matrix.T if kind_of(module) is CONV1D else matrix
        scale = float(np.float32(self._settings.scale_of(named)))
        b, a = FACTORIZATIONS[str(self._start)](matrix, rank, scale)
        if a.shape[0] < rank:
            raise MismatchError("the rank is larger than the weight", where=path,
                                expected=f"at most {a.shape[0]}", found=str(rank))  # fmt: skip
        return torch.from_numpy(a.copy()), torch.from_numpy(b.copy())

    def _check_orthogonal(self, path: str, rank: int) -> None:
        """Refuse an orthogonal start where PEFT has none.

        Raises:
            UnsupportedError: the weight is quantized, or no linear layer's, or the rank is odd.
        """
        self._weight_to_begin_with(path)
        if rank % 2:
            raise UnsupportedError(
                "init_lora_weights='orthogonal' needs an even rank", where=path, found=str(rank),
                hint="Choose another r, or another rank in rank_pattern",
            )  # fmt: skip

    def _add_magnitude(
        self, key: str, path: str, module: nn.Module, shape: tuple[int, ...]
    ) -> None:
        """Add DoRA's magnitudes: the norms of the weight with its delta, by output channel.

        As with PEFT they are rounded as the factors are.
        """
        if not self._settings.use_dora:
            return
        kind, dtype = kind_of(module), dtype_of_factors(module) or torch.float32
        weight = plain_weight(module, "weight", path).detach()
        grown = weight.t() if kind is not None and kind.by_column else weight
        grown = grown.to(torch.promote_types(grown.dtype, dtype))
        if self._start in (False, "orthogonal"):
            ends = ("lora_embedding_A", "lora_embedding_B")
            names = ends if kind is EMBEDDING else ("lora_A.weight", "lora_B.weight")
            a, b = (self._tensors[f"{PREFIX}{key}.{end}"].detach() for end in names)
            delta = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
            grown = grown + self._settings.scale_of(path) * delta.reshape(grown.shape).to(dtype)
        norms = torch.linalg.vector_norm(grown, dim=tuple(range(1, grown.dim())))
        self._add(f"{key}.lora_magnitude_vector", norms.reshape(shape), path)

    # -- parameters of experts -------------------------------------------------------------------

    def _parameters(self, path: str, module: nn.Module) -> list[str]:
        """Return the parameters of a module that the config names, as they are registered."""
        named = self._settings.parameters_of(path)
        computed = [leaf for leaf in computed_leaves(module) if leaf in named]
        for leaf in computed:
            what = "a computed weight (parametrization, weight_norm) is no target of"
            hint = "Name its layer in target_modules"
            self._refuse(f"{path}.{leaf}", f"{what} target_parameters", hint)
        return [leaf for leaf in module._parameters if leaf in named and leaf not in computed]

    def _adapt_parameter(self, path: str, module: Any, leaf: str, depth: int) -> None:
        """Add the factors of one parameter; the one registered first is wrapped first by PEFT."""
        shape, name = tuple(getattr(module, leaf).shape), f"{path}.{leaf}"
        settings = self._settings
        if settings.use_dora or settings.lora_bias or len(shape) not in (2, 3):
            self._refuse(name, "a parameter with DoRA, with lora_bias, or of other than 2 or 3 "
                         "dimensions cannot be adapted", "Leave it out")  # fmt: skip
            return
        experts, outputs, inputs = (1, *shape) if len(shape) == 2 else shape
        if len(shape) == 3 and getattr(module, "is_transposed", False):
            outputs, inputs = inputs, outputs
        key = path + ".base_layer" * depth
        self._add_pair(key, name, (inputs,), (outputs,), path, experts=experts, leaf=leaf)

    # -- copies ----------------------------------------------------------------------------------

    def _copy_biases(self) -> None:
        """Add copies of the base's biases, where they are trained."""
        if self._settings.bias == "none":
            return
        for path, module in modules_of(self._base):
            bias = module._parameters.get("bias")
            wanted = self._settings.bias == "all" or path in self._adapted
            if bias is None or not wanted or self._settings.saves(f"{path}.bias"):
                continue
            adapted = self._adapted.get(path)
            key = f"{adapted}.base_layer.bias" if adapted is not None else f"{path}.bias"
            self._add(key, bias.detach().clone(), path)

    def _copy_modules(self) -> None:
        """Add copies of the modules that are trained whole."""
        settings = self._settings
        tied = self._base.tied if settings.ensure_weight_tying else {}
        for name in filter(settings.saves, (*self._base.checkpoint.tensors, *self._base.tied)):
            path, module, leaf = self._base.owner(name)
            if is_computed(module, leaf):
                raise UnsupportedError(
                    "a module whose weight is computed from other parameters (a parametrization, "
                    "weight_norm) cannot be trained whole", where=name,
                    found=type(module).__name__, hint=way_back(module, leaf),
                )  # fmt: skip
            other = tied.get(name)
            if other is not None and PREFIX + other in self._tensors:
                self._tensors[PREFIX + name] = self._tensors[PREFIX + other]
                self._first.new_layer(tuple(self._tensors[PREFIX + name].shape))
            else:
                self._add(name, plain_weight(module, leaf, name).detach().clone(), path)

    def _copy_rows(self) -> None:
        """Add the rows of embeddings that are trained."""
        for wanted, indices in self._settings.trainable_token_indices:
            for path, module in self._embeddings(wanted):
                weight = plain_weight(module, "weight", path).detach()
                if max(indices) >= weight.shape[0]:
                    raise MismatchError(
                        "trainable_token_indices has rows that the embedding does not", where=path,
                        expected=f"rows below {weight.shape[0]}", found=str(max(indices)),
                    )  # fmt: skip
                rows = weight[torch.tensor(indices, device=weight.device)]
                key = f"{path}.token_adapter.trainable_tokens_delta"
                self._add(key, rows, path)

    def _embeddings(self, wanted: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that are meant; of a tie the input side alone."""
        if not wanted:
            yield from self._input_embedding()
            return
        found = [(p, m) for p, m in modules_of(self._base) if p.endswith(wanted)]
        if not found:
            raise MismatchError(
                "trainable_token_indices names no module of the model", where=wanted,
                hint="Give a list for the input embedding",
            )  # fmt: skip
        alone = [(p, m) for p, m in found if f"{p}.weight" not in self._base.tied]
        yield from (alone if alone or self._rows_of_tie_elsewhere(found) else found)

    def _rows_of_tie_elsewhere(self, found: list[tuple[str, nn.Module]]) -> bool:
        """Whether the config also names the side that these modules are tied to.

        Raises:
            UnsupportedError: with other rows; two sides of a tie are one here.
        """
        owners = {self._base.tied[f"{path}.weight"].rpartition(".")[0] for path, _ in found}
        both = [*owners, *(path for path, _ in found)]
        wanted = {
            name: tuple(indices) for name, indices in self._settings.trainable_token_indices
            if name and any(path.endswith(name) for path in both)
        }  # fmt: skip
        if len(set(wanted.values())) > 1:
            raise UnsupportedError(
                "trainable_token_indices has other rows for the two sides of a tie",
                where=", ".join(wanted), expected="the same rows, in one order",
                found="; ".join(map(str, wanted.values())),
                hint="Name the embedding alone: the side that is tied to it has its rows",
            )  # fmt: skip
        return any(owner.endswith(name) for owner in owners for name in wanted)

    def _input_embedding(self) -> Iterator[tuple[str, nn.Module]]:
        module = input_embedding(self._base.model)
        for path, other in modules_of(self._base):
            if other is module or (module is None and path.endswith("embed_tokens")):
                yield path, other
                return
        raise MismatchError("the model's input embedding is not known", hint="Name it: "
                            "trainable_token_indices={'embed_tokens': [...]}")  # fmt: skip

    # -- ties ------------------------------------------------------------------------------------

    def _is_tied_head(self, path: str) -> bool:
        """Whether a module gets its factors from the embedding that it is tied to."""
        return self._settings.ensure_weight_tying and f"{path}.weight" in self._base.tied

    def _tie_head(self) -> None:
        """Give modules tied to an adapted embedding its factors, as views: they stay one.

        They begin as the factors of a linear layer do, as with PEFT.
        """
        if not self._settings.ensure_weight_tying:
            return
        for name, owner in self._base.tied.items():
            head, embedding = (PREFIX + n.removesuffix(".weight") for n in (name, owner))
            b = self._tensors.get(f"{embedding}.lora_embedding_B")
            path, module, _ = self._base.owner(name)
            if b is not None and kind_of(module) is LINEAR:
                self._begin_tied(b, path, module)
                self._tensors[f"{head}.lora_A.weight"] = b.t()
                a = self._tensors[f"{embedding}.lora_embedding_A"]
                self._tensors[f"{head}.lora_B.weight"] = a.t()

    def _begin_tied(self, b: Tensor, path: str, module: nn.Module) -> None:
        """Draw B of an embedding anew, as A of the head that is tied to it.

        PEFT draws into a view, on the embedding's device and in its dtype; so which value lands
        where goes by the order in memory.

        Raises:
            UnsupportedError: the config asks for a start that would not keep them tied.
        """
        if self._start == "orthogonal":
            raise UnsupportedError(
                "init_lora_weights='orthogonal' gives a head factors of its own", where=path,
                expected="those of the embedding that it is tied to",
                hint="Begin with True, or leave ensure_weight_tying out",
            )  # fmt: skip
        rank, (inputs, outputs) = self._settings.rank_of(path), _sizes(module)
        self._first.new_layers((rank, inputs), (outputs, rank), has_bias=False)
        if self._start is not False:
            drawn = b.data.to(self._first.device_beside(b), dtype_of_factors(module))
            self._first.begin(drawn.t(), rank)
            b.data.copy_(drawn)

    # -- keeping ---------------------------------------------------------------------------------

    def _add(self, key: str, value: Tensor, owner: str, rounded: torch.dtype | None = None) -> None:
        """Keep a new tensor as a parameter in float32, on its module's device.

        Args:
            key: its key, without PEFT's prefix.
            value: its values.
            owner: the module.
            rounded: a dtype that the values are rounded to before.
        """
        parameters = self._base.modules[owner].parameters()
        device = next((p.device for p in parameters if p.device.type != "meta"), self._device)
        value = value.detach() if rounded is None else value.detach().to(rounded)
        moved = value.to(device=device, dtype=torch.float32)
        self._tensors[PREFIX + key] = nn.Parameter(moved.contiguous())

    def _refuse(self, where: str, what: str, hint: str) -> None:
        self._problems.append(Problem(what, where, hint=hint))


def _sizes(module: Any) -> tuple[int, int]:
    """Return how many values go into a linear layer, and how many come out."""
    if kind_of(module) is CONV1D:
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)
