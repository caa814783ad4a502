"""What a merged model keeps of its base, besides the patch of its weights, and the way back.

``OUT/regraft/undo/`` holds ``undo.json``, the patch, the base's config, index and other side files
under ``base/``, and the adapters. From these a stand-in for the base is made: files of full size
with everything but the tensors, holes in their place. It is opened and planned on as the base was.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from regraft.adapters.model import Adapter
from regraft.deltas.undo import compression
from regraft.errors import MismatchError, Problem
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.inside import LARGEST, contents_of, file_pieces, read_whole
from regraft.formats.files.reading import open_regular, read_at, typed_os_errors
from regraft.formats.gguf_header import raw_head
from regraft.formats.hub import Located
from regraft.formats.problems import capped
from regraft.merging.files.direct_io import write_error
from regraft.merging.files.publish import check_names_apart, copy_file, write_file
from regraft.merging.files.receipt import file_key
from regraft.merging.files.side_files import TEMPLATES, json_bytes
from regraft.merging.inputs.base import open_base
from regraft.merging.planning.plan import OutputShard, Plan, Step, kept_name
from regraft.merging.planning.targets import Target, plan_digest
from regraft.merging.undo.corrections import Correction, layout_of
from regraft.merging.undo.gguf_head import lengthened, shortened
from regraft.merging.undo.manifest import (
    IN_GGUF,
    MANIFEST,
    PATCH,
    SIDE_FILES,
    UNDO,
    Manifest,
    SideFile,
    WeightFile,
    belongs,
    undo_of,
)
from regraft.merging.undo.patch import (
    CHUNKS,
    FACTORS,
    PLANES,
    STREAMS,
    UNITS,
    PatchReader,
    PatchWriter,
    file_section,
    section,
)
from regraft.system.positioned import write_all
from regraft.tensors import TensorSpec

SMALL_TENSOR = 4096
"""Of a quantized base, tensors of up to so many bytes are kept with the headers."""


CONFIG = "config.json"

_ALWAYS_KEPT_BYTES = 64 * 2**10
"""Side files up to this size are kept even where the output has the same file."""


@dataclass(frozen=True)
class UndoSettings:
    """What an output keeps for an undo besides the patch.

    Attributes:
        adapters: whether a copy of each adapter.
        left_out: files of the base's folder that could not be kept earlier.
    """

    adapters: bool
    left_out: tuple[str, ...] = ()


def section_names(plan: Plan, keeps: Sequence[Correction]) -> list[str]:
    """Return every section that the patch of a merge may have."""
    names = [file_section(shard.name) for shard in plan.stored.shards]
    for step in plan.steps:
        if step.is_invertible:
            factors = sum(2 if d.is_residual else d.magnitude is not None for d in step.deltas)
            kinds = [STREAMS, UNITS, *(f"{FACTORS}.{i}" for i in range(factors))]
            names += [section(kept_name(step), kind) for kind in kinds]
    return names + [section(k.original.name, kind) for k in keeps for kind in (PLANES, CHUNKS)]


def keep_base(
    plan: Plan, keeps: Sequence[Correction], patch: PatchWriter, folder: Path,
    files: Mapping[str, str], keeping: UndoSettings,
) -> dict[str, str]:  # fmt: skip
    """Keep everything of a base but its tensors, and finish the patch.

    Args:
        plan: the merge.
        keeps: the base's tensors that are kept by their difference.
        patch: with all tensors' sections; it is closed.
        folder: the output.
        files: blake3 (hex) of the output's other files, by name.
        keeping: what else is kept.

    Returns:
        blake3 (hex) of every file written, by its path in the output.

    Raises:
        RegraftError: a file of the base cannot be read, or something cannot be written.
    """
    of_file = defaultdict[Path, list[TensorSpec]](list)
    for spec in plan.stored.tensors.values():
        of_file[spec.path].append(spec)
    paths = [shard.path for shard in plan.stored.shards]
    like = raw_head(folder / plan.shards[0].name) if plan.is_gguf else None
    weights = [_keep_gaps(plan, path, of_file[path], patch, like) for path in paths]
    patch.close()
    written: dict[str, str] = {}

    def write(name: str, content: bytes) -> None:
        write_file(folder / UNDO / name, content)
        written[file_key(f"{UNDO}/{name}")] = blake3(content).hexdigest()

    side, left_out = [], list(keeping.left_out)
    for name, path in _sides_to_keep(plan).items():
        if file_key(name) != name:
            left_out.append(file_key(name))
            continue
        content = read_whole(path)
        digest = blake3(content).hexdigest()
        kept = len(content) <= _ALWAYS_KEPT_BYTES or files.get(file_key(name)) != digest
        if kept:
            write(f"{SIDE_FILES}/{name}", content)
        side.append(SideFile(name, digest, kept))
    left_out += [] if plan.base.single_file or plan.is_gguf else _others(plan.base)
    adapters: list[str | None] = []
    for number, adapter in enumerate(plan.adapters):
        place = copy_name(number) if keeping.adapters else None
        adapters.append(place)
        if place is not None:
            written |= _copy_adapter(adapter, folder, place)
    single = plan.base.shards[0].name if plan.base.single_file else None
    manifest = Manifest(
        plan_digest(plan), single, tuple(weights), tuple(side), tuple(left_out), tuple(adapters),
        IN_GGUF if plan.is_gguf else layout_of(keeps),
    )  # fmt: skip
    write(MANIFEST, json_bytes(manifest.to_json()))
    written[f"{UNDO}/{PATCH}"] = _digest_file(folder / UNDO / PATCH)
    return written


def _sides_to_keep(plan: Plan) -> dict[str, Path]:
    """Return the base's files beside its weights that are kept, by name.

    Beside a GGUF file they are none of its own; of its config the old merge could be planned.
    """
    if plan.base.single_file:
        return {}
    found = _side_files(plan.base)
    return {n: path for n, path in found.items() if not plan.is_gguf or n == CONFIG}


def gaps_of(size: int, tensors: Sequence[TensorSpec]) -> list[tuple[int, int]]:
    """Return offset and length of what lies between and around tensors of a file, in order."""
    gaps, at = [], 0
    for spec in sorted(tensors, key=lambda spec: spec.start):
        if spec.start > at:
            gaps.append((at, spec.start - at))
        at = max(at, spec.start + spec.nbytes)
    return gaps + ([(at, size - at)] if size > at else [])


def _keep_gaps(
    plan: Plan, path: Path, tensors: Sequence[TensorSpec], patch: PatchWriter, like: bytes | None
) -> WeightFile:
    """Keep what a weights file holds besides tensors; ``like`` is the head of a GGUF output."""
    if plan.quantization is not None and like is None:
        # Small tensors say what the large ones are: to plan, they are read. A GGUF head says it.
        tensors = [spec for spec in tensors if spec.nbytes > SMALL_TENSOR]
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        gaps = gaps_of(size, tensors)
        content = b"".join(read_at(file.fileno(), path, at, n) for at, n in gaps)
    kept = content if like is None else shortened(content, like)
    patch.append(compression.compress(kept))
    patch.end(file_section(path.name))
    length = None if like is None else len(kept)
    return WeightFile(path.name, size, tuple(gaps), blake3(content).hexdigest(), length)


def _side_files(base: Checkpoint) -> dict[str, Path]:
    """Return the base's files beside its weights, by name."""
    found = dict(contents_of(base.root).files)
    if (base.root / TEMPLATES).is_dir():
        templates = contents_of(base.root, TEMPLATES).files
        found |= {name: path for name, path in templates.items() if name.endswith(".jinja")}
    return {name: path for name, path in found.items() if belongs(Path(name).name)}


