"""One adapter of several that are in memory, by the methods of ``regraft combine``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from regraft.adapters.dialects.as_peft import config_of, tensors_of
from regraft.adapters.dialects.form import LoraModule, Moved, PlainAdapter
from regraft.adapters.model import LoraTarget
from regraft.deltas.methods.form import Factors, Joint, MethodOptions
from regraft.deltas.methods.one_delta import one_delta
from regraft.deltas.methods.registry import Method
from regraft.deltas.ranks.blas_threads import one_thread
from regraft.errors import MismatchError, Problem, UnsupportedError
from regraft.merging.compute.requantize import delta_keys
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


def combined(
    name: str, adapters: Sequence[tuple[LiveAdapter, float]], method: Method,
    options: MethodOptions, energy: float | None,
) -> LiveAdapter:  # fmt: skip
    """Return one adapter of several, in float32 and with the scale 1.

    Args:
        name: what it is called.
        adapters: with their weights.
        method: how deltas become one.
        options: what the method is told.
        energy: the share of each delta's squared norm to keep; None for all, or ``options.rank``.

    Raises:
        UnsupportedError: something of theirs cannot be combined in memory; lists every module.
        MismatchError: factors of one module have other shapes; lists every one.
    """
    parts: dict[str, list[_Part]] = defaultdict(list)
    for adapter, weight in adapters:
        for target in adapter.adapter.targets:
            parts[target.module].append(_Part(adapter, target, weight))
    problems = [problem for adapter, _ in adapters for problem in _not_combined(adapter)]
    problems += _of_ranks(parts, method)
    if problems:
        raise UnsupportedError(problems)
    if problems := list(_unlike(parts)):
        raise MismatchError(problems)
    with one_thread():
        modules = tuple(
            _module(module, of, method, options, energy) for module, of in parts.items()
        )
    return _live(name, modules, adapters[0][0])


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


def _module(
    module: str, of: Sequence[_Part], method: Method, options: MethodOptions, energy: float | None
) -> LoraModule:
    joint = Joint([part.factors() for part in of])
    keys = delta_keys(options.seed, module, 0, len(of))
    delta = one_delta(joint, method, options, keys, options.rank, energy)
    highest = method.highest_rank(joint.ranks, of[0].sizes)
    rank = min(options.rank, highest) if options.rank else delta.needed(energy)
    b, a = delta.cut(rank)
    target, rank = of[0].target, a.shape[0]
    kernel = target.a.shape[1:]
    kind = "embedding" if target.kind == "embedding" else "linear"
    if len(kernel) > 1:
        kind = "convolution"
    return LoraModule(
        module, rank, 1.0, _held(a.reshape(rank, *kernel)),
        _held(b.reshape(b.shape[0], rank, *target.b.shape[2:])), kind,  # type: ignore[arg-type]
    )  # fmt: skip


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
