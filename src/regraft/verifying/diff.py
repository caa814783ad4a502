"""Comparing two checkpoints, or two adapters: which tensors differ, and how far they lie apart.

open both -> pair tensors by name -> threads take tiles until none are left -> DiffReport

A tile is a piece of a tensor, read from both sides. Most comparisons end with the bytes: only
tiles that differ are measured. The norm of X is wanted over the whole of a tensor that changed, so
tiles that were equal before the first difference came up are read once more, from X alone.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from regraft.errors import InputError, UsageError
from regraft.formats.checkpoint import open_adapter, open_checkpoint
from regraft.formats.hub import Located, locate
from regraft.formats.layout import ADAPTER_CONFIG, TORCH_SUFFIXES, looks_like
from regraft.formats.problems import quoted
from regraft.formats.reading import FilePool, typed_os_errors
from regraft.formats.safetensors import read_header
from regraft.formats.torch_zip import read_torch_file
from regraft.merging.events import Progress, ProgressEvent
from regraft.merging.sidefiles import travels
from regraft.tensors import DTYPES, WORKING_DTYPES, TensorSpec
from regraft.verifying.workers import for_each

if TYPE_CHECKING:
    from regraft.deltas.distance import Distance
    from regraft.deltas.weights import Bytes

Kind = Literal["checkpoint", "adapter"]
Change = Literal["added", "removed", "changed"]

TILE_BYTES = 2**20
"""Bytes of a tile on its larger side; a thread holds two tiles, and scratch of their size."""

_BY_VALUE = (*WORKING_DTYPES, "F64")  # as in deltas.distance, which is imported at need alone
_WHOLE_BYTES = 64  # so many elements of any dtype end with a byte, and with a 64-bit word
_KINDS: dict[Kind, str] = {"checkpoint": "a full model", "adapter": "an adapter"}
_SETS = frozenset(("target_modules", "exclude_modules", "modules_to_save"))
_CHUNK = 2**20


# ---- the answer


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
        return asdict(self) | {"relative": _finite(self.relative)}


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

    @property
    def same(self) -> bool:
        """Whether tensors and config are the same."""
        return not (self.added or self.removed or self.changed or self.config)

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
            "relative": _finite(self.relative),
        }


def _ratio(delta: float | None, weight: float | None) -> float | None:
    if delta is None or weight is None:
        return None
    if weight == 0:
        return math.inf if delta else 0.0
    return delta / weight


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---- the verb


def diff(
    x: str | Path,
    y: str | Path,
    *,
    threads: int | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare two checkpoints or two adapters; memory does not grow with their size.

    Tensors are compared by name, and by bytes. Where they differ, floats are measured by value,
    in float64; so are float32, bfloat16, float16 and float64 tensors of different dtypes. Where
    either input is a single file, tensors alone are compared; else the configs count too, and
    other files (tokenizer, templates, code, licences) are told without making a difference. How
    tensors are laid out in files, headers, model cards and receipts are not compared.

    Args:
        x: a folder, a weights file, or a Hub id ``org/name[@revision]``.
        y: the same, of the same kind.
        threads: worker threads; by default three more than there are cores at hand.
        token: a Hub token; by default the one huggingface_hub knows of.
        progress: called as work proceeds, with stage ``"compare"`` and the bytes read.

    Returns:
        What differs; ``same`` says whether anything does.

    Raises:
        UsageError: ``threads`` is less than 1.
        InputError: one of them is missing, is no model or adapter, or they are one of each.
        FormatError: a file is malformed.
        UnsupportedError: one is of a kind that regraft does not read, such as GGUF.
        AccessError: the system refused to read a file.
        EnvironmentShortfall: the Hub cannot be reached.
    """
    if threads is not None and threads < 1:
        raise UsageError("threads has to be at least 1", where="--threads", found=str(threads))
    if progress is not None:
        progress(ProgressEvent("read", 0, 0))
    one, other = _open(x, token), _open(y, token)
    _check_kinds(one, other)
    pairs = [(t, other.tensors[name]) for name, t in one.tensors.items() if name in other.tensors]
    changed = _changed(pairs, threads or _default_threads(), progress)
    folders = one.folder is not None and other.folder is not None
    return DiffReport(
        kind=one.kind,
        x=one.side,
        y=other.side,
        added=_lone(other, one),
        removed=_lone(one, other),
        changed=changed,
        unchanged=len(pairs) - len(changed),
        config=tuple(_config_changes(one.config, other.config, ())) if folders else (),
        files=_file_changes(one.folder, other.folder),
        same_layout=_layout(one, other) == _layout(other, one),
    )