def _others(base: Checkpoint) -> list[str]:
    """Return what else a base's folder holds: other formats of its weights, logs, folders."""
    known = {shard.name for shard in base.shards} | {TEMPLATES, ".cache"}
    known |= set(_side_files(base))
    with typed_os_errors(base.root):
        return sorted(file_key(p.name) for p in base.root.iterdir() if p.name not in known)


def copy_name(number: int) -> str:
    """Return the name of the folder below :data:`UNDO` with the copy of an adapter."""
    return f"adapter-{number}"


def _copy_adapter(adapter: Adapter, folder: Path, name: str) -> dict[str, str]:
    """Copy an adapter's config and weights; return their digests by path in the output."""
    target = folder / UNDO / name
    digests = {}
    for path in adapter.files:
        digest = copy_file(path, target / path.name)
        digests[file_key(f"{UNDO}/{name}/{path.name}")] = digest
    return digests


def _digest_file(path: Path) -> str:
    digest = blake3()
    for piece in file_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def pieces_of(file: WeightFile, patch: PatchReader, merged: Path) -> list[tuple[int, bytes]]:
    """Return what a weights file of the base holds besides tensors: offset and bytes.

    Raises:
        FormatError: the patch does not hold it.
    """
    name, total = file_section(file.name), sum(length for _, length in file.gaps)
    content = patch.table(name, total if file.kept is None else file.kept)
    if file.kept is not None:
        try:
            content = lengthened(content, raw_head(merged))
        except ValueError as error:
            raise patch.damaged(name, "a part of a head", str(error)) from None
    if blake3(content).hexdigest() != file.blake3:
        raise patch.damaged(name, f"blake3 {file.blake3}", blake3(content).hexdigest())
    pieces, at = [], 0
    for start, length in file.gaps:
        pieces.append((start, content[at : at + length]))
        at += length
    return pieces


