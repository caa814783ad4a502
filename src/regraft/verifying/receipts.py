"""Are the files those of the receipt? Every byte of the folder has its digest there.

The receipt is one too: it is read only if it is byte for byte as regraft wrote it, its own digest
included. Files are found by walking the folder; no name in a receipt is ever opened as a path.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from blake3 import blake3

from regraft.concurrency import for_each
from regraft.errors import InputError
from regraft.formats.files.inside import leads_outside
from regraft.formats.files.reading import FilePool, open_regular, read_at, typed_os_errors
from regraft.formats.gguf import open_gguf
from regraft.formats.gguf_header import raw_head
from regraft.formats.layout import RECEIPT, is_gguf, record_of
from regraft.formats.safetensors import MAX_HEADER_BYTES, read_header
from regraft.merging.files.receipt import Receipt, TensorRecord, file_key
from regraft.progress import Progress, ProgressMeter
from regraft.system.positioned import read_into
from regraft.tensors import TensorSpec
from regraft.verifying.report import Difference

CHUNK = 2**20
"""Bytes read and hashed at a time by one thread."""

_LENGTH_BYTES = 8


@dataclass
class ReceiptCheck:
    """What came of checking a folder against its receipt.

    Attributes:
        differences: everything that is not as the receipt says, in order of file and tensor.
        files: files beside the weights whose digest was taken.
        headers: weight files whose header's digest was taken.
        tensors: tensors whose digest was taken.
        bytes: bytes of all these.
        notes: what could not be checked, one sentence each.
        complete: whether the receipt speaks of every file.
    """

    differences: list[Difference] = field(default_factory=list)
    files: int = 0
    headers: int = 0
    tensors: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)
    complete: bool = True


def check_receipt(
    root: Path, receipt: Receipt, *, threads: int = 1, progress: Progress | None = None
) -> ReceiptCheck:
    """Compare every file of a folder with its receipt.

    Args:
        root: the folder.
        receipt: its receipt, as :func:`regraft.merging.files.receipt.read_receipt` returned it.
        threads: how many read at a time.
        progress: called as work proceeds.

    Raises:
        AccessError: the system refused to read something.
    """
    check = ReceiptCheck()
    there, empty = list_files(root) if root.is_dir() else list_beside(root, receipt)
    _note_empty(check, empty)
    records: dict[str, list[TensorRecord]] = defaultdict(list)
    for record in receipt.tensors:
        records[record.file].append(record)
    weights = {**dict.fromkeys(receipt.headers), **dict.fromkeys(records)}
    named = {*weights, *receipt.files, RECEIPT}
    _compare_names(check, there, named, complete=_is_whole(receipt))
    _note_links(check, root, {name: there[name] for name in sorted(named & there.keys())})
    if not _is_whole(receipt):
        check.complete = False
        check.notes.append(
            f"the receipt of regraft {receipt.regraft} has no digests of headers and other files: "
            "only tensors were checked, and what else lies there can be anything"
        )
    with FilePool() as pool:
        jobs = [
            _DigestJob(
                there[name], _size(there[name]), partial(_check_file, name=name, digest=digest)
            )
            for name, digest in receipt.files.items()
            if name in there
        ]
        for name in weights:
            if name in there:
                digest = receipt.headers.get(name)
                jobs += _weight_jobs(check, there[name], name, digest, records[name], pool)
        _run(check, jobs, threads, progress)
    check.differences.sort(key=lambda found: (found.file, found.tensor, found.what))
    return check


def _is_whole(receipt: Receipt) -> bool:
    """Whether a receipt speaks of all files, which those of regraft 0.1 did not."""
    return bool(receipt.headers or receipt.files)


def list_files(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return everything below a folder that is no folder, by its name as a receipt has it; and the
    names of the folders in which there is no file, those of the highest of them.

    Raises:
        AccessError: a folder cannot be read.
    """
    found, folders_found, filled = dict[str, Path](), list[str](), set[str]()
    with typed_os_errors(root):
        for folder, folders, names in os.walk(root, onerror=_raise):
            here = Path(folder)
            below = here.relative_to(root)
            within = "" if below == Path() else f"{below.as_posix()}/"
            links = [name for name in folders if (here / name).is_symlink()]
            found |= {file_key(within + name): here / name for name in (*names, *links)}
            folders_found += [file_key(within + name) for name in folders if name not in links]
            if names or links:
                filled |= {file_key(each.as_posix()) for each in (below, *below.parents)}
    empty = [name for name in folders_found if name not in filled]
    return found, [name for name in empty if name.rpartition("/")[0] not in empty]


