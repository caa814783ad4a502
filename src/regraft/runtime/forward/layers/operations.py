"""From what adapters do to a model's parameters to what is done as its modules run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regraft.deltas.views import Delta, RowPatch
from regraft.errors import MismatchError, Problem
from regraft.merging.planning.match import Work
from regraft.runtime.forward.layers.computed import READS_ITS_CHILDREN, ComputedWeight, Replacement
from regraft.runtime.forward.layers.kinds import EMBEDDING, LINEAR, Kind, kind_of, runs_otherwise
from regraft.runtime.forward.layers.plain import plain_weight
from regraft.runtime.forward.layers.served import grouped_step, split
from regraft.runtime.forward.layers.steps import (
    Dora,
    LayerFactors,
    LowRank,
    Shift,
    Step,
    TokenLogits,
    TokenRows,
)
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter, Tensors, match_live, weighted
from regraft.runtime.model.parametrized import computing_module, is_computed, way_back

Part = tuple[LiveAdapter, float]
"""An adapter and the weight on its scale."""


@dataclass(eq=False)
class Operations:
    """What a selection of adapters does, by the path of the module.

    Attributes:
        steps: to a module's output.
        replacements: in the place of a module's forward pass.
    """

    steps: dict[str, list[Step]] = field(default_factory=dict)
    replacements: dict[str, Replacement] = field(default_factory=dict)


def operations_of(base: LiveBase, parts: Sequence[Part]) -> Operations:
    """Return what adapters do together, in their order.

    Raises:
        MismatchError: they do not fit the model, or one another; every misfit is listed.
    """
    both = [split(base, weighted(adapter.adapter, weight)) for adapter, weight in parts]
    works = match_live(base, [mergeable for mergeable, _ in both])
    tensors = Tensors([adapter for adapter, _ in parts])
    builder = _Builder(base, tensors)
    for name, work in works.items():
        builder.add(name, work)
    if builder.problems:
        raise MismatchError(builder.problems)
    for (adapter, weight), (_, served) in zip(parts, both, strict=True):
        for path, target in served:
            builder.serve(path, grouped_step(adapter, weight, target))
    return builder.done()


class _Builder:
    """Sorts works into steps on outputs, and weights that have to be others."""

    def __init__(self, base: LiveBase, tensors: Tensors) -> None:
        self._base, self._tensors = base, tensors
        self._result = Operations()
        self.problems: list[Problem] = []

    def done(self) -> Operations:
        """Return the operations; steps of one module stand in the order of its parameters."""
        return self._result

    def add(self, name: str, work: Work) -> None:
        """Add what is done to one parameter."""
        path, module, leaf = self._base.owner(name)
        if self._is_refused(path, module, leaf, work):
            return
        host = self._host(path)
        kind = None if host != path or runs_otherwise(module) else kind_of(module)
        if kind is not None and self._fits_output(kind, leaf, work):
            steps = self._result.steps.setdefault(self._base.canonical(path), [])
            steps += self._steps(kind, module, leaf, name, work)
            return
        if not isinstance(getattr(module, leaf, None), Tensor):
            self.problems.append(
                Problem("this layer's weight cannot be replaced", name, "a plain parameter",
                        type(module).__name__, "Load the base in a format that has one")
            )  # fmt: skip
            return
        self._replace(host, path, module, leaf, name, work)

    def _is_refused(self, path: str, module: nn.Module, leaf: str, work: Work) -> bool:
        """Whether a work is one on a computed weight that cannot be done to the layer's output."""
        owner = computing_module(self._base.modules, path, leaf)
        if owner is None:
            return False
        kind = None if self._host(path) != path else kind_of(module)
        fits = kind is not None and self._fits_output(kind, leaf, work)
        if fits and not any(delta.is_residual for delta in work.deltas):
            return False
        self.problems.append(
            Problem("this weight is computed from other parameters (by a parametrization, "
                    "weight_norm or spectral_norm), so the adapter cannot replace it",
                    f"{path}.{leaf}", "LoRA or DoRA on it, or a plain parameter",
                    type(owner).__name__, way_back(owner, leaf))
        )  # fmt: skip
        return True

    def serve(self, path: str, step: Step) -> None:
        """Add a step that stands for no change of a weight."""
        self._result.steps.setdefault(self._base.canonical(path), []).append(step)

    def _host(self, path: str) -> str:
        """Return the module whose forward pass uses a module's parameters."""
        parent = path.rpartition(".")[0]
        reads = path and isinstance(self._base.modules.get(parent), READS_ITS_CHILDREN)
        return parent if reads else path

    def _replace(
        self, host: str, path: str, module: nn.Module, leaf: str, name: str, work: Work
    ) -> None:
        below = f"{path.removeprefix(host).removeprefix('.')}.{leaf}".removeprefix(".")
        weight: Tensor | ComputedWeight = ComputedWeight(module, leaf, name, work, self._tensors)
        if not (work.deltas or work.patches):
            origin = work.replaced or work.carried
            if origin is not None:
                weight = self._tensors.whole(origin[0], origin[1].name)
        key = self._base.canonical(host)
        self._result.replacements.setdefault(key, Replacement({})).weights[below] = weight

    # -- steps -----------------------------------------------------------------------------------

    def _fits_output(self, kind: Kind, leaf: str, work: Work) -> bool:
        """Whether a work can be done to the layer's output instead of its weights."""
        if work.source_adapter is not None:
            return False
        if leaf == "bias":
            return all(delta.feature == "lora-bias" for delta in work.deltas)
        if leaf != "weight" or (work.patches and kind not in (EMBEDDING, LINEAR)):
            return False
        whole = (0, work.source.shape[0])
        partial = kind is not LINEAR and any(delta.rows != whole for delta in work.deltas)
        norms = any(d.magnitude is not None and d.by_column != kind.by_column for d in work.deltas)
        return not partial and not norms

    def _steps(self, kind: Kind, module: nn.Module, leaf: str, name: str, work: Work) -> list[Step]:
        if leaf == "bias":
            return [Shift(kind, self._vector(delta)) for delta in work.deltas]
        weight = ComputedWeight(module, leaf, name, work, self._tensors)
        steps: list[Step] = []
        for delta in work.deltas:
            self._check_rescaling(module, name, delta)
            low_rank = self._low_rank(kind, module, weight, delta)
            if delta.magnitude is None:
                steps.append(low_rank)
            else:
                steps.append(self._dora(module, weight, delta, low_rank))
        return joined(steps) + [self._rows(kind, patch) for patch in work.patches]

    def _vector(self, delta: Delta) -> Callable[[], Tensor]:
        left = delta.left
        if left is None:
            raise ValueError("a bias has its values in the adapter")
        return lambda: self._tensors.matrix(delta.adapter, left).reshape(-1) * delta.scale

    def _check_rescaling(self, module: nn.Module, name: str, delta: Delta) -> None:
        """Note a delta to be trained on an embedding that rescales rows as they are looked up."""
        if getattr(module, "max_norm", None) is not None and self._tensors.trained[delta.adapter]:
            self.problems.append(
                Problem("LoRA on an embedding with max_norm cannot be trained: its factors would "
                        "be rescaled as they are looked up", name, "an embedding without max_norm",
                        f"max_norm={module.max_norm}", "Train it whole (modules_to_save), or rows "
                        "of it (trainable_token_indices)")
            )  # fmt: skip

    def _low_rank(
        self, kind: Kind, module: nn.Module, weight: ComputedWeight, delta: Delta
    ) -> LowRank:
        device = _device_of(module)

        def make() -> tuple[Tensor, Tensor]:
            left, right = weight.pair(delta, device)
            return kind.factors(module, left, right)

        adapter = self._tensors.adapters[delta.adapter]
        trained = self._tensors.trained[delta.adapter] and not delta.is_residual
        whole = delta.rows == (0, weight.work.source.shape[0]) or kind is not LINEAR
        has_dropout = kind is not EMBEDDING and not delta.is_residual  # PEFT drops no token ids
        return LowRank(
            kind, LayerFactors(make, trained=trained), delta.scale, None if whole else delta.rows,
            adapter.dropout if has_dropout else 0.0,
        )  # fmt: skip

    def _dora(
        self, module: nn.Module, weight: ComputedWeight, delta: Delta, low_rank: LowRank
    ) -> Dora:
        trained = self._tensors.trained[delta.adapter]
        anew = trained or is_computed(module, weight.leaf)
        factor = DoraFactor(module, weight, delta, trained=anew)
        return Dora(low_rank, factor, lambda: plain_weight(module, weight.leaf, weight.name))

    def _rows(self, kind: Kind, patch: RowPatch) -> Step:
        def values() -> Tensor:
            return self._tensors.matrix(patch.adapter, patch.values)

        indices = torch.tensor(patch.indices)
        if kind is EMBEDDING:
            return TokenRows(indices, values)
        return TokenLogits(indices, values)


