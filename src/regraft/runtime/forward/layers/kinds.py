"""Kinds of layers to whose output a low-rank delta can be added, without touching their weight.

A delta on the stored weight is ``left @ right``. For each kind this says which of the two meets the
input first, and how a vector with one value per output channel is laid out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from regraft.errors import UnsupportedError
from regraft.runtime.model.live_base import is_conv1d, is_linear_without_weight


@dataclass(frozen=True)
class Kind:
    """How a kind of layer meets a delta.

    Attributes:
        name: what it is called.
        factors: ``(module, left, right)`` to A and B, as ``down`` and ``up`` take them.
        down: ``(module, x, A)`` to the input in r channels.
        up: ``(module, h, B)`` to what is added to the output.
        channels: ``(module, vector)``, a value per output channel, to a shape that broadcasts.
        base: ``(module, x, weight)`` to the output without bias, for another input.
        by_column: whether the stored weight's columns are the output channels.
        in_place: whether the output is new memory that may be added to.
    """

    name: str
    factors: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    down: Callable[[nn.Module, Tensor, Tensor], Tensor]
    up: Callable[[nn.Module, Tensor, Tensor], Tensor]
    channels: Callable[[nn.Module, Tensor], Tensor]
    base: Callable[[nn.Module, Tensor, Tensor], Tensor]
    by_column: bool = False
    in_place: bool = False


def kind_of(module: nn.Module) -> Kind | None:
    """Return a layer's kind; None where a delta has to go into the weight itself."""
    if is_conv1d(module):
        return CONV1D
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return CONVOLUTION
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.Linear) or is_linear_without_weight(module):
        return LINEAR
    return None


_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_ALL_THE_SAME = frozenset({"FalconLinear", "WeightStandardizedConv2d"})
"""Classes of models that are linear layers all the same, and one whose output is not linear in its
weight: PEFT adds to what comes out."""


def runs_otherwise(module: nn.Module) -> bool:
    """Whether a model's own class makes more of its weight than a linear layer or a convolution.

    Routers return several tensors, and causal convolutions pad their input first: a delta cannot
    be added to what comes out, and has to go into the weight.
    """
    cls = type(module)
    of_a_model = cls.__module__.startswith(("transformers.models.", "transformers_modules."))
    if not of_a_model or cls.__name__ in _PLAIN_ALL_THE_SAME:
        return False
    return any(isinstance(module, p) and cls.forward is not p.forward for p in _PLAIN)


# -- linear layers ---------------------------------------------------------------------------------


def _as_is(_module: nn.Module, vector: Tensor) -> Tensor:
    return vector


def _linear(_module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


LINEAR = Kind(
    "linear",
    factors=lambda _m, left, right: (right, left),
    down=_linear,
    up=_linear,
    channels=_as_is,
    base=_linear,
    in_place=True,
)

CONV1D = Kind(
    "Conv1D",
    factors=lambda _m, left, right: (left.t(), right.t()),
    down=_linear,
    up=_linear,
    channels=_as_is,
    base=lambda _m, x, weight: functional.linear(x, weight.t()),
    by_column=True,
    in_place=True,
)


# -- embeddings ------------------------------------------------------------------------------------


def _look_up(module: Any, ids: Tensor, table: Tensor) -> Tensor:
    """Look rows of another table up as the module does it."""
    return looked_up(module, ids, table, module.padding_idx)


def _class_of(module: nn.Module) -> type:
    """Return a module's class; of a parametrized one the class that it had before.

    Raises:
        UnsupportedError: that one has a lookup of its own, in which the weight cannot be replaced.
    """
    cls = type(module)
    if not parametrize.is_parametrized(module, "weight"):
        return cls
    if cls.__bases__[0] is not nn.Embedding:
        raise UnsupportedError(
            "an embedding with a lookup of its own, whose weight is computed (a parametrization), "
            "takes no adapter", found=cls.__bases__[0].__name__,
            hint="Make the weight plain: torch.nn.utils.parametrize.remove_parametrizations",
        )  # fmt: skip
    return nn.Embedding


def looked_up(module: Any, ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """Look rows of another table up as the module does it, its factor on them included.

    Its other settings count too, as they do in PEFT: rows are rescaled to ``max_norm``, gradients
    by ``scale_grad_by_freq``, and the padding row gets none. They are never ``sparse``: gradients
    of factors cannot be.

    Args:
        module: the embedding.
        ids: numbers of rows.
        table: the rows.
        padding_idx: the number of the padding row in this table.
    """
    if module.max_norm is not None:
        table = table.clone()  # torch rescales rows where they lie
    if _class_of(module) is not nn.Embedding:
        twin = shadow(module, {"weight": table})
        twin.__dict__.update(padding_idx=padding_idx, sparse=False)
        rows = twin.forward(ids)
        if isinstance(rows, Tensor):
            return rows
    return functional.embedding(
        ids, table, padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq
    )


EMBEDDING = Kind(
    "embedding",
    factors=lambda _m, left, right: (left, right.t()),
    down=_look_up,
    up=_linear,
    channels=_as_is,
    base=_look_up,
    by_column=True,
)


# -- convolutions ----------------------------------------------------------------------------------


def _conv_factors(module: Any, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    kernel = module.weight.shape[1:]
    ones = (1,) * len(module.kernel_size)
    return right.reshape(-1, *kernel), left.reshape(*left.shape, *ones)


def _conv_down(module: Any, x: Tensor, a: Tensor) -> Tensor:
    """Convolve with A; of a grouped convolution each group of the input meets all of A."""
    if module.groups > 1:
        a = a.repeat(module.groups, *(1,) * (a.dim() - 1))
    return _convolve(module, x, a)


def _convolve(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = module._conv_forward(x, weight, None)
    return found


def _conv_up(module: Any, h: Tensor, b: Tensor) -> Tensor:
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[b.dim() - 3]
    return convolve(h, b, groups=module.groups)


CONVOLUTION = Kind(
    "convolution",
    factors=_conv_factors,
    down=_conv_down,
    up=_conv_up,
    channels=lambda m, vector: vector.reshape(-1, *(1,) * len(m.kernel_size)),
    base=_convolve,
)


def _dense_down(module: Any, x: Tensor, a: Tensor) -> Tensor:
    """Convolve with an A that reads all channels, as PEFT's does on a grouped convolution."""
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[a.dim() - 3]
    return convolve(x, a, None, module.stride, module.padding, module.dilation)


GROUPED_CONVOLUTION = Kind(
    "grouped convolution",
    factors=lambda _m, left, right: (right, left),
    down=_dense_down,
    up=_conv_up,
    channels=CONVOLUTION.channels,
    base=_convolve,
)
"""A grouped convolution as PEFT adapts it: A is dense and B is grouped, so that there is no delta
of the weight's shape, and nothing to merge."""


# -- other weights in the same module --------------------------------------------------------------


def shadow(module: nn.Module, changes: dict[str, Tensor]) -> Any:
    """Return a module that shares everything with another one but some parameters.

    It is a second object over the same buffers and submodules; the first one is not touched, so
    threads that use it see nothing of this.

    Args:
        module: the module.
        changes: parameters by name, those of submodules with their path.
    """
    cls: Any = type(module)
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = dict(module._modules)
    below: dict[str, dict[str, Tensor]] = {}
    for name, tensor in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = tensor
        else:
            twin.__dict__["_parameters"][head] = tensor
    for name, inner in below.items():
        twin.__dict__["_modules"][name] = shadow(module.get_submodule(name), inner)
    return twin
