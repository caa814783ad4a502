"""GGUF headers: where tensors lie, split files, and files that are not what they say."""

from __future__ import annotations

import builtins
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from regraft.errors import FormatError, InputError, MissingExtraError, UnsupportedError
from regraft.formats import gguf as reading
from regraft.formats.files.reading import FilePool
from regraft.formats.gguf import GgufArray, find_gguf, open_gguf
from regraft.testing.gguf_files import Array, blocks, write

rng = np.random.default_rng(0)


def tensors() -> dict[str, tuple[Array, str]]:
    values = rng.normal(size=(6, 256))
    types = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q6_K", "IQ4_XS")
    named = {f"blk.{i}.x.weight": (blocks(values, t, rng), t) for i, t in enumerate(types)}
    return named | {"norm.weight": (np.arange(5, dtype=np.float32), "F32")}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key("general.architecture", 8, text("llama"))


def info(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def craft(
    path: Path, keys: list[bytes], infos: list[bytes], data: int = 0, *, version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:  # fmt: skip
    """Write a file from its parts, sound or not."""
    there = counts or (len(infos), len(keys))
    raw = b"GGUF" + struct.pack("<IQQ", version, *there) + b"".join(keys + infos)
    path.write_bytes(raw + bytes(-len(raw) % 32) + bytes(data))
    return path


def test_tensors_lie_where_the_package_says(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", {"llama.block_count": 7}, tensors())
    found = open_gguf(path)
    theirs = gguf.GGUFReader(path)
    assert [(t.name, t.type, t.shape, t.stored.start, t.stored.nbytes)
            for t in found.tensors.values()] == [
        (t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    ]  # fmt: skip
    with FilePool() as files:
        for tensor in theirs.tensors:
            stored = files.read_bytes(found.tensors[tensor.name].stored)
            assert stored == tensor.data.tobytes()


def test_nothing_of_the_tensors_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((512, 8192), np.float32)
    path = write(tmp_path / "m.gguf", "llama", {}, {"w": (values, "F32")})
    taken = []
    real = reading.read_at

    def counting(fd: int, path: Path, position: int, length: int) -> bytes:
        taken.append(length)
        return real(fd, path, position, length)

    monkeypatch.setattr(reading, "read_at", counting)
    assert open_gguf(path).tensors["w"].shape == (512, 8192)
    assert sum(taken) <= 2**20


def test_metadata_has_its_values_and_long_arrays_are_read_when_asked(tmp_path: Path) -> None:
    tokens = [f"token {i} é" for i in range(9000)]
    metadata: dict[str, Any] = {
        "llama.block_count": 3, "llama.eps": 0.5, "some.flag": True, "general.name": "tiny",
        "some.sizes": [1, 2, 3], "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [i / 2 for i in range(9000)],
    }  # fmt: skip
    found = open_gguf(write(tmp_path / "m.gguf", "llama", metadata, tensors()))
    assert found.architecture == "llama"
    assert found.of_architecture("block_count") == 3
    assert found.of_architecture("nothing") is None
    assert found.metadata["llama.eps"] == 0.5
    assert found.metadata["some.flag"] is True
    assert found.metadata["some.sizes"] == (1, 2, 3)
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores"):
        array = found.metadata[name]
        assert isinstance(array, GgufArray)
        assert array.count == 9000
        assert array.values() == metadata[name]


def test_a_header_longer_than_a_piece_is_read(tmp_path: Path) -> None:
    tokens = ["x" * 90] * 40_000
    found = open_gguf(write(tmp_path / "m.gguf", "llama", {"t": tokens, "after": 1}, tensors()))
    assert found.metadata["after"] == 1
    assert found.metadata["t"].values() == tokens  # type: ignore[union-attr]
    assert found.tensors["norm.weight"].shape == (5,)


def split(folder: Path, count: int = 3) -> list[Path]:
    """Write a model in parts, as llama.cpp splits it."""
    items = list(tensors().items())
    paths = []
    for i in range(count):
        own = {"general.name": "whole"} if i == 0 else {}
        keys = {"split.no": i, "split.count": count, "split.tensors.count": len(items)} | own
        path = folder / f"m-{i + 1:05d}-of-{count:05d}.gguf"
        paths.append(write(path, "llama", keys, dict(items[i::count])))
    return paths


def test_a_split_model_is_opened_by_any_part(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in (*paths, find_gguf(tmp_path)):
        found = open_gguf(path)
        assert found.paths == tuple(paths)
        assert found.tensors.keys() == tensors().keys()
        assert found.metadata["general.name"] == "whole"
        assert {t.stored.path for t in found.tensors.values()} == set(paths)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003.gguf: a part of the model is missing"):
        open_gguf(paths[0])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    lone = split(tmp_path)[0].rename(tmp_path / "lone.gguf")
    with pytest.raises(InputError, match="is one part of a model, under a name"):
        open_gguf(lone)


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    write(paths[2], "llama", {"split.count": 3}, {"norm.weight": tensors()["norm.weight"]})
    with pytest.raises(FormatError, match=r"split.tensors.count: 7, as there are; found '8'"):
        open_gguf(paths[0])
    write(paths[2], "llama", {"split.count": 4}, {"other.weight": tensors()["norm.weight"]})
    with pytest.raises(FormatError, match=r"split.count: 3, as there are; found '4'"):
        open_gguf(paths[0])
    keys = {"split.count": 3}
    first = next(iter(open_gguf_names(paths[0])))
    items = {first: tensors()[first], "norm.weight": tensors()["norm.weight"]}
    write(paths[2], "llama", keys, items)
    with pytest.raises(FormatError, match="a tensor is in two parts"):
        open_gguf(paths[0])


def open_gguf_names(path: Path) -> list[str]:
    return [tensor.name for tensor in gguf.GGUFReader(path).tensors]


def test_a_folder_has_to_hold_one_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no GGUF model"):
        find_gguf(tmp_path)
    (tmp_path / "mmproj-a.gguf").touch()
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(InputError, match=r"which GGUF model is meant\?.*'a.gguf', 'b.gguf'"):
        find_gguf(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    few = dict(list(tensors().items())[-2:])
    metadata = {"llama.block_count": 1, "a.text": "hello", "a.list": [1, 2], "a.words": ["x", "y"]}
    raw = write(tmp_path / "m.gguf", "llama", metadata, few).read_bytes()
    end = open_gguf(tmp_path / "m.gguf").tensors["norm.weight"].stored
    path = tmp_path / "cut.gguf"
    for length in range(0, end.start + end.nbytes, 3):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_gguf(path)


@pytest.mark.slow
def test_a_file_with_any_byte_changed_opens_or_is_refused(tmp_path: Path) -> None:
    few = dict(list(tensors().items())[-2:])
    raw = write(tmp_path / "m.gguf", "llama", {"a.list": [1, 2], "b": ["x"]}, few).read_bytes()
    path = tmp_path / "changed.gguf"
    for at in range(open_gguf(tmp_path / "m.gguf").tensors["norm.weight"].stored.start):
        for value in (0, 9, 0xFF):
            path.write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
            with suppress(InputError):
                open_gguf(path)


HUGE = 2**64 - 1
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no GGUF": (lambda p: (p.write_bytes(b"version https://git-lfs"), p)[1], "begins with GGUF"),
    "empty": (lambda p: (p.write_bytes(b""), p)[1], "begins with GGUF"),
    "tensors": (lambda p: craft(p, [], [], counts=(HUGE, 0)), "at most 300000 tensors"),
    "keys": (lambda p: craft(p, [], [], counts=(0, HUGE)), "at most 100000 keys"),
    "more than fit": (lambda p: craft(p, [], [], counts=(200_000, 0)), "4800000 bytes of tensors"),
    "long key": (
        lambda p: craft(p, [struct.pack("<Q", HUGE) + b"abcdefgh"], []), f"{HUGE} bytes of a key"
    ),
    "key not UTF-8": (
        lambda p: craft(p, [struct.pack("<Q", 2) + b"\xff\xfe" + bytes(12)], []), "in UTF-8"
    ),
    "two of a key": (lambda p: craft(p, [ARCHITECTURE] * 2, []), "each key once"),
    "unknown value": (lambda p: craft(p, [key("a", 77, bytes(8))], []), "found type 77"),
    "long array": (
        lambda p: craft(p, [key("a", 9, struct.pack("<IQ", 10, 2**61))], []), "bytes of the array"
    ),
    "long words": (
        lambda p: craft(p, [key("a", 9, struct.pack("<IQ", 8, HUGE))], []), "bytes of the array"
    ),
    "long word": (
        lambda p: craft(p, [key("a", 9, struct.pack("<IQQ", 8, 1, HUGE))], []), "of the array"
    ),
    "array of arrays": (
        lambda p: craft(p, [key("a", 9, struct.pack("<IQ", 9, 1) + bytes(20))], []),
        "numbers or strings in the array",
    ),
    "no architecture": (lambda p: craft(p, [], []), "general.architecture"),
    "architecture a number": (
        lambda p: craft(p, [key("general.architecture", 4, bytes(4))], []), "general.architecture"
    ),
    "alignment": (
        lambda p: craft(p, [key("general.alignment", 4, struct.pack("<I", 12))], []), "power of two"
    ),
    "dimensions": (lambda p: craft(p, [ARCHITECTURE], [info("a", (1,) * 5)]), "at most 4 dim"),
    "elements": (
        lambda p: craft(p, [ARCHITECTURE], [info("a", (2**40, 2**40))]), "fewer than 2.63 elements"
    ),
    "beyond the end": (
        lambda p: craft(p, [ARCHITECTURE], [info("a", (9,))], 32), "bytes inside the file"
    ),
    "offset beyond the end": (
        lambda p: craft(p, [ARCHITECTURE], [info("a", (1,), 0, 2**63)], 32), "inside the file"
    ),
    "offset not aligned": (
        lambda p: craft(p, [ARCHITECTURE], [info("a", (1,), 0, 4)], 32), "multiple of 32"
    ),
    "overlap": (
        lambda p: craft(p, [ARCHITECTURE], [info("a", (9,)), info("b", (9,), 0, 32)], 96),
        "bytes of its own",
    ),
    "two of a name": (
        lambda p: craft(p, [ARCHITECTURE], [info("a", (1,)), info("a", (1,), 0, 32)], 64),
        "each name once; found it twice",
    ),
    "unsafe name": (lambda p: craft(p, [ARCHITECTURE], [info("../a", (1,))], 32), "printable text"),
    "unknown type": (lambda p: craft(p, [ARCHITECTURE], [info("a", (1,), 99)], 32), "type 99"),
    "part of a block": (
        lambda p: craft(p, [ARCHITECTURE], [info("a", (33,), 8)], 64), "whole blocks of 32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path: Path, case: str) -> None:
    build, message = HOSTILE[case]
    path = build(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=message):
        open_gguf(path)


def test_all_bad_tensors_are_named(tmp_path: Path) -> None:
    bad = [info("a", (9,), 0, 0), info("b", (1,), 99, 64), info("c", (33,), 8, 96)]
    with pytest.raises(FormatError) as caught:
        open_gguf(craft(tmp_path / "m.gguf", [ARCHITECTURE], bad, 64))
    path = tmp_path / "m.gguf"
    assert [problem.where for problem in caught.value.problems] == [
        f"{path}, tensor 'b'", f"{path}, tensor 'c'",
    ]  # fmt: skip


@pytest.mark.parametrize("version", [1, 4, 0x03000000])
def test_other_versions_are_refused(tmp_path: Path, version: int) -> None:
    path = craft(tmp_path / "m.gguf", [ARCHITECTURE], [], version=version)
    with pytest.raises(UnsupportedError, match="version 2 or 3, little-endian"):
        open_gguf(path)


def test_an_alignment_of_its_own_is_kept_to(tmp_path: Path) -> None:
    aligned = key("general.alignment", 4, struct.pack("<I", 8))
    path = tmp_path / "m.gguf"
    raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + ARCHITECTURE + aligned + info("a", (2,))
    path.write_bytes(raw + bytes(-len(raw) % 8) + struct.pack("<2f", 1, 2))
    with FilePool() as files:
        assert files.read_bytes(open_gguf(path).tensors["a"].stored) == struct.pack("<2f", 1, 2)


def test_no_file_is_no_format_error(tmp_path: Path) -> None:
    for name in ("m.gguf", "m-00001-of-00002.gguf"):
        with pytest.raises(InputError, match="no such file"):
            open_gguf(tmp_path / name)


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf", "llama", {}, tensors())
    real = builtins.__import__

    def fail(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(MissingExtraError, match=r"pip install 'regraft\[gguf\]'"):
        open_gguf(path)