def list_beside(file: Path, receipt: Receipt) -> tuple[dict[str, Path], list[str]]:
    """Return a lone weights file and what lies in its folder of records, by name as the receipt of
    a folder would have it; the file by the name that it was written under. Also empty folders.

    Raises:
        AccessError: the folder cannot be read.
    """
    beside, empty = list_files(record_of(file))
    within = RECEIPT.rpartition("/")[0]
    there = {f"{within}/{name}": path for name, path in beside.items()}
    return there | dict.fromkeys(receipt.headers, file), [f"{within}/{name}" for name in empty]


def _note_empty(check: ReceiptCheck, folders: Iterable[str]) -> None:
    """Note folders that hold nothing: the merge makes none."""
    for name in folders:
        what = "an empty folder that the merge did not write"
        check.differences.append(Difference(f"{name}/", "", what))


def _note_links(check: ReceiptCheck, root: Path, files: Mapping[str, Path]) -> None:
    """Note files that are links to elsewhere: what they hold can change, and is not in the folder.

    A snapshot in the Hub's cache is made of links to the blobs beside it.
    """
    for name, path in files.items():
        if path.is_symlink() and leads_outside(path, root):
            what = "a link to outside of the folder, where the merge wrote a file"
            check.differences.append(Difference(name, "", what))


def _size(path: Path) -> int:
    """Return a file's size, for progress; 0 where there is none to be had."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _raise(error: OSError) -> None:
    raise error


def _compare_names(
    check: ReceiptCheck, there: Mapping[str, Path], named: set[str], *, complete: bool
) -> None:
    """Note what is missing, and what nobody wrote; of a folder of such only the folder."""
    for name in named - there.keys():
        check.differences.append(Difference(name, "", "the file is missing"))
    if not complete:
        return
    known = {name.partition("/")[0] for name in named}
    strange: dict[str, int] = defaultdict(int)
    for name in there.keys() - named:
        top, _, rest = name.partition("/")
        strange[f"{top}/" if rest and top not in known else name] += 1
    for name, count in strange.items():
        many = f"a folder of {count} file{'s' * (count > 1)} that the merge did not write"
        what = many if name.endswith("/") else "a file that the merge did not write"
        check.differences.append(Difference(name, "", what))


# -- jobs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DigestJob:
    """A piece of reading.

    Attributes:
        path: the file.
        nbytes: bytes to read, where known beforehand.
        work: takes the path and a buffer; returns bytes read, differences, and the tensor's name.
        tensor: what is read, for progress.
    """

    path: Path
    nbytes: int
    work: Callable[[Path, memoryview], tuple[int, list[Difference]]]
    tensor: str = ""


def _run(
    check: ReceiptCheck, jobs: Iterable[_DigestJob], threads: int, progress: Progress | None
) -> None:
    jobs = list(jobs)
    told = ProgressMeter(progress, "verify", sum(job.nbytes for job in jobs))
    lock = threading.Lock()  # over the check, which all threads add to

    def work(job: _DigestJob, buffer: memoryview) -> None:
        nbytes, differences = job.work(job.path, buffer)
        with lock:
            check.bytes += nbytes
            check.tensors += bool(job.tensor)
            check.files += not job.tensor
            check.differences += differences
        told.add(job.nbytes, job.tensor)

    many = min(threads, max(len(jobs), 1))
    for_each(jobs, work, many, memory=lambda: memoryview(bytearray(CHUNK)))


def _check_file(
    path: Path, buffer: memoryview, *, name: str, digest: str
) -> tuple[int, list[Difference]]:
    """Hash a file beside the weights."""
    try:
        fd = open_regular(path)
    except InputError as error:
        return 0, [Difference(name, "", error.problems[0].what)]
    hasher, done = blake3(), 0
    try:
        with typed_os_errors(path):
            while count := read_into(fd, buffer, done):
                hasher.update(buffer[:count])
                done += count
    finally:
        os.close(fd)
    return done, _unless(hasher.hexdigest() == digest, name, "", "its bytes have changed")


def _check_tensor(
    _: Path, buffer: memoryview, *, spec: TensorSpec, record: TensorRecord, pool: FilePool
) -> tuple[int, list[Difference]]:
    """Hash a tensor."""
    hasher = blake3()
    for start in range(0, spec.nbytes, CHUNK):
        piece = buffer[: min(CHUNK, spec.nbytes - start)]
        pool.read_into(spec, start, piece)
        hasher.update(piece)
    same = hasher.hexdigest() == record.blake3
    return spec.nbytes, _unless(same, record.file, record.name, "its bytes have changed")


def _unless(same: bool, file: str, tensor: str, what: str) -> list[Difference]:
    return [] if same else [Difference(file, tensor, what)]


# -- weight files ----------------------------------------------------------------------------------


def _weight_jobs(
    check: ReceiptCheck, path: Path, name: str, digest: str | None,
    records: list[TensorRecord], pool: FilePool,
) -> list[_DigestJob]:  # fmt: skip
    """Check a weight file's header, and return the jobs for its tensors."""
    in_gguf, raw = is_gguf(path), b""
    try:
        if digest is not None:
            check.headers += 1
            raw = raw_head(path) if in_gguf else _raw_header(path)
            check.bytes += len(raw)
            same = blake3(raw).hexdigest() == digest
            check.differences += _unless(same, name, "", "its header has changed")
        tensors = _tensors_of_gguf(path) if in_gguf else read_header(path).tensors
        if in_gguf:
            padded = not _is_padded(path, tensors.values(), len(raw))
            check.differences += _unless(not padded, name, "", "bytes between tensors have changed")
    except InputError as error:
        what = "; ".join(_without_path(problem.what, problem.found) for problem in error.problems)
        check.differences.append(Difference(name, "", f"it cannot be read: {what}"))
        return []
    jobs = []
    for record in records:
        spec = tensors.get(record.name)
        wrong = _misfit(record, spec)
        if wrong or spec is None:
            check.differences.append(Difference(name, record.name, wrong))
            continue
        work = partial(_check_tensor, spec=spec, record=record, pool=pool)
        jobs.append(_DigestJob(path, spec.nbytes, work, record.name))
    known = {record.name for record in records}
    for other in tensors.keys() - known:
        check.differences.append(Difference(name, other, "a tensor that the merge did not write"))
    return jobs


