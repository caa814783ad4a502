"""The cap on memory holds for tensors far larger than it, and a step that cannot fit says so."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from merging.processes import environment
from regraft.errors import MemoryCapError
from regraft.quant.formats.bitsandbytes import NF4
from regraft.quant.registry import maker_of
from regraft.system.memory import peak_memory
from regraft.tensors import TensorSpec, nbytes_of
from temp_root import on_disk

MIB = 2**20

MEASURE = """
import ctypes, json, mmap, os, sys, traceback
import numpy as np
import regraft
from regraft import dequantize, merge, quantize, swap, unmerge
from regraft.merging import building, finalize

PAGE = mmap.PAGESIZE

def memory(which):
    for line in open("/proc/self/status"):
        if line.startswith(which):
            return int(line.split()[1]) * 1024

def pages_of_files():
    for line in open("/proc/self/maps"):
        ends, modes, _, _, _, *path = line.split()
        if path and path[0].startswith("/") and modes.startswith("r"):
            start, end = (int(each, 16) for each in ends.split("-"))
            with open("/proc/self/pagemap", "rb") as pages:
                pages.seek(start // PAGE * 8)
                there = np.frombuffer(pages.read((end - start) // PAGE * 8), np.uint64) >> 63
            yield from (start + there.nonzero()[0] * PAGE).tolist()

def measured(name, arguments, options):
    for page in looked_at:
        ctypes.string_at(page, 1)
    unseen = max(0, resident - memory("VmRSS:"))
    done = getattr(regraft, name)(*arguments, **options)
    reported = done.peak_memory if name == "unmerge" else done.totals.peak_memory
    return {"peak": memory("VmHWM:") + unseen, "reported": reported}

looked_at = [*pages_of_files()]
for line in sys.stdin:
    wish = json.loads(line)
    resident = memory("VmRSS:")
    reader, writer = os.pipe()
    if not os.fork():
        try:
            os.write(writer, json.dumps(measured(**wish)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        print(file.read(), flush=True)
    os.wait()
"""
"""Answers calls, each done in a child of a process that has imported regraft and done nothing else.

A child has the memory of such a process, but for the pages of libraries: it looks at those at which
the process has looked.
"""


def write_sparse(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Write a base whose tensors are all zeros and take no room on the disk."""
    folder.mkdir(parents=True)
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


def peak_of(base: Path, adapter: Path, out: Path, cap: int, threads: str = "3") -> int:
    """Merge in a fresh process; return the most memory it ever had resident, in bytes."""
    return peak_of_call("merge", base, adapter, out, cap=cap, threads=threads)


def peak_of_call(name: str, *arguments: Path, cap: int, threads: str = "3", **options: Any) -> int:
    """Do what is named in a fresh process; return the most memory it ever had, in bytes."""
    process = _measuring()
    assert process.stdin is not None
    assert process.stdout is not None
    options = {**options, "max_memory": str(cap), "threads": int(threads)}
    wish = {"name": name, "arguments": [*map(str, arguments)], "options": options}
    process.stdin.write(f"{json.dumps(wish)}\n")
    process.stdin.flush()
    found = json.loads(process.stdout.readline())
    assert found["reported"] <= found["peak"]
    return int(found["peak"])


@cache
def _measuring() -> subprocess.Popen[str]:
    """Return the process whose children are measured; it ends with its standard input."""
    return subprocess.Popen(
        [sys.executable, "-c", MEASURE], env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    """Have the process whose children are measured end with the last test."""
    yield
    if _measuring.cache_info().currsize:
        _measuring().communicate()
        _measuring.cache_clear()


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a folder on the disk: files in memory would take the memory that is measured."""
    with on_disk() as folder:
        yield folder


@pytest.fixture(scope="module")
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have the kernels compiled and kept on the disk, so that no compiler is in the figures."""
    folder = tmp_path_factory.mktemp("compiled")
    regraft.merge(toys.write_base(folder / "b"), toys.write_adapter(folder / "a"), folder / "o")


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
def test_tensors_larger_than_the_cap_are_merged_within_it(tmp_path: Path) -> None:
    rows, columns, cap = 8192, 7680, 224 * MIB
    base = write_sparse(
        tmp_path / "base",
        {
            "big.weight": ("F32", (rows, columns)),
            "copied": ("BF16", (30000, 4096)),
            "table.weight": ("BF16", (60000, 2048)),
        },
    )
    for spec in regraft.plan(base, toys.write_adapter(tmp_path / "a", _big(rows, columns),
                                                      **BIG_CONFIG)).steps:  # fmt: skip
        assert spec.source.nbytes > cap
    peak = peak_of(base, tmp_path / "a", tmp_path / "out", cap)
    assert peak <= cap
    merged = np.memmap(tmp_path / "out" / "model.safetensors", np.uint8, "r")
    spec = _spec(tmp_path / "out" / "model.safetensors", "big.weight")
    found = merged[spec.start :][: spec.nbytes].view(np.float32).reshape(rows, columns)
    factors = _big(rows, columns)
    b, a = (factors[f"{toys.PREFIX}big.lora_{side}.weight"] for side in "BA")
    np.testing.assert_allclose(found[[0, -1]], 2 * b[[0, -1]] @ a, rtol=1e-4, atol=1e-6)


BIG_CONFIG: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["big", "table"]}


def _big(rows: int, columns: int) -> dict[str, np.ndarray]:
    """Return an adapter for the big tensors; DoRA on the table, whose norms need all its rows."""
    return {
        **toys.lora("big", rows, columns, 16),
        **toys.embedding("table", 60000, 2048, 16),
        f"{toys.PREFIX}table.lora_magnitude_vector": toys.draw(2048),
    }


def _spec(path: Path, name: str) -> TensorSpec:
    from regraft.formats.safetensors import read_header

    return read_header(path).tensors[name]


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
def test_a_cap_too_small_names_the_one_that_works(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "adapter")
    with pytest.raises(MemoryCapError, match="--max-memory") as caught:
        regraft.merge(base, adapter, tmp_path / "out", max_memory="64MiB")
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 4
    assert problem.expected == "at most 64 MiB (--max-memory)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    (needed,) = re.findall(r"--max-memory (\d+MiB)", problem.hint)
    assert problem.found == needed.replace("MiB", " MiB")
    just_below = int(needed.removesuffix("MiB")) - 1
    with pytest.raises(MemoryCapError):
        regraft.plan(base, adapter, max_memory=f"{just_below}MiB")
    assert (
        peak_of(base, adapter, tmp_path / "out", int(needed[:-3]) * MIB) <= (just_below + 1) * MIB
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
def test_the_step_that_needs_most_is_named_and_fits_the_cap_it_asks_for(tmp_path: Path) -> None:
    tensors = {"small.weight": toys.draw(64, 64), "large.weight": toys.draw(1024, 1024)}
    base = toys.write_base(tmp_path / "base", tensors, None)
    factors = {**toys.lora("small", 64, 64), **toys.lora("large", 1024, 1024)}
    adapter = toys.write_adapter(
        tmp_path / "a", factors, init_lora_weights="pissa", target_modules=["small", "large"]
    )
    cap = cap_asked_for(base, adapter, r"^large\.weight: ")
    assert peak_of(base, adapter, tmp_path / "out", cap) <= cap


def cap_asked_for(base: Path, adapter: Path, where: str | None = None) -> int:
    """Return the bytes that the error for a cap of 200 MiB says are needed."""
    with pytest.raises(MemoryCapError, match=where) as caught:
        regraft.plan(base, adapter, max_memory="200MiB")
    (needed,) = re.findall(r"--max-memory (\d+)MiB$", caught.value.problems[0].hint)
    return int(needed) * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("threads", ["1", "3"])
def test_large_factors_fit_the_cap_they_ask_for(tmp_path: Path, threads: str) -> None:
    rows, rank = 120_000, 64
    tables = {f"table{number}": (rows, 16) for number in range(2)}
    base = write_sparse(
        tmp_path / "base", {f"{name}.weight": ("BF16", shape) for name, shape in tables.items()}
    )
    factors = {
        key: value for name in tables for key, value in toys.embedding(name, rows, 16, rank).items()
    }
    adapter = toys.write_adapter(tmp_path / "a", factors, r=rank, target_modules=list(tables))
    cap = cap_asked_for(base, adapter)
    assert peak_of(base, adapter, tmp_path / "out", cap, threads) <= cap


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
def test_a_model_of_very_many_tensors_is_counted(tmp_path: Path) -> None:
    few = {"l.weight": ("F32", (4, 4))}
    many = {f"model.layers.{number}.x.weight": ("BF16", (2, 2)) for number in range(5_000)}
    adapter = toys.write_adapter(tmp_path / "a", toys.lora("l", 4, 4), target_modules=["l"])
    small, large = (write_sparse(tmp_path / n, t) for n, t in (("few", few), ("many", few | many)))
    cap = cap_asked_for(large, adapter)
    assert cap > cap_asked_for(small, adapter) + 16 * MIB
    assert peak_of(large, adapter, tmp_path / "out", cap) <= cap


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
def test_the_way_back_and_the_way_over_stay_within_the_cap_too(tmp_path: Path) -> None:
    """The longer test, with tensors ten times as large as the cap, is scripts/torture/kills."""
    rows, columns, cap = 36_000, 4096, 272 * MIB
    base = write_sparse(
        tmp_path / "base",
        {"big.weight": ("BF16", (rows, columns)), "saved.weight": ("BF16", (6_000, columns))},
    )
    saved = {f"{toys.PREFIX}saved.weight": toys.draw(6_000, columns)}
    for number, name in enumerate(("one", "two")):
        factors = toys.lora("big", rows, columns, 8, seed=number)
        modules = {"target_modules": ["big"], "modules_to_save": ["saved"], "r": 8}
        toys.write_adapter(tmp_path / name, {**factors, **saved}, **modules)
    merged, back = tmp_path / "merged", tmp_path / "back"
    assert base.joinpath("model.safetensors").stat().st_size > cap
    peaks = [
        peak_of_call("merge", base, tmp_path / "one", merged, cap=cap),
        peak_of_call("unmerge", merged, back, cap=cap),
        peak_of_call("swap", merged, tmp_path / "two", tmp_path / "swapped", cap=cap),
    ]
    assert max(peaks) <= cap
    undo = merged / "regraft" / "undo"
    assert sum(path.stat().st_size for path in undo.rglob("*") if path.is_file()) > 80 * MIB
    with (
        (base / "model.safetensors").open("rb") as old,
        (back / "model.safetensors").open("rb") as new,
    ):
        while piece := old.read(2**24):
            assert new.read(2**24) == piece
        assert not new.read(1)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
def test_going_on_stays_within_the_cap(tmp_path: Path) -> None:
    """What an earlier try did is read again to see that it is all there."""
    cap = 224 * MIB
    base = write_sparse(
        tmp_path / "base", {"copied": ("BF16", (64, 2**21)), "small.weight": ("F32", (64, 64))}
    )
    adapter = toys.write_adapter(
        tmp_path / "a", toys.lora("small", 64, 64), target_modules=["small"]
    )

    def progress(event: regraft.ProgressEvent) -> None:
        if event.stage == "finish":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regraft.merge(base, adapter, tmp_path / "out", progress=progress)
    assert (tmp_path / ".out.regraft").exists()
    assert peak_of(base, adapter, tmp_path / "out", cap) <= cap


def test_threads_are_given_up_before_the_cap_is_broken(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "adapter")
    tight = regraft.plan(base, adapter, max_memory="220MiB", threads=64)
    ample = regraft.plan(base, adapter, max_memory="8GiB", threads=64)
    assert (tight.threads < 64, ample.threads) == (True, 64)
    assert tight.memory <= 220 * MIB < ample.memory


def test_memory_is_told_where_the_system_does_not_list_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = peak_memory()

    def read_text(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_text", read_text)
    assert usual // 2 < peak_memory() < 8 * usual


# -- quantized weights -----------------------------------------------------------------------------


def write_nf4_sparse(
    folder: Path, weights: dict[str, tuple[int, int]],
    plain: dict[str, tuple[str, tuple[int, ...]]], dtype: str = "BF16",
) -> None:  # fmt: skip
    """Write weights in codes that are all zeros, with some scales, and plain zeros."""
    maker = maker_of("nf4", dtype=dtype)
    found = {o.name: (o.dtype, o.shape) for n, s in weights.items() for o in maker.outputs(n, s)}
    write_sparse(folder, found | plain)
    with (folder / "model.safetensors").open("r+b") as file:
        for name, shape in weights.items():
            for role, data in (
                ("quant_map", NF4.values.tobytes()),
                ("quant_state.bitsandbytes__nf4", maker.state(shape, None)),
            ):
                file.seek(_spec(folder / "model.safetensors", f"{name}.{role}").start)
                file.write(data)
            write_scales(folder, f"{name}.absmax")


def write_scales(folder: Path, name: str, scale: float = 1) -> None:
    """Set the scales of a weight; the first eighth stays zeros, whose codes nobody can tell."""
    spec = _spec(folder / "model.safetensors", name)
    scales = np.full(spec.nbytes // 4, scale, np.float32)
    scales[: scales.size // 8] = 0
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(spec.start)
        file.write(scales.tobytes())


def write_quantized_sparse(
    folder: Path, kind: str, rows: int, columns: int, dtype: str = "BF16"
) -> Path:
    """Write one huge weight in codes that are all zeros, with some scales."""
    name = "layers.0.big.weight"
    if kind == "int8":
        parts = {name: ("I8", (rows, columns)), "layers.0.big.SCB": ("F32", (rows,))}
        write_sparse(folder, parts)
        write_scales(folder, "layers.0.big.SCB", 127)
        settings: dict[str, Any] = {"load_in_8bit": True}
    else:
        write_nf4_sparse(folder, {name: (rows, columns)}, {}, dtype)
        settings = {"load_in_4bit": True}
    config = {"dtype": TORCH_NAMES[dtype], "quantization_config": settings | {"quant_method": BNB}}
    toys.write_json(folder / "config.json", config)
    return folder


BNB = "bitsandbytes"
TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32"}
WIDE = 600_001
"""Columns of a row of float32 that is larger than the largest tile."""


@pytest.fixture(scope="module")
def _coded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have the kernels of quantized weights compiled, too."""
    folder = tmp_path_factory.mktemp("coded")
    adapter = toys.write_adapter(folder / "a")
    for to in ("nf4", "int8"):
        regraft.quantize(toys.write_base(folder / f"b{to}"), folder / to, to)
        regraft.merge(folder / to, adapter, folder / f"k{to}", quantize="keep")
        regraft.dequantize(folder / to, folder / f"d{to}")


CALLS: dict[str, dict[str, Any]] = {
    "dequantize": {}, "merge out": {"undo": False}, "merge keep": {"quantize": "keep"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("_coded")
@pytest.mark.parametrize(("kind", "dtype", "rows", "columns", "cap"), [
    ("nf4", "BF16", 7_600, 16_384, 232), ("nf4", "F32", 126, WIDE, 288),
    ("int8", "F32", 126, WIDE, 288),
])  # fmt: skip
def test_quantized_weights_larger_than_the_cap(
    tmp_path: Path, kind: str, dtype: str, rows: int, columns: int, cap: int
) -> None:
    """Out, kept, and back; also where a row is more than a tile and ends inside a byte."""
    cap *= MIB
    base = write_quantized_sparse(tmp_path / "base", kind, rows, columns, dtype)
    factors = toys.lora("layers.0.big", rows, columns, 2)
    adapter = toys.write_adapter(
        tmp_path / "a", factors, r=2, lora_alpha=0.05, target_modules=["big"]
    )  # steps of a code or two: what goes further takes ten times as long, and no more memory
    assert nbytes_of(dtype, (rows, columns)) > cap
    for name, options in CALLS.items():
        verb = name.partition(" ")[0]
        inputs = [base] if verb == "dequantize" else [base, adapter]
        peak = peak_of_call(verb, *inputs, tmp_path / name, cap=cap, **options)
        assert peak <= cap, name
    assert peak_of_call("unmerge", tmp_path / "merge keep", tmp_path / "back", cap=cap) <= cap
    found, expected = (
        np.memmap(tmp_path / folder / "model.safetensors", np.uint8, "r")
        for folder in ("back", "base")
    )
    assert np.array_equal(found[: 64 * MIB], expected[: 64 * MIB])


@pytest.mark.slow
@pytest.mark.usefixtures("_coded")
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_plain_weights_larger_than_the_cap_are_quantized_within_it(tmp_path: Path, to: str) -> None:
    cap = 288 * MIB
    base = write_sparse(tmp_path / "base", {"layers.0.big.weight": ("F32", (126, WIDE))})
    assert peak_of_call("quantize", base, tmp_path / "out", cap=cap, to=to) <= cap


def test_rows_that_cannot_be_cut_are_counted(tmp_path: Path) -> None:
    """Codes of two rows share a byte, so that both have to be in memory at once."""
    base = write_quantized_sparse(tmp_path / "base", "nf4", 4, 4_000_001)
    factors = toys.lora("layers.0.big", 4, 4_000_001, 2)
    adapter = toys.write_adapter(tmp_path / "a", factors, r=2, target_modules=["big"])
    with pytest.raises(MemoryCapError, match="--max-memory") as caught:
        regraft.plan(base, adapter, quantize="keep", max_memory="288MiB")
    (needed,) = re.findall(r"--max-memory (\d+MiB)", caught.value.problems[0].hint)
    assert regraft.plan(base, adapter, quantize="keep", max_memory=needed).threads == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_coded")
def test_experts_that_are_turned_fit_the_cap_they_ask_for(tmp_path: Path) -> None:
    """One expert is more than what is turned at a time, and as much as the room that is asked."""
    experts, sizes = "model.layers.0.mlp.experts", {"gate_up": (4096, 4608), "down": (4608, 2048)}
    weights = {f"{experts}.{n}_projs.{e}.weight": s for n, s in sizes.items() for e in range(2)}
    biases = {
        name.replace(".weight", ".bias"): ("BF16", shape[:1]) for name, shape in weights.items()
    }
    write_nf4_sparse(tmp_path / "base", weights, biases)
    config = {
        "architectures": ["GptOssForCausalLM"], "num_local_experts": 2,
        "quantization_config": {"load_in_4bit": True, "quant_method": BNB},
    }  # fmt: skip
    toys.write_json(tmp_path / "base" / "config.json", config)
    factors = toys.lora(f"{experts}.down_projs.1", 4608, 2048)
    adapter = toys.write_adapter(tmp_path / "a", factors, target_modules=["down_projs.1"])
    with pytest.raises(MemoryCapError) as caught:
        regraft.plan(tmp_path / "base", adapter, max_memory="240MiB")
    (needed,) = re.findall(r"--max-memory (\d+)MiB$", caught.value.problems[0].hint)
    cap = int(needed) * MIB
    inputs = (tmp_path / "base", adapter, tmp_path / "out")
    assert peak_of_call("merge", *inputs, cap=cap, undo=False) <= cap
