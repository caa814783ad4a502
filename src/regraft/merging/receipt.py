"""The receipt of a merge: what was read, what was done to each tensor, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

RECEIPT_FORMAT = 1
"""Version of the JSON layout of ``regraft/receipt.json``."""

ARITHMETIC_VERSION = 1
"""Version of the arithmetic contract (docs/arithmetic.md) the bytes were made by."""

QUIET_SHARE = 1e-3
"""Below this share of changed elements a merge counts as having changed (nearly) nothing."""

Action = Literal["copy", "convert", "merge", "replace", "add"]
"""What was done to a tensor.

``copy`` bytes as they were; ``convert`` only the dtype changed; ``merge`` a delta was added;
``replace`` the adapter's own tensor took its place; ``add`` the base had no such tensor.
"""


@dataclass(frozen=True)
class InputRecord:
    """One input of a merge.

    Attributes:
        source: as the user named it (a path or ``org/name@revision``).
        revision: the Hub commit, when it came from the Hub.
        weight: the factor on the adapter's scale; None for a base.
        tensors: blake3 (hex) of every tensor read from it, by the name in its file.
    """

    source: str
    revision: str | None
    weight: float | None
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class TensorRecord:
    """What was done for one tensor of the output.

    Attributes:
        name: name in the output.
        file: the output file that holds it.
        action: see :data:`Action`.
        dtype: safetensors dtype in the output.
        shape: dimensions in the output.
        source: name of the tensor it was made from.
        source_dtype: safetensors dtype it was read as.
        source_blake3: blake3 (hex) of the bytes read.
        blake3: blake3 (hex) of the bytes written.
        features: what was applied, such as ``("lora",)`` or ``("dora", "token-rows")``.
        scales: the float32 scale of each delta, in the order applied.
        adapters: the adapter (0-based) each scale belongs to.
        weight_norm: Frobenius norm of the source; None if it holds NaN or infinity.
        delta_norm: Frobenius norm of (merged before rounding - source); None likewise.
        changed: elements whose stored value differs from the source's.
    """

    name: str
    file: str
    action: Action
    dtype: str
    shape: tuple[int, ...]
    source: str
    source_dtype: str
    source_blake3: str
    blake3: str
    features: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    adapters: tuple[int, ...] = ()
    weight_norm: float | None = None
    delta_norm: float | None = None
    changed: int = 0


@dataclass(frozen=True)
class Totals:
    """Sums over a merge.

    Attributes:
        tensors: tensors written.
        merged: tensors that got a delta.
        copied: tensors that stayed byte for byte.
        converted: tensors of which only the dtype changed.
        replaced: tensors that the adapter replaced.
        added: tensors the base did not have.
        parameters: elements written.
        bytes_read: bytes of tensors read, base and adapters.
        bytes_written: bytes of tensors written.
        relative_delta: Frobenius norm of all deltas over that of the weights they were added to.
        changed_share: share of the elements of merged and replaced tensors that changed.
        seconds: wall time, from the call to the renamed folder.
        peak_memory: peak resident memory of the process in bytes, as the system reports it.
        threads: worker threads used.
    """

    tensors: int
    merged: int
    copied: int
    converted: int
    replaced: int
    added: int
    parameters: int
    bytes_read: int
    bytes_written: int
    relative_delta: float
    changed_share: float
    seconds: float
    peak_memory: int
    threads: int


@dataclass(frozen=True)
class Receipt:
    """Everything a merge did; written to ``OUT/regraft/receipt.json``.

    Attributes:
        regraft: version of regraft that made it.
        created: UTC time, ISO 8601.
        command: the command line, or the Python call, that made it.
        output: the folder.
        base: the base checkpoint.
        adapters: the adapters, in the order they were added.
        options: dtype, shard_size, and the other choices that decide the bytes.
        tensors: one record per tensor, in file order.
        totals: the sums.
        warnings: what the user should know, one sentence each.
    """

    regraft: str
    created: str
    command: str
    output: str
    base: InputRecord
    adapters: tuple[InputRecord, ...]
    options: Mapping[str, Any]
    tensors: tuple[TensorRecord, ...]
    totals: Totals
    warnings: tuple[str, ...] = ()
    receipt: int = RECEIPT_FORMAT
    arithmetic: int = ARITHMETIC_VERSION

    @property
    def quiet(self) -> bool:
        """Whether the adapters changed (nearly) nothing."""
        return self.totals.added == 0 and self.totals.changed_share < QUIET_SHARE

    @property
    def quiet_warning(self) -> str:
        """What to say, loudly, of a merge that changed (nearly) nothing."""
        totals = self.totals
        return (
            f"THE MERGED MODEL IS (NEARLY) THE BASE: {totals.changed_share:.3%} of the adapted "
            f"elements changed, |delta|/|W| is {totals.relative_delta:.3%}. Likely causes: the "
            "adapter was saved before training (lora_B is still zero); alpha or the weight is "
            "tiny; or the delta is smaller than the dtype's step, which dtype float32 would keep"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as JSON-ready objects."""
        few = asdict(replace(self, tensors=()))
        return few | {"tensors": [dict(vars(record)) for record in self.tensors]}