def _default_threads() -> int:
    """Return one worker per core at hand, and three more that wait for the disk meanwhile."""
    return len(os.sched_getaffinity(0)) + 3


# ---- inputs


@dataclass(frozen=True)
class _Opened:
    """An input, known from headers; ``folder`` is None where a lone file was named."""

    kind: Kind
    side: DiffSide
    folder: Path | None
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]


def _open(source: str | Path, token: str | None) -> _Opened:
    located = locate(source, kind="adapter", token=token)  # fetches all but a model's weights
    with typed_os_errors(located.path):
        looks = looks_like(located.path)
        if looks in ("adapter", "mlx-adapter"):
            tensors, config = _read_adapter(located)
            return _opened("adapter", located, tensors, config)
    if located.repo_id is not None:
        located = locate(source, kind="base", token=token)
    checkpoint = open_checkpoint(located)
    return _opened("checkpoint", located, checkpoint.tensors, checkpoint.config)


def _read_adapter(located: Located) -> tuple[Mapping[str, TensorSpec], Mapping[str, Any]]:
    """Return tensors and config; a lone file of LoRA factors needs no config."""
    path = located.path
    alone = path.is_file() and not (path.parent / ADAPTER_CONFIG).is_file()
    if alone and looks_like(path) == "adapter":
        in_torch = path.suffix in TORCH_SUFFIXES
        return (read_torch_file(path) if in_torch else read_header(path).tensors), {}
    files = open_adapter(located)
    return files.tensors, files.config


def _opened(
    kind: Kind,
    located: Located,
    tensors: Mapping[str, TensorSpec],
    config: Mapping[str, Any] | None,
) -> _Opened:
    files = len({spec.path for spec in tensors.values()})
    nbytes = sum(spec.nbytes for spec in tensors.values())
    folder = located.path if located.path.is_dir() else None
    revision, alone = located.revision, folder is None
    side = DiffSide(located.source, revision, files, len(tensors), nbytes, alone)
    return _Opened(kind, side, folder, tensors, config or {})


def _check_kinds(x: _Opened, y: _Opened) -> None:
    if x.kind != y.kind:
        raise InputError(
            "an adapter cannot be compared with a full model",
            expected="two full models, or two adapters",
            found=" and ".join(f"{quoted(o.side.source)}, {_KINDS[o.kind]}" for o in (x, y)),
            hint="Merge the adapter first, and compare the result",
        )


def _lone(x: _Opened, y: _Opened) -> tuple[LoneTensor, ...]:
    """Return the tensors of X that Y does not have."""
    only = (spec for name, spec in x.tensors.items() if name not in y.tensors)
    return tuple(LoneTensor(spec.name, spec.dtype, spec.shape) for spec in only)


def _layout(x: _Opened, y: _Opened) -> set[frozenset[str]]:
    """Return which of the tensors that both have are together in a file of X."""
    together: dict[Path, list[str]] = {}
    for name, spec in x.tensors.items():
        if name in y.tensors:
            together.setdefault(spec.path, []).append(name)
    return set(map(frozenset, together.values()))


# ---- configs and other files


def _config_changes(x: Any, y: Any, path: tuple[str, ...]) -> Iterator[ConfigChange]:
    """Yield the differences of two JSON values, objects key by key."""
    if not (isinstance(x, Mapping) and isinstance(y, Mapping)):
        if not _equal(x, y, as_set=bool(path) and path[-1] in _SETS):
            yield ConfigChange(".".join(path), "changed", x, y)
        return
    for key in dict.fromkeys((*x, *y)):
        inner = (*path, key)
        if key not in y:
            yield ConfigChange(".".join(inner), "removed", x[key], None)
        elif key not in x:
            yield ConfigChange(".".join(inner), "added", None, y[key])
        else:
            yield from _config_changes(x[key], y[key], inner)


def _equal(x: Any, y: Any, *, as_set: bool = False) -> bool:
    """Whether two JSON values mean the same: 1 is 1.0 but not true, and NaN is NaN.

    Args:
        x: a value.
        y: another.
        as_set: whether a list stands for a set; PEFT writes those in any order.
    """
    if isinstance(x, bool) or isinstance(y, bool):
        return x is y
    if isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y):
        return True
    if isinstance(x, list) and isinstance(y, list):
        if as_set:
            x, y = sorted(x, key=repr), sorted(y, key=repr)
        return len(x) == len(y) and all(map(_equal, x, y))
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        return x.keys() == y.keys() and all(_equal(x[key], y[key]) for key in x)
    return bool(x == y)


