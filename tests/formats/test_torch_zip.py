"""PyTorch's zip files are located, not loaded: offsets hold the bytes, and odd tensors fail."""

from __future__ import annotations

import os
import pickle
import random
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from regraft.errors import FormatError, UnsupportedError
from regraft.formats.files.reading import FilePool
from regraft.formats.torch_zip import read_torch_file
from regraft.tensors import BY_CONFIG_NAME, TensorSpec


def save(folder: Path, value: Any, name: str = "pytorch_model.bin") -> Path:
    path = folder / name
    torch.save(value, path)
    return path


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def assert_located(specs: dict[str, TensorSpec], path: Path) -> None:
    """Every spec's bytes are those of the tensor that PyTorch loads."""
    loaded = torch.load(path, "cpu", weights_only=True)
    assert set(specs) == set(loaded)
    with FilePool() as pool:
        for name, tensor in loaded.items():
            spec = specs[name]
            assert (spec.name, spec.path, spec.shape) == (name, path, tuple(tensor.shape))
            assert BY_CONFIG_NAME[str(tensor.dtype)[6:]].name == spec.dtype
            assert pool.read_bytes(spec) == raw(tensor)


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(64, generator=generator)
    return {
        "bf16": torch.randn(33, 5, generator=generator).bfloat16(),
        "fp16": torch.randn(4, 4, generator=generator).half(),
        "fp32": torch.randn(7, 3, generator=generator),
        "fp64": torch.randn(3, generator=generator).double(),
        "int64": torch.arange(9),
        "int8": torch.arange(9, dtype=torch.int8),
        "bool": torch.tensor([True, False, True]),
        "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "whole": shared,
        "view": shared[8:24].view(4, 4),
        "tied": shared,
    }


def test_every_tensor_lies_where_the_spec_says(
    tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    path = save(tmp_path, OrderedDict(values))
    specs = read_torch_file(path)
    assert_located(specs, path)
    assert [spec.start for spec in specs.values()] == sorted(s.start for s in specs.values())
    assert specs["tied"].start == specs["whole"].start
    assert specs["view"].start == specs["whole"].start + 8 * 4


def test_tensors_of_a_gpu_are_located_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    path = save(tmp_path, {"a": torch.arange(5.0)})
    monkeypatch.undo()
    with FilePool() as pool:
        assert pool.read_bytes(read_torch_file(path)["a"]) == raw(torch.arange(5.0))


def test_a_file_larger_than_memory_is_located(tmp_path: Path) -> None:
    with FakeTensorMode():
        tensors = {"huge": torch.empty(2**36, dtype=torch.int8), "after": torch.empty(3)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        path = save(tmp_path, tensors)  # a file of holes: 64 GiB long, a few blocks on disk
    specs = read_torch_file(path)
    assert specs["huge"].nbytes == 2**36
    offset = torch._C.PyTorchFileReader(str(path)).get_record_offset("data/1")
    assert specs["after"].start == offset > 2**36


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path, {"a": Attack()})
    with pytest.raises(FormatError, match="tensors only"):
        read_torch_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"state_dict": {"a": torch.ones(2)}}, "a dict under 'state_dict'"),
        ({"a": torch.ones(2), "epoch": 3}, "a int under 'epoch'"),
        ({0: torch.ones(2)}, "under"),
        ([torch.ones(2)], "a list"),
    ],
)
def test_anything_but_a_flat_dict_is_refused(tmp_path: Path, value: Any, found: str) -> None:
    with pytest.raises(FormatError, match=f"not a plain state dict.*{found}"):
        read_torch_file(save(tmp_path, value))