def _tensors_of_gguf(path: Path) -> dict[str, TensorSpec]:
    """Return the blocks of a GGUF file's tensors, by name."""
    return {name: tensor.stored for name, tensor in open_gguf(path).tensors.items()}


def _is_padded(path: Path, tensors: Iterable[TensorSpec], begin: int) -> bool:
    """Whether zeros, less than a tensor's alignment, lie between tensors and after them."""
    ends = sorted((spec.start, spec.start + spec.nbytes) for spec in tensors)
    fd = open_regular(path)
    try:
        size, at = os.fstat(fd).st_size, begin
        for start, end in [*ends, (size, size)]:
            if start - at > CHUNK or any(read_at(fd, path, at, start - at)):
                return False
            at = end
    finally:
        os.close(fd)
    return True


def _without_path(what: str, found: str) -> str:
    return f"{what} ({found})" if found else what


def _misfit(record: TensorRecord, spec: TensorSpec | None) -> str:
    """Return how a tensor's place in the file differs from its record, ``""`` if it does not."""
    if spec is None:
        return "the tensor is missing"
    if (spec.dtype, spec.shape) == (record.dtype, record.shape):
        return ""
    was = f"{record.dtype} {list(record.shape)}"
    return f"it is {spec.dtype} {list(spec.shape)} and was written as {was}"


def _raw_header(path: Path) -> bytes:
    """Return all bytes of a safetensors file before its tensors, fewer if its length is wrong."""
    fd = open_regular(path)
    try:
        length = read_at(fd, path, 0, _LENGTH_BYTES)
        room = min(int.from_bytes(length, "little"), MAX_HEADER_BYTES)
        return length + read_at(fd, path, _LENGTH_BYTES, room)
    finally:
        os.close(fd)
