"""Comparing two checkpoints, or two adapters: which tensors differ, and how far they lie apart.

open both -> pair tensors by name -> compare tensors, configs, other files -> DiffReport
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.concurrency import default_threads
from regraft.errors import AdapterError, InputError, UnsupportedError, UsageError
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.files.watching import watched
from regraft.formats.hub import Located, locate
from regraft.formats.layout import ADAPTER_CONFIG, TORCH_SUFFIXES, looks_like
from regraft.formats.problems import quoted
from regraft.formats.safetensors import read_header
from regraft.formats.torch_zip import read_torch_file
from regraft.merging.inputs.any_dialect import dialect_at, open_adapter
from regraft.progress import Progress, ProgressEvent
from regraft.tensors import TensorSpec
from regraft.verifying.diffing.folders import config_changes, file_changes
from regraft.verifying.diffing.report import DiffReport, DiffSide, Kind, LoneTensor
from regraft.verifying.diffing.tensors import changed_tensors

if TYPE_CHECKING:
    from regraft.verifying.diffing.deltas import Deltas

_STORED = "the factors are compared as they are stored"
_KINDS: dict[Kind, str] = {"checkpoint": "a full model", "adapter": "an adapter"}


@watched(to_the_end=True)
def diff(
    x: str | Path,
    y: str | Path,
    *,
    raw: bool = False,
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

    Of adapters the deltas are compared, scale · B · A of each module, whatever ranks, scales,
    names and dtypes the factors have; the other tensors (DoRA's magnitudes, whole tensors, token
    rows, biases) as they are.

    Args:
        x: a folder, a weights file, or a Hub id ``org/name[@revision]``.
        y: the same, of the same kind.
        raw: of adapters, compare the factors as they are stored, too, and no deltas.
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
    deltas, notes = (None, ()) if raw else _deltas(one, other, progress)
    if deltas is not None:
        one, other = replace(one, tensors=deltas.x), replace(other, tensors=deltas.y)
    pairs = [(t, other.tensors[key]) for key, t in one.tensors.items() if key in other.tensors]
    changed = changed_tensors(pairs, threads or default_threads(), progress)
    folders = one.folder is not None and other.folder is not None
    return DiffReport(
        kind=one.kind,
        x=one.side,
        y=other.side,
        added=_lone(other, one),
        removed=_lone(one, other),
        changed=changed,
        unchanged=len(pairs) - len(changed),
        config=tuple(config_changes(one.config, other.config, ())) if folders else (),
        files=file_changes(one.folder, other.folder),
        same_layout=_layout(one, other) == _layout(other, one),
        deltas=deltas.changed if deltas is not None else (),
        same_deltas=deltas.same if deltas is not None else 0,
        notes=notes,
    )


def _deltas(
    x: _Opened, y: _Opened, progress: Progress | None
) -> tuple[Deltas | None, tuple[str, ...]]:
    """Compare the deltas of adapters, with what is to be said of that.

    There are none of full models, and none where a lone file has no config, which has the scales,
    or where one is not read as an adapter.
    """
    if x.kind != "adapter":
        return None, ()
    if x.adapter is None or y.adapter is None:
        return None, (f"{_STORED}, since a file has no adapter_config.json, which has the scales",)
    from regraft.verifying.diffing.deltas import compare_deltas

    try:
        found = compare_deltas(x.adapter, y.adapter, progress)
    except (AdapterError, UnsupportedError) as error:
        problem = error.problems[0]
        return None, (f"{_STORED}, since one is not read: {problem.where}: {problem.what}",)
    return found, found.notes


# ---- inputs


@dataclass(frozen=True)
class _Opened:
    """An input, known from headers; ``folder`` is None where a lone file was named."""

    kind: Kind
    side: DiffSide
    folder: Path | None
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    adapter: AdapterFiles | None = None


def _open(source: str | Path, token: str | None) -> _Opened:
    located = locate(source, kind="adapter", token=token)  # fetches all but a model's weights
    with typed_os_errors(located.path):
        looks = looks_like(located.path)
        if looks in ("adapter", "mlx-adapter") or dialect_at(located) is not None:
            return _open_adapter(located)
    if located.repo_id is not None:
        located = locate(source, kind="base", token=token)
    checkpoint = open_checkpoint(located)
    return _opened("checkpoint", located, checkpoint.tensors, checkpoint.config)


def _open_adapter(located: Located) -> _Opened:
    """Open an adapter; a lone file of LoRA factors needs no config."""
    path = located.path
    alone = path.is_file() and not (path.parent / ADAPTER_CONFIG).is_file()
    alone = alone and path.suffix != ".gguf"  # which says all that is needed itself
    if alone and looks_like(path) == "adapter":
        in_torch = path.suffix in TORCH_SUFFIXES
        tensors = read_torch_file(path) if in_torch else read_header(path).tensors
        return _opened("adapter", located, tensors, {})
    files = open_adapter(located)
    return replace(_opened("adapter", located, files.tensors, files.config), adapter=files)


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
