"""Bases and adapters of every shape for methods on elements, and the methods written out plainly.

Nothing here is taken from the methods themselves: each is whole matrices, numpy, and a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from deltas.reference import product
from merging import toys
from merging.toys import PREFIX, draw

Floats = np.ndarray
EXPERTS = 3
TARGETS = ["a.linear", "d.table", "h.conv", "l.turned"]
SHAPES: Mapping[str, tuple[int, ...]] = {
    "a.linear.weight": (37, 53),
    "b.copied": (40,),
    "d.table.weight": (61, 24),
    "f.experts": (EXPERTS, 14, 33),
    "h.conv.weight": (9, 4, 3, 5),
    "l.turned.weight": (45, 60),
}


def base_tensors(dtype: Any) -> dict[str, Floats]:
    """Return a base with a matrix of every layout; ``l.turned`` is stored (in, out)."""
    return {
        name: draw(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())
    }


def adapter_tensors(rank: int, seed: int) -> dict[str, Floats]:
    """Return an adapter for all of :func:`base_tensors` but what is copied."""
    experts = {
        f"{PREFIX}f.lora_A.weight": draw(EXPERTS * rank, 33, seed=seed),
        f"{PREFIX}f.lora_B.weight": draw(14, rank * EXPERTS, seed=seed + 1),
    }
    convolution = {
        f"{PREFIX}h.conv.lora_A.weight": draw(rank, 4, 3, 5, seed=seed),
        f"{PREFIX}h.conv.lora_B.weight": draw(9, rank, 1, 1, seed=seed + 1),
    }
    table = toys.embedding("d.table", 61, 24, rank, seed)
    turned = toys.lora("l.turned", 60, 45, rank, seed)
    return {**toys.lora("a.linear", 37, 53, rank, seed), **table, **experts, **convolution,
            **turned}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """An adapter on disk, and what it consists of."""

    folder: Path
    tensors: Mapping[str, Floats]
    rank: int
    scale: float


def write_adapter(folder: Path, rank: int, seed: int, alpha: int, **config: Any) -> Given:
    """Write an adapter for all of the base's matrices."""
    tensors = adapter_tensors(rank, seed)
    chosen = {"r": rank, "lora_alpha": alpha, "target_modules": TARGETS}
    chosen |= {"target_parameters": ["f.experts"], **config}
    return Given(toys.write_adapter(folder, tensors, **chosen), tensors, rank, alpha / rank)


def deltas(given: Given) -> dict[str, Floats]:
    """Return the deltas of an adapter with its own scale, each (out, in), by the module's name."""
    scale = np.float32(given.scale)

    def pair(module: str, side: str = "lora_{}.weight") -> tuple[Floats, Floats]:
        a, b = (given.tensors[f"{PREFIX}{module}.{side.format(n)}"] for n in "AB")
        return b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)

    found = {f"{m}[0]": product(*pair(m)) for m in ("a.linear", "h.conv", "l.turned")}
    found["d.table[0]"] = product(*pair("d.table", "lora_embedding_{}"))
    b, a = pair("f")
    stack = b.reshape(14, given.rank, EXPERTS)
    for e in range(EXPERTS):
        rows = slice(given.rank * e, given.rank * (e + 1))
        found[f"f.experts[{e}]"] = product(np.ascontiguousarray(stack[:, :, e]), a[rows])
    return {name: scale * delta for name, delta in found.items()}


def as_stored(name: str, of_module: Mapping[str, Floats]) -> Floats:
    """Return a combined delta in the shape of the base's tensor."""
    if name == "f.experts":
        return np.stack([of_module[f"f.experts[{e}]"] for e in range(EXPERTS)])
    delta = of_module[f"{name.removesuffix('.weight')}[0]"]
    turned = delta.T if name in ("d.table.weight", "l.turned.weight") else delta
    return turned.reshape(SHAPES[name])


# -- the methods, written out ----------------------------------------------------------------------