def _file_changes(x: Path | None, y: Path | None) -> tuple[FileChange, ...]:
    """Return the files that travel with the weights and differ, in order of name."""
    if x is None or y is None:
        return ()
    ours, theirs = _side_files(x), _side_files(y)
    found: dict[str, Change] = {
        **dict.fromkeys(ours - theirs, "removed"),
        **dict.fromkeys(theirs - ours, "added"),
        **dict.fromkeys((n for n in ours & theirs if _differ(x / n, y / n)), "changed"),
    }
    return tuple(FileChange(name, found[name]) for name in sorted(found))


def _side_files(folder: Path) -> set[str]:
    with typed_os_errors(folder):
        return {p.name for p in folder.iterdir() if travels(p.name, code=True) and p.is_file()}


def _differ(x: Path, y: Path) -> bool:
    with typed_os_errors(x), x.open("rb") as one, y.open("rb") as other:
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return True
        while piece := one.read(_CHUNK):
            if piece != other.read(_CHUNK):
                return True
    return False


# ---- tensors


def _changed(
    pairs: Sequence[tuple[TensorSpec, TensorSpec]], threads: int, progress: Progress | None
) -> tuple[TensorChange, ...]:
    """Return what differs of the pairs, in their order."""
    with FilePool() as files:
        queue = _Queue(pairs, files, progress)
        _run_threads(queue, threads)
    changes = (queue.changes.get(x.name) for x, _ in pairs)
    return tuple(change for change in changes if change is not None)


def _alike(x: TensorSpec, y: TensorSpec) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape


def _comparable(x: TensorSpec, y: TensorSpec) -> bool:
    """Whether there is an element of Y for each of X that means the same kind of thing."""
    return _alike(x, y) or (x.shape == y.shape and _by_value(x) and _by_value(y))


def _by_value(spec: TensorSpec) -> bool:
    return spec.dtype in _BY_VALUE


class _Buffers:
    """One thread's memory: a tile of each side."""

    def __init__(self) -> None:
        self.x: Bytes = np.frombuffer(mmap.mmap(-1, TILE_BYTES), np.uint8)
        self.y: Bytes = np.frombuffer(mmap.mmap(-1, TILE_BYTES), np.uint8)


