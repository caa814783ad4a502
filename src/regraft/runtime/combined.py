"""One adapter of several that are in memory, by the methods of ``regraft combine``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from regraft.adapters.dialects.as_peft import config_of, tensors_of
from regraft.adapters.dialects.form import Kind, LoraModule, Moved, PlainAdapter
from regraft.adapters.model import LoraTarget
from regraft.deltas.methods.form import Factors, Joint, MethodOptions
from regraft.deltas.methods.one_delta import one_delta
from regraft.deltas.methods.registry import Method
from regraft.deltas.ranks.blas_threads import one_thread
from regraft.deltas.ranks.reduction import Matrix
from regraft.errors import MismatchError, Problem, UnsupportedError, UsageError
from regraft.merging.compute.requantize import delta_keys
from regraft.merging.options import combining_options
from regraft.runtime.forward.selection import Named
from regraft.runtime.model.matching import LiveAdapter, adapter_of
from regraft.tensors import nbytes_of

_FILES = "Save the adapters (regraft.save), and combine the folders: regraft.combine"


@dataclass(frozen=True)
class _Part:
    """What one adapter has for a module."""

    owner: LiveAdapter
    target: LoraTarget
    weight: float

    @property
    def scale(self) -> float:
        """What it multiplies B A by."""
        return self.owner.adapter.settings.scale_of(self.target.module)

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of its delta, a kernel's among them."""
        return self.target.b.shape[0], int(np.prod(self.target.a.shape[1:]))

    def factors(self) -> Factors:
        """Return B and A in float64."""
        (out, columns), rank = self.sizes, self.target.a.shape[0]
        a, b = (_values(self.owner, spec.name) for spec in (self.target.a, self.target.b))
        return Factors(b.reshape(out, rank), a.reshape(rank, columns), self.scale, self.weight)


@dataclass(frozen=True)
class Combining:
    """How adapters become one.

    Attributes:
        method: how deltas do.
        options: what the method is told.
        energy: the share of each delta's squared norm to keep; None for all, or ``options.rank``.
    """

    method: Method
    options: MethodOptions
    energy: float | None

    @classmethod
    def of(
        cls, adapters: Named, method: str, rank: int | None, energy: float | None,
        density: float | None, seed: int,
    ) -> Combining:  # fmt: skip
        """Return how adapters that were named become one, checked.

        Raises:
            UsageError: none is named, or options contradict each other.
        """
        found, options = combining_options(
            method, rank=rank, energy=energy, density=density, seed=seed
        )
        if not adapters:
            hint = "Name two or more, such as {'sql': 0.7, 'json': 0.3}"
            raise UsageError("no adapter was named", where="adapters", hint=hint)
        return cls(found, options, energy)

    def made(self, name: str, adapters: Sequence[tuple[LiveAdapter, float]]) -> LiveAdapter:
        """Return one adapter of several, in float32 and with the scale 1.

        Args:
            name: what it is called.
            adapters: with their weights.

        Raises:
            UnsupportedError: something of theirs cannot be combined in memory; lists every module.
            MismatchError: factors of one module have other shapes; lists every one.
        """
        parts: dict[str, list[_Part]] = defaultdict(list)
        for adapter, weight in adapters:
            for target in adapter.adapter.targets:
                parts[target.module].append(_Part(adapter, target, weight))
        problems = [problem for adapter, _ in adapters for problem in _not_combined(adapter)]
        problems += _of_ranks(parts, self.method)
        if problems:
            raise UnsupportedError(problems)
        if problems := list(_unlike(parts)):
            raise MismatchError(problems)
        with one_thread():
            made = [self._module(module, of) for module, of in parts.items()]
        return _live(name, tuple(made), adapters[0][0])

    def _module(self, module: str, of: Sequence[_Part]) -> LoraModule:
        joint, asked = Joint([part.factors() for part in of]), self.options
        keys = delta_keys(asked.seed, module, 0, len(of))
        delta = one_delta(joint, self.method, asked, keys, asked.rank, self.energy)
        highest = self.method.highest_rank(joint.ranks, of[0].sizes)
        rank = min(asked.rank, highest) if asked.rank else delta.needed(self.energy)
        return _laid_out(module, of[0].target, *delta.cut(rank))