def test_tensors_that_are_no_plain_bytes_are_all_named(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        {
            "fine": torch.ones(2),
            "transposed": torch.ones(4, 6).t(),
            "expanded": torch.ones(1, 4).expand(3, 4),
            "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
            "sparse": torch.eye(3).to_sparse(),
            "complex": torch.ones(3, dtype=torch.complex128),
            "../outside": torch.ones(1),
        },
    )
    with pytest.raises(FormatError) as caught:
        read_torch_file(path)
    assert [problem.where for problem in caught.value.problems] == [
        f"{path}, tensor '{name}'"
        for name in ("transposed", "expanded", "conjugated", "sparse", "complex", "../outside")
    ]


def test_the_format_before_1_6_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"before version 1.6.*save it as safetensors"):
        read_torch_file(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"version https://git-lfs", b"\x00" * 100])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not a PyTorch file"):
        read_torch_file(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FormatError, match="not a sound zip"):
        read_torch_file(path)


def rewrite(path: Path, change: Any, **options: Any) -> Path:
    """Write a zip anew, with ``change`` applied to (name, content) of each record."""
    changed = path.with_name("changed.bin")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w", **options) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return changed


def test_a_zip_that_was_packed_again_without_compression_is_located(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.arange(5.0), "b": torch.arange(3)})

    def without_hints(name: str, content: bytes) -> tuple[str, bytes]:
        return (name.replace(".format_version", "ignored"), content)

    changed = rewrite(path, without_hints)
    assert_located(read_torch_file(changed), changed)


def test_a_zip_whose_records_moved_is_read_where_they_are(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.arange(5.0), "b": torch.arange(3)})
    changed = rewrite(path, lambda name, content: (name, content))
    with FilePool() as pool:
        assert pool.read_bytes(read_torch_file(changed)["a"]) == raw(torch.arange(5.0))


def test_checksums_that_were_never_computed_do_not_matter(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, {"a": torch.arange(5.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert_located(read_torch_file(path), path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.zeros(1000)})
    changed = rewrite(path, lambda name, content: (name, content), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="a plain record; found a compressed"):
        read_torch_file(changed)


def test_big_endian_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.zeros(3)})

    def big(name: str, content: bytes) -> tuple[str, bytes]:
        return name, b"big" if name.endswith("/byteorder") else content

    with pytest.raises(UnsupportedError, match=r"big-endian.*found 'big'"):
        read_torch_file(rewrite(path, big))


def test_a_storage_smaller_than_its_tensor_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.arange(5.0)})

    def cut(name: str, content: bytes) -> tuple[str, bytes]:
        short = content[:8] if name.endswith("data/0") else content
        return name.replace(".format_version", "ignored"), short

    with pytest.raises(FormatError, match=r"tensor 'a'.*20 bytes in data/0; found 8 bytes"):
        read_torch_file(rewrite(path, cut))


def test_a_record_named_twice_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.arange(5.0)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], pickle.dumps({}))
    with pytest.raises(FormatError, match="names a record twice"):
        read_torch_file(path)


