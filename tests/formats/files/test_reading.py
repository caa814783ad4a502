"""Bytes of tensors are read at their offsets, from any thread, and short files are named."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from regraft.errors import AccessError, FormatError, InputError
from regraft.formats.files import reading
from regraft.formats.files.reading import FilePool
from regraft.tensors import TensorSpec


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(100_000)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    return path


def spec(path: Path, start: int, nbytes: int) -> TensorSpec:
    return TensorSpec("x", "U8", (nbytes,), path, start, nbytes)


def test_a_range_of_a_tensor_is_read_into_the_buffer(path: Path, content: bytes) -> None:
    target = np.zeros((25, 8), np.float32)
    with FilePool() as pool:
        pool.read_into(spec(path, 100, 5000), 37, target)
        assert target.tobytes() == content[137 : 137 + 800]
        assert pool.read_bytes(spec(path, 99_000, 1000)) == content[99_000:]


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_an_empty_read_touches_nothing(tmp_path: Path) -> None:
    with FilePool() as pool:
        pool.read_into(spec(tmp_path / "none", 0, 0), 0, np.zeros((0, 3)))
        assert pool.read_bytes(spec(tmp_path / "none", 5, 0)) == b""


def test_short_reads_are_continued(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    monkeypatch.setattr(reading.os, "preadv", lambda fd, views, at: whole(fd, [views[0][:999]], at))
    with FilePool() as pool:
        assert pool.read_bytes(spec(path, 3, 50_000)) == content[3:50_003]


def test_threads_share_one_descriptor(path: Path, content: bytes) -> None:
    before = open_files()
    ranges = [(at, 997) for at in range(0, 99_000, 500)]
    with FilePool() as pool, ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda r: pool.read_bytes(spec(path, *r)), ranges))
        assert open_files() == before + 1
    assert got == [content[at : at + n] for at, n in ranges]
    assert open_files() == before


def test_a_file_that_shrank_is_named_with_its_tensor(path: Path) -> None:
    with FilePool() as pool:
        pool.read_bytes(spec(path, 0, 10))
        os.truncate(path, 50_000)
        with pytest.raises(FormatError, match=r"tensor 'x'.*up to 60000.*the end at 50000.*change"):
            pool.read_bytes(spec(path, 40_000, 20_000))


def test_a_disk_that_fails_is_an_access_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading.os, "preadv", fail)
    with FilePool() as pool, pytest.raises(AccessError, match=r"Input/output error.*the disk"):
        pool.read_bytes(spec(path, 0, 10))


def test_a_file_that_has_gone_is_an_input_error(tmp_path: Path) -> None:
    with FilePool() as pool, pytest.raises(InputError, match="no such file"):
        pool.read_bytes(spec(tmp_path / "gone", 0, 1))


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 11), (10, 1), (5, 6)])
def test_a_range_outside_the_tensor_is_refused(path: Path, offset: int, length: int) -> None:
    with FilePool() as pool, pytest.raises(ValueError, match="outside"):
        pool.read_into(spec(path, 50, 10), offset, bytearray(length))


def test_a_closed_pool_reads_no_more(path: Path) -> None:
    pool = FilePool()
    with pool:
        pool.read_bytes(spec(path, 0, 1))
    with pytest.raises(ValueError, match="closed"):
        pool.read_bytes(spec(path, 0, 1))