def _not_combined(adapter: LiveAdapter) -> Iterator[Problem]:
    described = adapter.adapter
    if described.settings.begins_with_base:
        yield Problem("its base is another one from the start of its training (PiSSA, OLoRA)",
                      repr(adapter.name), hint=_FILES)  # fmt: skip
    replaced = [each.spec.name for each in described.whole if each.origin != "embedding"]
    for name in (*replaced, *(each.spec.name for each in described.token_rows)):
        yield Problem("a tensor that takes the place of the model's is not combined in memory",
                      f"{adapter.name!r}: {name}", hint=_FILES)  # fmt: skip
    for target in described.targets:
        where = f"{adapter.name!r}: {target.module}"
        if target.magnitude is not None:
            yield Problem("DoRA's delta is of no low rank", where,
                          hint="Merge it into the model, and extract an adapter")  # fmt: skip
        if target.b_bias is not None:
            yield Problem("a bias of B (lora_bias) is not combined in memory", where, hint=_FILES)
        stacked = target.a.shape[0] != described.settings.rank_of(target.module)
        if target.depth or stacked or described.settings.parameters_of(target.module):
            yield Problem("a stack of experts is not combined in memory", where, hint=_FILES)


def _of_ranks(parts: Mapping[str, Sequence[_Part]], method: Method) -> Iterator[Problem]:
    """Yield the modules whose ranks differ, for methods that add factors."""
    for module, of in parts.items():
        ranks = {part.target.a.shape[0] for part in of}
        if method.equal_ranks and len(ranks) > 1:
            yield Problem("the method adds factors, which takes one rank", module, "one rank",
                          ", ".join(map(str, sorted(ranks))), "Choose sum or svd")  # fmt: skip


def _unlike(parts: Mapping[str, Sequence[_Part]]) -> Iterator[Problem]:
    for module, of in parts.items():
        first = of[0]
        for part in of[1:]:
            if (part.target.kind, part.sizes) != (first.target.kind, first.sizes):
                yield Problem("factors of one module have other shapes", module,
                              f"{first.sizes} in {first.owner.name!r}",
                              f"{part.sizes} in {part.owner.name!r}")  # fmt: skip


def _laid_out(module: str, target: LoraTarget, b: Matrix, a: Matrix) -> LoraModule:
    """Return factors in the layout that a target's kind of layer has."""
    rank, kernel = a.shape[0], target.a.shape[1:]
    kind: Kind = "embedding" if target.kind == "embedding" else "linear"
    if len(kernel) > 1:
        kind = "convolution"
    stored_b = b.reshape(b.shape[0], rank, *target.b.shape[2:])
    return LoraModule(module, rank, 1.0, _held(a.reshape(rank, *kernel)), _held(stored_b), kind)


def _held(values: Any) -> Moved:
    """Return values in memory as a tensor in float32."""
    bits = np.ascontiguousarray(values, np.float32).view("<u4")
    return Moved("F32", tuple(values.shape), (), lambda: bits)


def _live(name: str, modules: tuple[LoraModule, ...], first: LiveAdapter) -> LiveAdapter:
    settings = first.adapter.settings
    plain = PlainAdapter(
        modules, base=settings.base_model_name_or_path, task_type=settings.task_type
    )
    tensors = {
        key: torch.from_numpy(moved.move().view(np.float32)).reshape(moved.shape)
        for key, moved in tensors_of(plain).items()
        if nbytes_of(moved.dtype, moved.shape)
    }
    config = config_of(plain)
    return LiveAdapter(name, config, adapter_of(name, config, tensors), tensors)


def _values(adapter: LiveAdapter, key: str) -> np.ndarray:
    """Return a tensor's values in float64, in the computer's own memory."""
    found: np.ndarray = adapter.tensors[key].detach().to("cpu", torch.float32).numpy()
    return found.astype(np.float64)
