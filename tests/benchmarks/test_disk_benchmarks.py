"""The benchmarks of the disk: shapes are the published ones, probes find what they probe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import regraft
from mounting import mounted

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "layers": 2, "hidden": 256, "experts": 4, "expert_width": 128, "dense_width": 384,
    "vocabulary": 300, "heads": 2, "q_rank": 128, "kv_rank": 128, "nope": 64, "rope": 64,
    "value": 64,
}  # fmt: skip
"""Kimi K2, small; a matrix is a few blocks of scales."""


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the modules of the benchmarks at hand, here and in child processes."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(regraft.__file__).parents[1]}")


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that shares blocks."""
    with mounted(["mkfs.xfs", "-q"], tmp_path_factory.mktemp("xfs"), 400 * 2**20) as place:
        yield place


def test_the_huge_model_has_the_tensors_of_the_published_one() -> None:
    """Their number, their values and their bytes are those of moonshotai/Kimi-K2-Instruct."""
    from benchmarks.huge.kimi import Kimi

    files = Kimi("fp8").files()
    tensors = [tensor for each in files.values() for tensor in each]
    assert len(files) == 61
    assert len(tensors) == 139_644
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 1_026_470_731_056
    assert f"{sum(tensor.nbytes for tensor in tensors) / 2**30:.2f}" == "958.49"
    of_name = {
        tensor.name: (tensor.dtype, tensor.shape) for tensor in files["model-2-of-61.safetensors"]
    }
    layer = "model.layers.1"
    assert of_name[f"{layer}.self_attn.o_proj.weight"] == ("F8_E4M3", (7168, 8192))
    assert of_name[f"{layer}.self_attn.o_proj.weight_scale_inv"] == ("F32", (56, 64))
    assert of_name[f"{layer}.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", (5, 56))
    assert of_name[f"{layer}.mlp.experts.383.down_proj.weight"] == ("F8_E4M3", (7168, 2048))
    assert of_name[f"{layer}.mlp.gate.e_score_correction_bias"] == ("F32", (384,))
    plain = [tensor for each in Kimi("bf16").files().values() for tensor in each]
    assert {tensor.dtype for tensor in plain} == {"BF16", "F32"}
    assert len(plain) == 70_036


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_a_huge_merge_is_measured(xfs: Path, format: str) -> None:
    from benchmarks.huge.figures import figures_of
    from benchmarks.huge.kimi import Kimi
    from benchmarks.huge.measure import measure

    place = xfs / format
    place.mkdir()
    kimi = Kimi(format, **SMALL)
    found = measure(place, kimi, 1, lambda _: None)
    assert not (place / "out").exists()
    assert 0 < found.unmerge.disk < 3 * found.changed + 2**20
    assert found.tensors == sum(len(tensors) for tensors in kimi.files().values())
    names = [figure.name for figure in figures_of(found)]
    assert len(names) == len({*names}) == 7
    report = regraft.check(place / "model" / "base", place / "model" / "adapter")
    assert report.ok


def test_every_probe_of_the_profile_is_there() -> None:
    from benchmarks.merge.profile_merge import PROBES, resolve

    for _, place in PROBES:
        owner, name = resolve(place)
        assert callable(getattr(owner, name))


@pytest.mark.slow
def test_every_phase_of_a_merge_is_profiled(tmp_path: Path) -> None:
    from benchmarks.merge.profile_merge import PROBES

    script = ROOT / "benchmarks" / "shared" / "synthetic.py"
    made = [sys.executable, str(script), "--out", str(tmp_path), "--shape", "tiny"]
    subprocess.run(made, check=True)
    names = [tmp_path / name for name in ("base", "adapter", "out")]
    command = [sys.executable, "-m", "benchmarks.merge.profile_merge", *names, "--disk", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["missing"] == []
    called = {name for group in ("main", "workers") for name in found[group]}
    assert called == {phase for phase, _ in PROBES}
    assert set(found["disk"]) == {"direct", "cached"}


def test_a_raw_write_leaves_its_bytes(tmp_path: Path) -> None:
    from benchmarks.shared.raw_write import BLOCK_BYTES, write

    write(str(tmp_path / "raw"), 2 * BLOCK_BYTES, cached=True)
    content = (tmp_path / "raw").read_bytes()
    assert len(content) == 2 * BLOCK_BYTES
    assert content[:BLOCK_BYTES] == content[BLOCK_BYTES:] != bytes(BLOCK_BYTES)


def test_the_instruction_set_is_that_which_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.shared.machine import describe, instruction_set

    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(name, raising=False)
    assert describe(ROOT)["instruction set"] == instruction_set()
    assert "narrowed" not in instruction_set()
    monkeypatch.setenv("NUMBA_CPU_NAME", "nehalem")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse4.2,+popcnt")
    assert instruction_set().startswith("sse4 (narrowed: NUMBA_CPU_NAME=nehalem")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2,+fma")
    assert instruction_set().startswith("avx2 (")


@pytest.mark.slow
def test_the_disk_is_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.merge import __main__ as bench
    from benchmarks.merge import disk

    monkeypatch.setattr(disk, "OLD_ENOUGH", 0.0)
    page = tmp_path / "page.md"
    options = ["--shape", "tiny", "--pairs", "1", "--only", "raw", "--only", "reflink"]
    folders = ["--work", str(tmp_path / "work"), "--page", str(page)]
    bench.main([*options, *folders])
    text = page.read_text("utf-8")
    assert "| merge against a raw write of as many bytes" in text
    assert "| merge of q and v, on XFS" in text
    assert "- instruction set: " in text
    assert "--only raw --only reflink" in text
    assert not list((tmp_path / "work").iterdir())
