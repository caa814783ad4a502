"""Every form a base or an adapter can be given in leads to the same merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from deltas import reference
from merging import toys
from merging.processes import python
from merging.toys import BF16, PREFIX, Q0, attention, write_adapter, write_base, write_json

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def weights(out: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of an output, by name."""
    return {name: tensor.tobytes() for name, tensor in toys.load(out).items()}


@pytest.fixture
def expected(base: Path, adapter: Path, tmp_path: Path) -> dict[str, bytes]:
    """What merging the two folders gives."""
    regraft.merge(base, adapter, tmp_path / "expected")
    return weights(tmp_path / "expected")


# Files


def test_a_lone_safetensors_file_is_a_base(
    base: Path, adapter: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    lone = tmp_path / "downloads" / "llama-tiny.safetensors"
    lone.parent.mkdir()
    (base / "model.safetensors").rename(lone)
    (lone.parent / "private.txt").write_text("mine")
    regraft.merge(lone, adapter, tmp_path / "out")
    assert weights(tmp_path / "out") == expected
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "README.md", "regraft"}  # no neighbours travel


def test_the_config_beside_a_lone_file_is_its_config(
    base: Path, adapter: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    regraft.merge(base / "model.safetensors", adapter, tmp_path / "out")
    assert weights(tmp_path / "out") == expected
    assert toys.read_json(tmp_path / "out" / "config.json") == toys.CONFIG


def test_the_weights_file_of_an_adapter_is_an_adapter(
    base: Path, adapter: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    regraft.merge(base, adapter / "adapter_model.safetensors", tmp_path / "out")
    assert weights(tmp_path / "out") == expected


def test_a_file_beside_an_adapters_weights_is_told_from_them(base: Path, adapter: Path) -> None:
    with pytest.raises(regraft.InputError, match=f"Give the folder: {adapter}$"):
        regraft.plan(base, adapter / "adapter_config.json")


def test_a_folder_far_above_an_adapter_is_called_what_it_is(base: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/one").mkdir(parents=True)
    with pytest.raises(regraft.InputError, match="found neither a model nor an adapter"):
        regraft.plan(base, tmp_path / "runs")


def test_an_adapter_in_the_place_of_a_merged_model_is_told_so(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    regraft.merge(base, adapter, tmp_path / "out")
    with pytest.raises(regraft.InputError, match=r"found an adapter\. Name the merged model first"):
        regraft.swap(adapter, tmp_path / "out", tmp_path / "other")
    with pytest.raises(regraft.InputError, match="found an adapter"):
        regraft.unmerge(adapter, tmp_path / "other")
    with pytest.raises(regraft.InputError, match=r"found an adapter\. Name the merged model"):
        regraft.verify(adapter)


def as_torch(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return numpy arrays as torch tensors of the same dtype."""
    import torch

    def one(array: np.ndarray) -> Any:
        if array.dtype == BF16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return {name: one(array) for name, array in tensors.items()}


def torch_base(folder: Path, shards: int) -> Path:
    """Write the llama as PyTorch files, in one or in several."""
    import torch

    tensors = as_torch(toys.llama_tensors())
    write_json(folder / "config.json", toys.CONFIG)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        held = dict(list(tensors.items())[number::shards])
        torch.save(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pytorch_base_becomes_safetensors(
    adapter: Path, tmp_path: Path, expected: dict[str, bytes], shards: int
) -> None:
    receipt = regraft.merge(torch_base(tmp_path / "torch", shards), adapter, tmp_path / "out")
    assert weights(tmp_path / "out") == expected
    assert not list((tmp_path / "out").glob("*.bin*"))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    assert len(files) == (1 if shards == 1 else shards + 1)
    assert {record.file for record in receipt.tensors} == {f for f in files if "index" not in f}


def test_a_pytorch_adapter_is_read_too(
    base: Path, adapter: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    import torch

    (adapter / "adapter_model.safetensors").unlink()
    torch.save(as_torch(attention()), adapter / "adapter_model.bin")
    regraft.merge(base, adapter, tmp_path / "out")
    assert weights(tmp_path / "out") == expected


RUN = """
import sys
sys.argv = ["regraft", *sys.argv[1:]]
from regraft.cli import main
main()
"""


@pytest.mark.slow
def test_bin_files_are_read_without_torch(
    adapter: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    import torch

    (adapter / "adapter_model.safetensors").unlink()
    torch.save(as_torch(attention()), adapter / "adapter_model.bin")
    python(RUN, "merge", torch_base(tmp_path / "torch", 1), adapter, "-o", tmp_path / "out",
           without=["torch", "transformers", "peft"])  # fmt: skip
    assert weights(tmp_path / "out") == expected


# The Hub's cache


def cache(
    folder: Path, repo: str, source: Path, commits: dict[str, Callable[[Path], None]]
) -> None:
    """Put a folder's files into a Hub cache, once per commit, each changed in its own way."""
    root = folder / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for commit, change in commits.items():
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in source.iterdir():
            blob = root / "blobs" / f"{commit[:8]}-{path.name}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        change(snapshot)


def test_hub_ids_with_a_revision_are_merged_offline_from_the_cache(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    def older(snapshot: Path) -> None:
        config = {**toys.read_json(snapshot / "config.json"), "of": "the older one"}
        (snapshot / "config.json").unlink()
        write_json(snapshot / "config.json", config)

    hub = tmp_path / "hub"
    cache(hub, "org/base", base, {COMMIT: lambda _: None, OLDER: older})
    cache(hub, "org/style", adapter, {COMMIT: lambda _: None})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    receipt = regraft.merge(f"org/base@{OLDER}", "org/style=1", tmp_path / "out")
    assert weights(tmp_path / "out") == expected
    assert toys.read_json(tmp_path / "out" / "config.json")["of"] == "the older one"
    assert (receipt.base.source, receipt.base.revision) == (f"org/base@{OLDER}", OLDER)
    style = receipt.adapters[0]
    assert (style.source, style.revision, style.weight) == ("org/style", COMMIT, 1.0)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/base\n- org/style\nbase_model_relation: merge\n" in text


# Weights and several adapters


@pytest.mark.parametrize("form", ["text", "pair", "list of pairs"])
@pytest.mark.parametrize("weight", [0.5, -2.0, 1.0])
def test_a_weight_does_what_scaling_alpha_does(
    base: Path, adapter: Path, tmp_path: Path, form: str, weight: float
) -> None:
    given: dict[str, Any] = {
        "text": f"{adapter}={weight}",
        "pair": (adapter, weight),
        "list of pairs": [(str(adapter), weight)],
    }
    regraft.merge(base, given[form], tmp_path / "weighted")
    sign = np.float32(np.sign(weight))
    flipped = {key: a * sign if "lora_B" in key else a for key, a in attention().items()}
    scaled = write_adapter(tmp_path / "scaled", flipped, lora_alpha=abs(weight) * toys.ALPHA)
    regraft.merge(base, scaled, tmp_path / "out")
    assert weights(tmp_path / "weighted") == weights(tmp_path / "out")


def test_a_weight_of_zero_is_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, f"{adapter}=0", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(base)
    assert receipt.quiet


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_two_adapters_are_the_float64_sum_rounded_once(tmp_path: Path, dtype: str) -> None:
    base = write_base(tmp_path / "base", toys.llama_tensors(reference.STORED[dtype]))
    pairs = [(attention(rank=3, seed=1), 0.75), (attention(rank=5, seed=20), -1.5)]
    given = [
        (write_adapter(tmp_path / f"a{rank}", tensors, r=rank), weight)
        for rank, (tensors, weight) in zip((3, 5), pairs, strict=True)
    ]
    receipt = regraft.merge(base, given, tmp_path / "out")
    assert [a.source for a in receipt.adapters] == [str(path) for path, _ in given]
    key, total = f"{PREFIX}{Q0}", toys.load(base)[f"{Q0}.weight"].astype(np.float64)
    for rank, (tensors, weight) in zip((3, 5), pairs, strict=True):
        b, a = (tensors[f"{key}.lora_{side}.weight"].astype(np.float64) for side in "BA")
        total += weight * toys.ALPHA / rank * (b @ a)
    found = toys.load(tmp_path / "out")[f"{Q0}.weight"]
    steps = np.abs(found.astype(np.float64) - total) / np.spacing(np.abs(found)).astype(np.float64)
    assert steps.max() <= 1


def test_an_adapter_twice_is_twice_its_weight(base: Path, adapter: Path, tmp_path: Path) -> None:
    regraft.merge(base, [adapter, adapter], tmp_path / "twice", dtype="float32")
    regraft.merge(base, f"{adapter}=2", tmp_path / "double", dtype="float32")
    twice, double = toys.load(tmp_path / "twice"), toys.load(tmp_path / "double")
    for name, tensor in twice.items():
        np.testing.assert_allclose(tensor, double[name], rtol=1e-5, atol=1e-6)


def test_adapters_of_other_targets_both_take_effect(base: Path, tmp_path: Path) -> None:
    one = {key: a for key, a in attention().items() if "q_proj" in key}
    other = {key: a for key, a in attention().items() if "v_proj" in key}
    folders = [write_adapter(tmp_path / n, t) for n, t in (("one", one), ("other", other))]
    receipt = regraft.merge(base, folders, tmp_path / "out")
    by_adapter = {record.name: record.adapters for record in receipt.tensors if record.adapters}
    assert by_adapter == {
        f"model.layers.{i}.self_attn.{n}_proj.weight": (number,)
        for i in (0, 1)
        for number, n in enumerate("qv")
    }


def test_paths_may_hold_spaces_equals_signs_and_unicode(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "α=0.5 (v2)" / "style=1")
    out = tmp_path / "mein Modell ✓"
    receipt = regraft.merge(base, str(adapter), out)
    assert receipt.adapters[0].weight == 1.0
    assert regraft.merge(base, f"{adapter}=0.25", tmp_path / "o").adapters[0].weight == 0.25
    assert (out / "model.safetensors").exists()


def test_relative_paths_are_taken_from_where_one_is(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    regraft.merge(base.name, adapter.name, "out")
    assert weights(tmp_path / "out") == expected
    monkeypatch.chdir(base)
    regraft.merge(Path("model.safetensors"), Path("../adapter"), "here")
    assert weights(base / "here") == expected
