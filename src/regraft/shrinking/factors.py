"""Factors in memory: read, cut to a lower rank, rounded, and held against what they were."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.deltas.ranks.reduction import (
    Matrix,
    Vector,
    decompose,
    difference_norm,
    kept_share,
    product_norm,
    singular_values,
    truncated,
)
from regraft.deltas.rounding import Bytes, decode, encode
from regraft.formats.files.reading import FilePool
from regraft.merging.planning.placement import FactorSizes
from regraft.shrinking.forms import Form
from regraft.shrinking.report import ShrunkModule
from regraft.shrinking.targets import Pair
from regraft.tensors import TensorSpec


@dataclass(frozen=True)
class Stored:
    """A pair's factors as they are stored.

    Attributes:
        a: bytes of A.
        b: bytes of B.
        bias: bytes of B's bias, if it has one.
    """

    a: Bytes
    b: Bytes
    bias: Bytes | None = None


def read_stored(files: FilePool, pair: Pair) -> Stored:
    """Read a pair's factors.

    Raises:
        FormatError, InputError, AccessError: they cannot be read.
    """
    bias = pair.target.b_bias
    return Stored(
        _read(files, pair.target.a),
        _read(files, pair.target.b),
        _read(files, bias) if bias is not None else None,
    )


def _read(files: FilePool, spec: TensorSpec) -> Bytes:
    raw = np.empty(spec.nbytes, np.uint8)
    files.read_into(spec, 0, raw.data)
    return raw


def products(
    pair: Pair, stored: Stored, rank: int, dtype: tuple[str, str]
) -> Iterator[tuple[Matrix, Matrix]]:
    """Yield (B, A) of each expert, (out, r) and (r, in), in float64; of other layers one pair.

    A stack has A as (experts * r, in), expert by expert, and B as (out, r * experts), the expert
    fastest (PEFT's ``ParamWrapper.get_delta_weight``), or slowest where the config says so.

    Args:
        pair: whose factors they are.
        stored: their bytes.
        rank: their rank.
        dtype: what A and B are stored in.
    """
    sizes = pair.sizes
    a = decode(stored.a, dtype[0]).reshape(sizes.experts, rank, sizes.inputs)
    b = by_rank(decode(stored.b, dtype[1]), sizes, rank)
    for expert in range(sizes.experts):
        yield b[:, :, expert].astype(np.float64), a[expert].astype(np.float64)


def by_rank(b: Any, sizes: FactorSizes, rank: int) -> Any:
    """Return a stack's B as (out, r, experts), a view, however the adapter packs it."""
    if sizes.by_expert:
        return b.reshape(sizes.out, sizes.experts, rank).swapaxes(1, 2)
    return b.reshape(sizes.out, rank, sizes.experts)


def own_products(pair: Pair, stored: Stored) -> Iterator[tuple[Matrix, Matrix]]:
    """Yield (B, A) of each expert as the adapter has them."""
    dtypes = pair.target.a.dtype, pair.target.b.dtype
    return products(pair, stored, pair.rank, dtypes)


def squared_values(pair: Pair, stored: Stored) -> Vector:
    """Return the squared singular values of B A, summed over the experts, the largest first."""
    total: Vector = sum(
        (singular_values(b, a) ** 2 for b, a in own_products(pair, stored)),
        start=np.zeros(min(pair.sizes.out, pair.rank, pair.sizes.inputs)),
    )
    return total


def reduced(pair: Pair, stored: Stored, form: Form, dtype: str) -> Stored:
    """Return a pair's factors in another form, as they will be stored.

    Args:
        pair: whose factors they are.
        stored: their bytes.
        form: what they are to become. At the pair's own rank the values stay, but for the scale
            that goes into B, and for their rounding.
        dtype: the dtype to store them in.
    """
    with np.errstate(over="ignore"):  # it is counted by whoever asked
        bias = _reduced_bias(pair, stored, form, dtype)
        if form.is_that_of(pair):
            a, b = decode(stored.a, pair.target.a.dtype), decode(stored.b, pair.target.b.dtype)
            return Stored(encode(a, dtype), encode(b, dtype), bias)
        sizes = pair.sizes
        new_a = np.zeros((sizes.experts, form.rank, sizes.inputs), np.float32)
        new_b = np.zeros(sizes.out * form.rank * sizes.experts, np.float32)
        columns = by_rank(new_b, sizes, form.rank)
        for expert, (b64, a64) in enumerate(own_products(pair, stored)):
            if form.kept < pair.rank:
                b64, a64 = truncated(decompose(b64, a64), form.kept)
            columns[:, : form.kept, expert] = b64 * _factor(form)
            new_a[expert, : form.kept] = a64
        return Stored(encode(new_a, dtype), encode(new_b, dtype), bias)


def _reduced_bias(pair: Pair, stored: Stored, form: Form, dtype: str) -> Bytes | None:
    """Return B's bias as it will be stored: the scale multiplies it as it does B A."""
    if pair.target.b_bias is None or stored.bias is None:
        return None
    values = decode(stored.bias, pair.target.b_bias.dtype)
    if form.folded is not None:
        values = (values.astype(np.float64) * form.folded).astype(np.float32)
    return encode(values, dtype)


def _factor(form: Form) -> float:
    return 1.0 if form.folded is None else form.folded


def shapes(pair: Pair, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B at another rank, in the adapter's layout."""
    a, b = pair.target.a.shape, pair.target.b.shape
    experts = pair.sizes.experts
    return (rank * experts, *a[1:]), (b[0], rank * experts, *b[2:])


def measured(pair: Pair, stored: Stored, new: Stored, form: Form, dtype: str) -> ShrunkModule:
    """Return how far the delta of a pair's new factors is from its own."""
    norms, errors = [], []
    after = products(pair, new, form.rank, (dtype, dtype))
    before, scale = (pair.scale, 1.0) if form.folded is not None else (1.0, abs(pair.scale))
    for (b, a), (new_b, new_a) in zip(own_products(pair, stored), after, strict=True):
        b = b * before
        norms.append(product_norm(b, a))
        same = form.rank == pair.rank and np.array_equal(b, new_b) and np.array_equal(a, new_a)
        errors.append(0.0 if same else difference_norm(b, a, new_b, new_a))
    kept = 1.0 if form.kept == pair.rank else kept_share(squared_values(pair, stored), form.kept)
    return ShrunkModule(
        name=pair.name,
        layer=pair.layer,
        rank_before=pair.rank,
        rank_after=form.rank,
        kept=kept,
        delta_norm=scale * math.hypot(*norms),
        error_norm=scale * math.hypot(*errors),
    )