def drawn(seed: int, name: str, number: int, shape: tuple[int, int]) -> Floats:
    """Return SplitMix64's 24 upper bits as shares, one for each element, row by row."""
    key = int.from_bytes(blake3(f"{seed}\0{name} {number}".encode()).digest()[:8], "little")
    mask, found = 2**64 - 1, []
    for at in range(1, shape[0] * shape[1] + 1):
        z = (key + at * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append((z ^ (z >> 31)) >> 40)
    return (np.array(found, np.float64) / 2**24).astype(np.float32).reshape(shape)


def kept_largest(delta: Floats, density: float, top: float = 0.0) -> Floats:
    """Return a delta with its largest elements alone, less those at the top."""
    size = delta.size
    order = np.sort(np.abs(delta), axis=None)
    if top:
        first = max(0, size - int(density * size) - int(top * size))
        last = min(size, first + max(1, int(density * size))) - 1
    else:
        first, last = size - min(size, max(1, int(density * size))), size - 1
    inside = (np.abs(delta) >= order[first]) & (np.abs(delta) <= order[last])
    return np.where(inside, delta, np.float32(0))


def kept_at_random(delta: Floats, density: float, seed: int, name: str, number: int) -> Floats:
    """Return a delta with random elements alone, scaled up."""
    share = np.float32(density)
    stays = drawn(seed, name, number, delta.shape) < share
    return np.where(stays, delta / share, np.float32(0))


def kept_by_rank(delta: Floats, density: float, seed: int, name: str, number: int) -> Floats:
    """Return a delta with random elements alone, those that are large in their row more likely."""
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1, kind="stable"), axis=1, kind="stable")
    shares = ranks.astype(np.float32) / np.float32(delta.shape[1] - 1)
    spread = min(0.1, density / 2, (1 - density) / 2)
    chance = np.float32(density - spread) + shares * np.float32(2 * spread)
    stays = drawn(seed, name, number, delta.shape) < chance
    return np.where(stays, delta / chance, np.float32(0))


def summed(parts: Sequence[Floats]) -> Floats:
    """Return the sum, in order, float32."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def majority(parts: Sequence[Floats]) -> list[Floats]:
    """Return of each part where it has the sign of the sum."""
    sign = np.where(summed(parts) >= 0, 1, -1)
    return [np.sign(part) == sign for part in parts]


@dataclass(frozen=True)
class Told:
    """What a method is told, and of which module."""

    name: str
    density: float
    seed: int


Combine = Callable[[Sequence[Floats], Sequence[float], Told], Floats]
Parts = Sequence[Floats]


def _pruned(top: float) -> Combine:
    def combine(parts: Parts, weights: Sequence[float], told: Told) -> Floats:
        kept = [kept_largest(part, told.density, top) for part in parts]
        return summed(_times(kept, weights))

    return combine


def _times(parts: Parts, weights: Sequence[float]) -> list[Floats]:
    return [part * np.float32(weight) for part, weight in zip(parts, weights, strict=True)]


def _where(agree: Parts, parts: Sequence[Any]) -> list[Floats]:
    return [np.where(a, part, np.float32(0)) for a, part in zip(agree, parts, strict=True)]


def _ties(parts: Parts, weights: Sequence[float], told: Told) -> Floats:
    kept = _times([kept_largest(part, told.density) for part in parts], weights)
    agree = majority(kept)
    divisor = summed(_where(agree, [np.float32(weight) for weight in weights]))
    return summed(_where(agree, kept)) / np.where(divisor == 0, np.float32(1), divisor)


def _random(keep: Callable[..., Floats], *, elects: bool) -> Combine:
    def combine(parts: Parts, weights: Sequence[float], told: Told) -> Floats:
        kept = [keep(p, told.density, told.seed, told.name, n) for n, p in enumerate(parts)]
        kept = _times(kept, weights)
        return summed(_where(majority(kept), kept) if elects else kept)

    return combine


METHODS: Mapping[str, Combine] = {
    "ties": _ties,
    "dare": _random(kept_at_random, elects=False),
    "dare_ties": _random(kept_at_random, elects=True),
    "della": _random(kept_by_rank, elects=True),
    "breadcrumbs": _pruned(0.01),
    "magnitude_prune": _pruned(0.0),
}


def combined(
    method: str, adapters: Sequence[Given], weights: Sequence[float], density: float, seed: int
) -> dict[str, Floats]:
    """Return what a method makes of adapters, by module."""
    of_each = [deltas(given) for given in adapters]
    return {
        name: METHODS[method]([each[name] for each in of_each], weights, Told(name, density, seed))
        for name in of_each[0]
    }
