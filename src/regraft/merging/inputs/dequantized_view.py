"""A quantized base as the merge sees it: plain weights, which are decoded when they are read.

The planner knows names, shapes and dtypes of the model's own weights. A *logical* checkpoint gives
it these: each quantized weight is one tensor without bytes of its own (a virtual one). What the
files hold stays at hand in :class:`Quantization`, and
:mod:`regraft.merging.inputs.dequantize` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from regraft.formats.checkpoint import Checkpoint, Shard
from regraft.formats.files.reading import FilePool
from regraft.numerics.arrays import Bytes
from regraft.quant.registry import check_contents, find_weights
from regraft.quant.weight import QuantizedWeight, Read, Stored
from regraft.tensors import BY_CONFIG_NAME, VIRTUAL, TensorSpec, nbytes_of

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Where a config says how the model is quantized."""


GGUF = "gguf"
"""The method of a base in GGUF."""

BAND_BYTES = 32 * 2**20
"""The most that is turned of a single expert at a time."""


@dataclass(frozen=True)
class Stack:
    """A parameter of the model that is stored in several tensors, one for each expert.

    Attributes:
        spec: the parameter, a virtual tensor: (experts, ...), or of one member that member's shape.
        members: what it is made of, in order, as plain values.
        transposed: whether each is (out, in) where the parameter has (in, out).
    """

    spec: TensorSpec
    members: tuple[TensorSpec, ...]
    transposed: bool

    @property
    def band_rows(self) -> int:
        """How many rows of an expert are turned at a time; all of them, but of large ones."""
        _, rows, width = self.spec.shape
        return max(min(rows, BAND_BYTES // max(width * self.spec.itemsize, 1)), 1)

    @property
    def band_bytes(self) -> int:
        """What these rows take."""
        return self.band_rows * self.spec.shape[2] * self.spec.itemsize


def room_of(stacks: Iterable[Stack]) -> int:
    """Return the memory that turned experts take: those of two bands, where the work passes on."""
    return 2 * max((stack.band_bytes for stack in stacks if stack.transposed), default=0)


@dataclass(frozen=True)
class Quantization:
    """How a base is quantized.

    Attributes:
        method: the config's name for it, such as ``bitsandbytes``.
        stored: the base as it is on disk.
        weights: its quantized weights, by their logical name.
        owners: the logical name that each of their stored tensors belongs to.
        skipped: stored tensors that have no meaning for plain weights.
        warnings: what the user should know of the result.
        stacks: parameters that its plain weights are put together to, by their name; see
            :func:`regraft.merging.inputs.published.published`.
    """

    method: str
    stored: Checkpoint
    weights: Mapping[str, QuantizedWeight]
    owners: Mapping[str, str]
    skipped: frozenset[str]
    warnings: tuple[str, ...] = ()
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    @property
    def transposed(self) -> frozenset[str]:
        """Logical names of the weights whose codes lie (in, out)."""
        return frozenset(n for n, w in self.weights.items() if w.codec.stores_transposed)

    def stored_of(self, name: str) -> tuple[TensorSpec, ...]:
        """Return the stored tensors that a virtual one is made of."""
        if name in self.stacks:
            members = self.stacks[name].members
            return tuple(spec for each in members for spec in self._stored(each))
        return tuple(self.weights[name].parts.values())

    def _stored(self, member: TensorSpec) -> tuple[TensorSpec, ...]:
        return self.stored_of(member.name) if member.is_virtual else (member,)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats of its weights, each once."""
        return tuple(dict.fromkeys(weight.codec.name for weight in self.weights.values()))


def see_through(stored: Checkpoint) -> tuple[Checkpoint, Quantization | None]:
    """Return a base as plain weights, and how it is quantized; None if it is not.

    Of a base that is known by its headers alone (on the Hub), nothing is read.

    Raises:
        UnsupportedError: it is quantized in a way that is not known.
        FormatError: parts of its weights are missing or do not fit; lists all of them.
    """
    at_hand = all(shard.path.is_file() for shard in stored.shards)
    with FilePool() as files:
        seen = _seen(stored, _reader(files) if at_hand else None)
        method, found = find_weights(seen)
    if method is None:
        return stored, None
    weights = {weight.name: weight for weight in found.weights}
    owners = {spec.name: w.name for w in found.weights for spec in w.parts.values()}
    quantization = Quantization(method, stored, weights, owners, frozenset(found.skipped))
    return logical_checkpoint(quantization), quantization


def _seen(stored: Checkpoint, read: Read | None) -> Stored:
    config = stored.config or {}
    said: Mapping[str, Any] = next(
        (config[key] for key in CONFIG_KEYS if isinstance(config.get(key), dict)), {}
    )
    named = config.get("dtype", config.get("torch_dtype"))
    dtype = BY_CONFIG_NAME.get(str(named).removeprefix("torch."))
    return Stored(stored.tensors, said, dtype.name if dtype else None, read, stored.source)


def _reader(files: FilePool) -> Read:
    def read(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        files.read_into(spec, offset, buffer.data)

    return read


def check_scales(quantization: Quantization) -> None:
    """Refuse a base whose scales are no numbers, before any work.

    Raises:
        FormatError: some are; lists them.
    """
    with FilePool() as files:
        seen = _seen(quantization.stored, _reader(files))
        check_contents(quantization.weights.values(), seen)


def as_stored(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight seen the way its codes lie."""
    if not weight.codec.stores_transposed or weight.as_stored:
        return weight
    turned = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    return replace(weight, shape=turned, as_stored=True)


def turned(logical: Checkpoint, quantization: Quantization) -> Checkpoint:
    """Return the logical checkpoint with each weight the way its codes lie, to be written back."""
    specs = dict(logical.tensors)
    for name, weight in quantization.weights.items():
        specs[name] = replace(specs[name], shape=as_stored(weight).shape)
    return replace(logical, tensors=specs)


def logical_checkpoint(quantization: Quantization) -> Checkpoint:
    """Return the checkpoint that dequantizing would give, in the order of the stored one."""
    stored, weights = quantization.stored, quantization.weights
    shards, tensors = [], dict[str, TensorSpec]()
    codes = {weight.codes.name: weight for weight in weights.values()}
    for shard in stored.shards:
        specs = []
        for name in shard.tensors:
            if name in codes:
                specs.append(virtual(codes[name]))
            elif name not in quantization.owners and name not in quantization.skipped:
                specs.append(stored.tensors[name])
        tensors |= {spec.name: spec for spec in specs}
        shards.append(replace(shard, tensors=tuple(spec.name for spec in specs)))
    return replace(stored, shards=_filled(shards), tensors=tensors)


def _filled(shards: list[Shard]) -> tuple[Shard, ...]:
    """Leave out files that hold nothing but scales."""
    return tuple(shard for shard in shards if shard.tensors)


def virtual(weight: QuantizedWeight) -> TensorSpec:
    """Return a quantized weight as a tensor of plain values."""
    nbytes = nbytes_of(weight.dtype, weight.shape)
    return TensorSpec(weight.name, weight.dtype, weight.shape, weight.codes.path, VIRTUAL, nbytes)


def removed(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a config that say how the model is quantized."""
    return tuple(key for key in CONFIG_KEYS if key in config)
