"""The report of ``diff``: tensors on one side only, and how far the others differ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["checkpoint", "adapter"]
Change = Literal["added", "removed", "changed"]


@dataclass(frozen=True)
class DiffSide:
    """One of the two inputs of a comparison.

    Attributes:
        source: what the caller called it.
        revision: the Hub's commit, if it came from there.
        files: number of files that hold tensors.
        tensors: number of tensors.
        bytes: bytes of all tensors.
        single_file: whether a lone weights file was named rather than a folder.
    """

    source: str
    revision: str | None
    files: int
    tensors: int
    bytes: int
    single_file: bool


@dataclass(frozen=True)
class LoneTensor:
    """A tensor that only one side has.

    Attributes:
        name: its name in the file.
        dtype: a key of :data:`regraft.tensors.DTYPES`.
        shape: its dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorChange:
    """A tensor that both sides have, and that differs in bytes, dtype or shape.

    The norms, ``largest`` and ``ulps`` are over the elements that are finite on both sides.

    Attributes:
        name: its name in the files.
        dtypes: its dtype in X and in Y.
        shapes: its shape in X and in Y.
        changed: elements that differ; None where shapes or dtypes do not allow to say.
        not_finite: of these, the ones that are NaN or infinite on either side.
        weight_norm: Frobenius norm of X; None where values were not compared or are too large.
        delta_norm: Frobenius norm of Y - X; likewise.
        largest: largest absolute difference; likewise.
        ulps: largest distance in units in the last place; None unless both sides are float32,
            both bfloat16 or both float16.
    """

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    changed: int | None = None
    not_finite: int = 0
    weight_norm: float | None = None
    delta_norm: float | None = None
    largest: float | None = None
    ulps: int | None = None

    @property
    def relative(self) -> float | None:
        """Y - X relative to X; infinite where X is all zero, None without the norms."""
        return _ratio(self.delta_norm, self.weight_norm)

    @property
    def elements(self) -> int:
        """Number of elements in X."""
        return math.prod(self.shapes[0])

    def to_json(self) -> dict[str, Any]:
        """Return the change as JSON-ready objects."""
        return asdict(self) | {"relative": finite(self.relative)}


@dataclass(frozen=True)
class DeltaChange:
    """An adapted module (or parameter) whose delta, s B A, differs between two adapters.

    Norms are Frobenius norms, over all experts of a stack. Of a side that does not adapt the
    module the fields are None, and its norm is 0.

    Attributes:
        name: the module's name in X; in Y, if X does not adapt it.
        layers: in X and in Y ``"linear"``, ``"convolution"``, ``"embedding"`` or ``"experts"``.
        ranks: r in X and in Y.
        scales: s, as the config has it for the module.
        dtypes: of the factors; ``"F32/BF16"`` where those of A and B differ.
        sizes: experts, outputs and inputs.
        norms: norm of the delta; None where it was not measured or is not finite.
        delta_norm: norm of Y's delta less X's; likewise.
        cosine: of the angle between the two deltas, 1 where they differ by a factor alone; None
            where one is zero, or as above.
    """

    name: str
    layers: tuple[str | None, str | None]
    ranks: tuple[int | None, int | None]
    scales: tuple[float | None, float | None]
    dtypes: tuple[str | None, str | None]
    sizes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    norms: tuple[float | None, float | None] = (None, None)
    delta_norm: float | None = None
    cosine: float | None = None

    @property
    def relative(self) -> float | None:
        """Y - X relative to X; infinite where X is zero, None without the norms."""
        return _ratio(self.delta_norm, self.norms[0])

    def to_json(self) -> dict[str, Any]:
        """Return the change as JSON-ready objects."""
        return asdict(self) | {"relative": finite(self.relative)}


@dataclass(frozen=True)
class ConfigChange:
    """A key of the config that differs.

    Attributes:
        key: the path to it, joined by dots.
        change: ``"added"`` (only in Y), ``"removed"`` (only in X) or ``"changed"``.
        x: the value in X; None also where there is none.
        y: the value in Y; likewise.
    """

    key: str
    change: Change
    x: Any
    y: Any


@dataclass(frozen=True)
class FileChange:
    """A file beside the weights, such as the tokenizer's, that differs.

    Attributes:
        name: its name in the folder.
        change: ``"added"`` (only in Y), ``"removed"`` (only in X) or ``"changed"``.
    """

    name: str
    change: Change


@dataclass(frozen=True)
class DiffReport:
    """The answer of :func:`diff`.

    Attributes:
        kind: what was compared: ``"checkpoint"`` or ``"adapter"``.
        x: the first input.
        y: the second input.
        added: tensors that only Y has.
        removed: tensors that only X has.
        changed: tensors that differ, in the order of X's files.
        unchanged: number of tensors with the same dtype, shape and bytes.
        config: keys that differ in ``config.json``, or in ``adapter_config.json``.
        files: other files that differ, which does not make the inputs different.
        same_layout: whether the tensors are divided among the files in the same way.
        deltas: of adapters, the modules whose deltas differ, those farthest apart first. Their
            factors are then in none of the lists of tensors.
        same_deltas: number of modules whose deltas are the same.
        notes: sentences on how adapters were compared.
    """

    kind: Kind
    x: DiffSide
    y: DiffSide
    added: tuple[LoneTensor, ...]
    removed: tuple[LoneTensor, ...]
    changed: tuple[TensorChange, ...]
    unchanged: int
    config: tuple[ConfigChange, ...]
    files: tuple[FileChange, ...]
    same_layout: bool
    deltas: tuple[DeltaChange, ...] = ()
    same_deltas: int = 0
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether deltas, tensors and config are the same."""
        return not (self.added or self.removed or self.changed or self.deltas or self.config)

    @property
    def relative_delta(self) -> float | None:
        """The norm of all Y - X over that of X, over the deltas that differ; None without norms."""
        measured = [d for d in self.deltas if d.delta_norm is not None]
        if not measured:
            return None
        apart = math.hypot(*(d.delta_norm or 0.0 for d in measured))
        return _ratio(apart, math.hypot(*(d.norms[0] or 0.0 for d in measured)))

    @property
    def relative(self) -> float | None:
        """The norm of all Y - X over that of X, over the changed tensors; None without norms."""
        measured = [t for t in self.changed if t.delta_norm is not None]
        if not measured:
            return None
        delta, weight = (
            math.hypot(*(getattr(t, name) or 0.0 for t in measured))
            for name in ("delta_norm", "weight_norm")
        )
        return _ratio(delta, weight)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return {
            "same": self.same,
            **asdict(self),
            "changed": [tensor.to_json() for tensor in self.changed],
            "deltas": [delta.to_json() for delta in self.deltas],
            "relative": finite(self.relative),
            "relative_delta": finite(self.relative_delta),
        }


def _ratio(delta: float | None, weight: float | None) -> float | None:
    if delta is None or weight is None:
        return None
    if weight == 0:
        return math.inf if delta else 0.0
    return delta / weight


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