def side_files(merged: Path, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Yield the base's files beside its weights: name and content.

    Raises:
        MismatchError: the output's have changed since the merge; lists every one.
        AccessError: one cannot be read.
    """
    problems = []
    for file in manifest.side_files:
        path = (undo_of(merged) / SIDE_FILES if file.kept else merged) / file.name
        content = b""
        if path.is_file() and path.stat().st_size <= LARGEST:
            content = read_whole(path)
        if not path.is_file() or blake3(content).hexdigest() != file.blake3:
            problems.append(
                Problem(
                    "a file that the base had is gone, or has changed since the merge", str(path),
                    f"blake3 {file.blake3}", hint="Take it from where it was unchanged",
                )
            )  # fmt: skip
        elif not problems:
            yield file.name, content
    if problems:
        raise MismatchError(capped(problems, merged))


def stand_in(merged: Path, manifest: Manifest, patch: PatchReader, folder: Path) -> Checkpoint:
    """Make a stand-in for the base in an empty folder, and open it.

    Raises:
        RegraftError: something is missing or damaged, or cannot be written.
    """
    check_names_apart(folder, [file.name for file in manifest.files])
    for file in manifest.files:
        path = folder / file.name
        try:
            with path.open("wb") as made:
                made.truncate(file.size)
                for start, content in pieces_of(file, patch, merged):
                    write_all(made.fileno(), memoryview(content), start)
        except OSError as error:
            raise write_error(path, error) from error
    for name, content in side_files(merged, manifest):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    place = folder / manifest.single_file if manifest.single_file else folder
    return open_base(Located(place, str(place), None, None))


def base_targets(
    base: Checkpoint, manifest: Manifest, patch: PatchReader, merged: Path
) -> list[Target]:
    """Return the base's weight files as they are to be written again."""
    targets = []
    for shard, file in zip(base.shards, sorted(manifest.files, key=lambda f: f.name), strict=True):
        places: dict[tuple[int, int], TensorSpec] = {}
        for name in shard.tensors:  # tensors that share their bytes are written once
            spec = base.tensors[name]
            places.setdefault((spec.start, spec.nbytes), spec)
        steps = [Step(s.name, "copy", s, None, s.dtype, s.shape) for s in places.values()]
        offsets = tuple(start for start, _ in places)
        pieces = tuple(pieces_of(file, patch, merged))
        targets.append(Target(file.name, file.size, pieces, tuple(steps), offsets))
    return targets


def base_shards(targets: Sequence[Target]) -> tuple[OutputShard, ...]:
    """Return files as a plan lists them."""
    return tuple(OutputShard(target.name, target.steps) for target in targets)