def test_a_tar_archive_and_a_program_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.bin", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    with pytest.raises(UnsupportedError, match=r"before version 0.1.10.*a tar archive"):
        read_torch_file(tmp_path / "old.bin")
    path = save(tmp_path, {"a": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pytorch_model/constants.pkl", b"")
    with pytest.raises(UnsupportedError, match=r"TorchScript program.*torch.jit.load"):
        read_torch_file(path)


def test_what_a_models_state_dict_carries_beside_tensors_is_passed_over(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    path = save(tmp_path, model.state_dict())
    assert b"_metadata" in path.read_bytes()
    assert_located(read_torch_file(path), path)
    parameters = dict(model.named_parameters())
    parameters["0.weight"].note = "an attribute"
    noted = torch.ones(3)
    noted.note = [1, {"x": 2}]
    path = save(tmp_path, {**parameters, "noted": noted})
    assert_located(read_torch_file(path), path)


def pickled(folder: Path, program: bytes) -> Path:
    """Write a file whose pickle is given, instruction by instruction."""
    path = save(folder, {"a": torch.ones(2)})
    return rewrite(path, lambda name, old: (name, program if name.endswith("data.pkl") else old))


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (b"cos\nsystem\n(U\x04trueltR.", "the Python object os.system"),
        (b"ctorch._utils\n_import_dotted_name\n.", "_import_dotted_name"),
        (b"X\xff\xff\xff\xffabc.", "the end inside an instruction"),
        (b"\x8b\xff\xff\xff\x7f.", "which no tensor needs"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "which no tensor needs"),
        (b"h\x00.", "damaged"),
        (b"K\x01K\x02\x87.", "a tuple of more values"),
        (b"}]K\x01s.", "a dict with a list as a key"),
        (b"}\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x1fNs.", "a dict with a int as a key"),
        (b"N" * 100, "damaged"),
        (b"(" * 1001, "nested more than 1000 deep"),
        (b"N" * 2_000_001, "more than 2000000 instructions"),
        (b"]q\x00" + b"(" * 20 + b"h\x00K\x01a." , "belong to nothing"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "damaged"),
        (b"", "damaged"),
    ],
)  # fmt: skip
def test_a_pickle_that_asks_for_more_than_tensors_is_refused(
    tmp_path: Path, program: bytes, found: str
) -> None:
    path = pickled(tmp_path, b"\x80\x02" + program)
    with pytest.raises(FormatError, match=found):
        read_torch_file(path)


def test_a_pickle_that_asks_for_memory_does_not_get_it(tmp_path: Path) -> None:
    path = pickled(tmp_path, b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="a bytearray"):
            read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_lists_that_are_copied_again_and_again_run_out_of_steps(tmp_path: Path) -> None:
    pairs = b"(" + b"U\x01xN\x86" * 50_000 + b"t"
    copies = b"ccollections\nOrderedDict\nh\x00\x85R" * 1000
    path = pickled(tmp_path, pairs + b"q\x00" + copies + b".")
    begin = time.process_time()
    with pytest.raises(FormatError, match="more than 2000000 instructions"):
        read_torch_file(path)
    assert time.process_time() - begin < 10


def outcome_of(load: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except Exception as error:
        return error


@pytest.mark.slow
def test_a_damaged_pickle_is_refused_or_read_as_pytorch_reads_it(
    tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    path = save(tmp_path, OrderedDict(values))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        content = archive.read("pytorch_model/data.pkl")
    start = whole.index(content)
    rng = random.Random(0)
    agreed = 0
    for _ in range(1000):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            changed[start + rng.randrange(len(content))] = rng.choice(
                (rng.randrange(256), *content[rng.randrange(len(content)) :][:1])
            )
        path.write_bytes(changed)
        specs = outcome_of(lambda: read_torch_file(path))
        if isinstance(specs, dict):
            theirs = outcome_of(lambda: torch.load(path, "cpu", weights_only=True))
            if isinstance(theirs, dict):  # PyTorch minds more of what is not needed
                assert_located(specs, path)
                agreed += 1
        else:
            assert isinstance(specs, FormatError | UnsupportedError), specs
    assert agreed > 20


def test_a_zip_of_a_version_that_nobody_reads_is_refused(
    tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    path = save(tmp_path, values)
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\1\2") + 6] = 99
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not a sound zip"):
        read_torch_file(path)


def test_a_pickle_that_leaves_values_behind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}}.")
        archive.writestr("a/byteorder", "little")
    with pytest.raises(FormatError, match="belong to nothing"):
        read_torch_file(path)


def test_the_name_of_a_record_cannot_steer_a_terminal(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.zeros(2)})
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            key = b"X\x01\x00\x00\x000"
            archive.writestr(name, content.replace(key, key[:-1] + b"\x1b"))
    with pytest.raises(FormatError, match="its storage is not in the zip") as caught:
        read_torch_file(path)
    assert "data/\\x1b" in str(caught.value)
    assert str(caught.value).isprintable()


def test_one_storage_under_two_dtypes_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.int32)})
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000"))
    with pytest.raises(FormatError, match="one storage under two dtypes"):
        read_torch_file(path)