def _device_of(module: nn.Module) -> torch.device:
    """Return where a module computes."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    found = next(own, None)
    if found is None:
        found = next((t for t in (*module.parameters(), *module.buffers())), None)
    return found.device if found is not None else torch.device("cpu")


class DoraFactor:
    """Gives m / |W + s B A|, one value per output channel; kept where nothing is trained.

    W is the base's own weight, whatever other adapters answer with this one.
    """

    def __init__(
        self, module: nn.Module, weight: ComputedWeight, delta: Delta, *, trained: bool
    ) -> None:
        self._module, self._weight, self._delta = module, weight, delta
        self._kept: Tensor | None = None if trained else self._compute()
        self._seen = self._version()

    def _version(self) -> int:
        """Return a number that changes when torch writes to the weight."""
        found = getattr(self._module, self._weight.leaf, None)
        return found._version if isinstance(found, Tensor) and not found.is_inference() else 0

    def __call__(self, device: torch.device) -> Tensor:
        """Return the factor on a device."""
        if self._kept is None:
            return self._compute().to(device)
        if not torch.compiler.is_compiling() and self._version() != self._seen:
            self._kept, self._seen = self._compute(), self._version()
        if self._kept.device != device:
            self._kept = self._kept.to(device)
        return self._kept

    def _compute(self) -> Tensor:
        return self._weight.dora_factor(self._delta, self._module)


def joined(steps: list[Step]) -> list[Step]:
    """Return steps with neighbouring low-rank ones made one, where they are fixed and alike."""
    result: list[Step] = []
    for step in steps:
        last = result[-1] if result else None
        if isinstance(last, LowRank) and isinstance(step, LowRank) and _can_join(last, step):
            result[-1] = _join(last, step)
        else:
            result.append(step)
    return result


def _can_join(first: LowRank, second: LowRank) -> bool:
    pairs = first.factors.fixed, second.factors.fixed
    if pairs[0] is None or pairs[1] is None or first.rows or second.rows:
        return False
    if first.dropout or second.dropout or not first.kind.in_place:
        return False
    same: bool = pairs[0][0].dtype == pairs[1][0].dtype
    return same


def _join(first: LowRank, second: LowRank) -> LowRank:
    if first.factors.fixed is None or second.factors.fixed is None:
        raise ValueError("only factors that do not change can be joined")
    (a1, b1), (a2, b2) = first.factors.fixed, second.factors.fixed
    pair = torch.cat((a1, a2)), torch.cat((b1 * first.scale, b2 * second.scale), dim=1)
    return LowRank(first.kind, LayerFactors(lambda: pair, trained=False), 1.0)