class _Comparison:
    """A tensor of both sides; its tiles may be done by several threads at the same time."""

    def __init__(self, x: TensorSpec, y: TensorSpec, files: FilePool) -> None:
        self.x, self.y, self._files = x, y, files
        bits = max(DTYPES[x.dtype].bits, DTYPES[y.dtype].bits)
        self._step = TILE_BYTES * 8 // bits // _WHOLE_BYTES * _WHOLE_BYTES
        self._left = math.ceil(x.numel / self._step)
        self._equal: list[int] = []
        self._distance: Distance | None = None
        self._lock = threading.Lock()

    def tiles(self) -> Iterable[int]:
        """Return the first element of each tile."""
        return range(0, self.x.numel, self._step)

    def work(self, first: int, buffers: _Buffers) -> tuple[int, bool]:
        """Compare one tile; return the bytes read, and whether it was the last one to be done.

        Raises:
            RegraftError: something could not be read.
        """
        x = self._read(self.x, first, buffers.x)
        y = self._read(self.y, first, buffers.y)
        if self.x.dtype == self.y.dtype and _same_bytes(x, y):
            self._note_equal(first, x)
        else:
            self._measure(x, y, self.y.dtype)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._catch_up(buffers)
        return x.size + y.size, last

    def _read(self, spec: TensorSpec, first: int, room: Bytes) -> Bytes:
        bits = DTYPES[spec.dtype].bits
        at = first * bits // 8
        raw = room[: min(self._step * bits // 8, spec.nbytes - at)]
        self._files.read_into(spec, at, raw.data)
        return raw

    def _note_equal(self, first: int, x: Bytes) -> None:
        """Account for a tile without a difference: its norm is needed if another tile has one."""
        if not _by_value(self.x):
            return
        with self._lock:
            early = self._distance is None
            if early:
                self._equal.append(first)
        if not early:
            self._measure(x, x, self.x.dtype)

    def _measure(self, x: Bytes, y: Bytes, y_dtype: str) -> None:
        from regraft.deltas.distance import distance  # compiled; equal models do without

        found = distance(x, self.x.dtype, y, y_dtype)
        with self._lock:
            if self._distance is not None:
                found.add(self._distance)
            self._distance = found

    def _catch_up(self, buffers: _Buffers) -> None:
        """Add the norms of the tiles that were equal while no difference was known."""
        if self._distance is not None:
            for first in self._equal:
                x = self._read(self.x, first, buffers.x)
                self._measure(x, x, self.x.dtype)

    def outcome(self) -> TensorChange | None:
        """Return what differs once all tiles are done; None if nothing does."""
        if self._distance is None:
            return _change(self.x, self.y) if not _alike(self.x, self.y) else None
        return _change(self.x, self.y, self._distance)


def _change(x: TensorSpec, y: TensorSpec, far: Distance | None = None) -> TensorChange:
    """Return how X and Y differ; without a distance, no element of theirs was compared."""
    forms = (x.dtype, y.dtype), (x.shape, y.shape)
    if far is None:
        return TensorChange(x.name, *forms, changed=0 if _comparable(x, y) else None)
    if not _by_value(x):
        return TensorChange(x.name, *forms, changed=far.changed)
    return TensorChange(
        x.name,
        *forms,
        changed=far.changed,
        not_finite=far.not_finite,
        weight_norm=_norm(far.weight),
        delta_norm=_norm(far.delta),
        largest=_finite(far.largest),
        ulps=far.ulps if x.dtype == y.dtype and x.dtype in WORKING_DTYPES else None,
    )


def _same_bytes(x: Bytes, y: Bytes) -> bool:
    whole = x.size // 8 * 8
    words = x[:whole].view(np.uint64), y[:whole].view(np.uint64)
    return np.array_equal(*words) and np.array_equal(x[whole:], y[whole:])


def _norm(squares: float) -> float | None:
    """Return a norm to nine digits, as more would depend on which thread was faster.

    None where a float64 cannot hold the sum, which takes float64 tensors of enormous values.
    """
    return float(f"{math.sqrt(squares):.9g}") if math.isfinite(squares) else None


class _Queue:
    """Hands out tiles, tensor by tensor; keeps what differs and tells how far the work has come."""

    def __init__(
        self,
        pairs: Sequence[tuple[TensorSpec, TensorSpec]],
        files: FilePool,
        progress: Progress | None,
    ) -> None:
        self._pairs, self._files = pairs, files
        self._places = {path: os.path.realpath(path) for p in pairs for path in _paths(*p)}
        self._total = sum(x.nbytes + y.nbytes for x, y in pairs if self._has_to_be_read(x, y))
        self._done, self._progress = 0, progress
        self._lock = threading.Lock()
        self.changes: dict[str, TensorChange] = {}

    def walk(self) -> Iterator[tuple[_Comparison, int]]:
        """Yield the tiles to be compared, tensor by tensor."""
        for x, y in self._pairs:
            if self._has_to_be_read(x, y):
                comparison = _Comparison(x, y, self._files)
                for first in comparison.tiles():
                    yield comparison, first
            elif not _alike(x, y):
                self.changes[x.name] = _change(x, y)

    def _has_to_be_read(self, x: TensorSpec, y: TensorSpec) -> bool:
        """Whether headers leave the outcome open, and the two are not one place of one file.

        They are that in the Hub's cache, where revisions share the files that did not change.
        """
        one_place = x.start == y.start and self._places[x.path] == self._places[y.path]
        return _comparable(x, y) and x.numel > 0 and not (one_place and _alike(x, y))

    def finish(self, comparison: _Comparison, nbytes: int, *, last: bool) -> None:
        """Account for a tile; with the last one of a tensor, keep what differs."""
        name = comparison.x.name if last else ""
        change = comparison.outcome() if last else None
        with self._lock:
            if change is not None:
                self.changes[name] = change
            self._done += nbytes
            if self._progress is not None:
                self._progress(ProgressEvent("compare", self._done, self._total, name))


def _paths(x: TensorSpec, y: TensorSpec) -> set[Path]:
    return {x.path, y.path}


def _run_threads(queue: _Queue, threads: int) -> None:
    own = threading.local()

    def work(item: tuple[_Comparison, int]) -> None:
        if not hasattr(own, "buffers"):
            own.buffers = _Buffers()
        comparison, first = item
        nbytes, last = comparison.work(first, own.buffers)
        queue.finish(comparison, nbytes, last=last)

    for_each(queue.walk(), work, threads)
