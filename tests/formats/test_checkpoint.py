"""Checkpoints and adapters are opened as a whole, and every other folder is told what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from regraft.errors import FormatError, InputError, RegraftError, UnsupportedError
from regraft.formats.adapter_files import open_adapter
from regraft.formats.checkpoint import looks_like, open_checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.hub import Located

INDEX = "model.safetensors.index.json"


def located(path: Path, repo_id: str | None = None) -> Located:
    return Located(path, str(path), repo_id, "0" * 40 if repo_id else None)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_weights(path: Path, *names: str, fill: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full((2, 3), fill, np.float32) for name in names}, path, {"format": "pt"})


def write_sharded(root: Path, weight_map: dict[str, Any]) -> None:
    """Write the shards a weight map names, and the index."""
    for shard in sorted({shard for shard in weight_map.values() if isinstance(shard, str)}):
        write_weights(root / shard, *[name for name in weight_map if weight_map[name] == shard])
    write_json(root / INDEX, {"metadata": {"total_size": 72}, "weight_map": weight_map})
    write_json(root / "config.json", {"model_type": "llama"})


def write_adapter(root: Path, weights: str = "adapter_model.safetensors") -> None:
    write_json(root / "adapter_config.json", {"peft_type": "LORA", "r": 2})
    names = [f"base_model.model.q.lora_{side}.weight" for side in "AB"]
    if weights.endswith(".bin"):
        torch.save({name: torch.ones(2, 3) for name in names}, root / weights)
    else:
        write_weights(root / weights, *names)


TWO = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


# Checkpoints that are sound


def test_a_single_safetensors_folder_is_opened(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", "b", "a")
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    base = open_checkpoint(located(tmp_path))
    assert (base.root, base.container, base.single_file) == (tmp_path, "safetensors", False)
    assert base.config == {"model_type": "llama"}
    assert base.index_metadata is None
    (shard,) = base.shards
    assert (shard.path, shard.name) == (tmp_path / "model.safetensors", "model.safetensors")
    assert shard.metadata == {"format": "pt"}
    assert shard.tensors == tuple(base.tensors)
    assert set(base.tensors) == {"a", "b"}


def test_a_sharded_folder_is_opened_in_order(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"c": TWO["b"], "b": TWO["b"], "a": TWO["a"]})
    base = open_checkpoint(located(tmp_path))
    assert [shard.name for shard in base.shards] == sorted(TWO.values())
    assert [shard.tensors for shard in base.shards] == [("a",), ("b", "c")]
    assert list(base.tensors) == ["a", "b", "c"]
    assert base.tensors["b"].path == tmp_path / TWO["b"]
    assert base.index_metadata == {"total_size": 72}


def test_a_sharded_pytorch_folder_is_opened(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).bfloat16(), "b": torch.arange(4)}
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        weight_map[name] = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensor}, tmp_path / weight_map[name])
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    base = open_checkpoint(located(tmp_path))
    assert (base.container, base.config, base.index_metadata) == ("torch", None, None)
    with FilePool() as pool:
        for name, tensor in tensors.items():
            assert pool.read_bytes(base.tensors[name]) == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["other.safetensors"], "other.safetensors"),
        (["other.safetensors", "adapter_model.safetensors"], "other.safetensors"),
        (["other.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_the_weights_are_those_that_would_be_loaded(
    tmp_path: Path, files: list[str], taken: str
) -> None:
    for name in files:
        if name.endswith(".bin"):
            torch.save({"a": torch.ones(1)}, tmp_path / name)
        else:
            write_weights(tmp_path / name, "a")
    assert [shard.name for shard in open_checkpoint(located(tmp_path)).shards] == [taken]


def test_the_weights_file_a_config_names_is_taken(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", "a")
    write_weights(tmp_path / "named.safetensors", "b")
    write_json(tmp_path / "config.json", {"transformers_weights": "named.safetensors"})
    assert list(open_checkpoint(located(tmp_path)).tensors) == ["b"]
    write_json(tmp_path / "config.json", {"transformers_weights": "../model.safetensors"})
    with pytest.raises(FormatError, match=r"config.json.*found '\.\./model.safetensors'"):
        open_checkpoint(located(tmp_path))


def test_a_lone_file_is_opened_with_the_config_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_weights(path, "a")
    write_weights(tmp_path / "another.safetensors", "b")
    base = open_checkpoint(located(path))
    assert (base.root, base.single_file, list(base.tensors)) == (tmp_path, True, ["a"])
    assert base.config is None
    write_json(tmp_path / "config.json", {"x": 1})
    assert open_checkpoint(located(path)).config == {"x": 1}


def test_links_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    write_sharded(tmp_path / "real", TWO)
    snapshot = tmp_path / "snapshots" / "abc"
    (tmp_path / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "real").iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    base = open_checkpoint(located(snapshot, "org/name"))
    assert list(base.tensors) == ["a", "b"]
    assert base.revision == "0" * 40


# Indexes that are not


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "model.gguf",
        "model.bin",
        "a\n.safetensors",
        3,
        ["model.safetensors"],
        None,
    ],
)
def test_an_index_that_names_something_else_is_refused(tmp_path: Path, name: Any) -> None:
    root = tmp_path / "base"
    write_weights(root / "sub" / "model.safetensors", "a")
    write_weights(tmp_path / "model.safetensors", "a")
    write_json(root / INDEX, {"weight_map": {"a": name}})
    with pytest.raises(FormatError, match=r"tensor 'a': the index does not name a weights file"):
        open_checkpoint(located(root))


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {**TWO, "c": "model-3.safetensors"})
    for name in ("model-3.safetensors", TWO["a"]):
        (tmp_path / name).unlink()
    (tmp_path / TWO["a"]).symlink_to("../blobs/gone")
    with pytest.raises(FormatError) as caught:
        open_checkpoint(located(tmp_path))
    assert [problem.what for problem in caught.value.problems] == ["a shard is missing"] * 2
    assert TWO["a"] in str(caught.value)
    assert "model-3.safetensors" in str(caught.value)


def test_every_misfit_of_index_and_shards_is_listed(tmp_path: Path) -> None:
    write_sharded(tmp_path, {**TWO, "c": TWO["a"], "swapped": TWO["a"]})
    write_weights(tmp_path / TWO["a"], "a", "extra", "twice")
    write_weights(tmp_path / TWO["b"], "b", "swapped", "twice")
    index = {**TWO, "c": TWO["a"], "swapped": TWO["a"], "twice": TWO["a"]}
    write_json(tmp_path / INDEX, {"weight_map": index})
    with pytest.raises(FormatError) as caught:
        open_checkpoint(located(tmp_path))
    assert [(p.where.split("'")[1], p.what) for p in caught.value.problems] == [
        ("c", "a tensor is missing"),
        ("extra", "a tensor is not in the index"),
        ("swapped", "a tensor is not in the shard the index names"),
        ("twice", "a tensor is in two shards"),
    ]


def test_all_bad_shards_are_reported_together(tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    for name in TWO.values():
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        open_checkpoint(located(tmp_path))
    assert [problem.where for problem in caught.value.problems] == [
        str(tmp_path / name) for name in sorted(TWO.values())
    ]


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"metadata": {}}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: Any) -> None:
    write_json(tmp_path / INDEX, index)
    with pytest.raises(FormatError, match="no weight_map"):
        open_checkpoint(located(tmp_path))


# Folders and files that are no checkpoint


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FormatError, match=r"without an index.*Download the index too"):
        open_checkpoint(located(tmp_path))
    with pytest.raises(InputError, match=f"one shard of several.*Give the folder: {tmp_path}"):
        open_checkpoint(located(tmp_path / TWO["a"]))


def test_one_shard_of_one_is_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.safetensors"
    write_weights(path, "a")
    assert list(open_checkpoint(located(path)).tensors) == ["a"]
    assert list(open_checkpoint(located(tmp_path)).tensors) == ["a"]


def test_an_adapter_given_as_base_is_said_to_be_one(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(InputError, match=r"is not a checkpoint.*(an adapter|LoRA).*ADAPTER"):
            open_checkpoint(located(path))


@pytest.mark.parametrize("name", ["kohya.safetensors", "model.safetensors"])
def test_lora_weights_under_another_name_are_no_base(tmp_path: Path, name: str) -> None:
    write_weights(tmp_path / name, "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="found LoRA factors"):
            open_checkpoint(located(path))


def make(root: Path, kind: str) -> Path:
    """Make a folder of the kind that ``looks_like`` names."""
    root.mkdir()
    if kind == "adapter":
        write_adapter(root)
    elif kind in ("checkpoint", "merged"):
        write_sharded(root, TWO)
    elif kind == "mlx-adapter":
        write_json(root / "adapter_config.json", {"lora_parameters": {}})
        write_weights(root / "adapters.safetensors", "model.q.lora_a", "model.q.lora_b")
    elif kind == "gguf":
        (root / "model.gguf").write_bytes(b"GGUF")
    elif kind == "tokenizer":
        write_json(root / "tokenizer.json", {})
    elif kind == "unknown":
        (root / "notes.md").write_text("hello")
    if kind == "merged":
        write_json(root / "regraft" / "receipt.json", {})
    return root


KINDS = ("adapter", "checkpoint", "merged", "mlx-adapter", "gguf", "tokenizer", "empty", "unknown")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_looks_like_what_it_is(tmp_path: Path, kind: str) -> None:
    assert looks_like(make(tmp_path / "x", kind)) == kind


def test_a_file_looks_like_what_it_is(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    write_weights(tmp_path / "adapters.safetensors", "model.q.lora_a")
    write_weights(tmp_path / "kohya.safetensors", "lora_te_x.lora_up.weight", "lora_te_x.alpha")
    write_weights(tmp_path / "model.safetensors", "model.q.weight", "model.norm.weight")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "unsuffixed").write_bytes(b"GGUF\x03")
    (tmp_path / "notes.md").write_text("hello")
    assert {path.name: looks_like(path) for path in tmp_path.iterdir()} == {
        "adapter_config.json": "unknown",
        "adapter_model.safetensors": "adapter",
        "adapters.safetensors": "mlx-adapter",
        "kohya.safetensors": "adapter",
        "model.safetensors": "checkpoint",
        "broken.safetensors": "unknown",
        "unsuffixed": "gguf",
        "notes.md": "unknown",
    }
    assert looks_like(tmp_path / "nothing here") == "unknown"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("mlx-adapter", InputError, "found an MLX adapter"),
        ("gguf", UnsupportedError, "a GGUF model can only be the base"),
        ("tokenizer", InputError, "found a tokenizer without weights"),
        ("empty", InputError, "found an empty folder"),
        ("unknown", InputError, "found neither a model nor an adapter"),
    ],
)
def test_another_folder_is_no_base(
    tmp_path: Path, kind: str, error: type[RegraftError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(located(make(tmp_path / "x", kind)))
    assert caught.value.problems[0].hint


def test_files_that_are_no_weights_are_no_base(tmp_path: Path) -> None:
    make(tmp_path / "x", "gguf")
    with pytest.raises(UnsupportedError, match="GGUF"):
        open_checkpoint(located(tmp_path / "x" / "model.gguf"))
    write_json(tmp_path / "config.json", {})
    with pytest.raises(InputError, match=r"a \.json file.*Give the folder"):
        open_checkpoint(located(tmp_path / "config.json"))


def test_a_model_in_a_subfolder_is_pointed_out(tmp_path: Path) -> None:
    write_json(tmp_path / "unet" / "config.json", {})
    with pytest.raises(InputError, match=r"A subfolder holds config.json: 'unet'"):
        open_checkpoint(located(tmp_path))


# Adapters


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_opened_from_its_folder_or_its_weights(tmp_path: Path, weights: str) -> None:
    write_adapter(tmp_path, weights)
    from_folder = open_adapter(located(tmp_path))
    assert from_folder.config == {"peft_type": "LORA", "r": 2}
    assert from_folder.weights_file == weights
    assert from_folder.metadata == ({} if weights.endswith(".bin") else {"format": "pt"})
    assert {name: spec.shape for name, spec in from_folder.tensors.items()} == {
        "base_model.model.q.lora_A.weight": (2, 3),
        "base_model.model.q.lora_B.weight": (2, 3),
    }
    from_file = open_adapter(located(tmp_path / weights))
    assert (from_file.root, from_file.tensors) == (tmp_path, from_folder.tensors)


def test_the_newer_of_two_weights_files_decides(tmp_path: Path) -> None:
    write_adapter(tmp_path, "adapter_model.bin")
    write_adapter(tmp_path)
    safe, old = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_model.bin"
    for age in (100, 50):
        os.utime(safe, (100, 100))
        os.utime(old, (age, age))
        assert open_adapter(located(tmp_path)).weights_file == safe.name
    os.utime(old, (101, 101))
    with pytest.raises(InputError, match=r"contradict.*bin is the newer.*Delete the one"):
        open_adapter(located(tmp_path))
    assert open_adapter(located(old)).weights_file == old.name
    # in the Hub's cache a file's time is that of its download
    assert open_adapter(located(tmp_path, "org/name")).weights_file == safe.name


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("checkpoint", InputError, "is not an adapter.*found a full model"),
        ("merged", InputError, "found a full model that regraft merged"),
        ("mlx-adapter", UnsupportedError, "is an MLX adapter"),
        ("gguf", InputError, "found a GGUF model"),
        ("tokenizer", InputError, "found a tokenizer"),
        ("empty", InputError, "found an empty folder"),
        ("unknown", InputError, "found neither"),
    ],
)
def test_another_folder_is_no_adapter(
    tmp_path: Path, kind: str, error: type[RegraftError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_adapter(located(make(tmp_path / "x", kind)))
    assert caught.value.problems[0].hint


def test_a_full_models_file_is_no_adapter(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", "model.q.weight")
    with pytest.raises(InputError, match="found a full model"):
        open_adapter(located(tmp_path / "model.safetensors"))


def test_a_full_model_from_the_hub_is_known_by_its_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    write_json(tmp_path / "tokenizer.json", {})
    with pytest.raises(InputError, match=r"is not an adapter.*found a full model"):
        open_adapter(located(tmp_path, "org/name"))


def test_missing_parts_of_an_adapter_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "kept")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(InputError, match=r"adapter_config.json is missing"):
            open_adapter(located(path))
    (tmp_path / "kept").rename(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights are missing.*adapter_config.json alone"):
        open_adapter(located(tmp_path))


def test_an_adapter_in_a_subfolder_is_taken_and_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    write_adapter(tmp_path / "checkpoint-500")
    found = open_adapter(located(tmp_path))
    assert found.root == tmp_path / "checkpoint-500"
    assert "the adapter in checkpoint-500 is taken" in found.notes[0]


def test_lora_weights_in_another_layout_are_said_to_be(tmp_path: Path) -> None:
    write_weights(tmp_path / "x.safetensors", "lora_unet_x.lora_up.weight")
    with pytest.raises(UnsupportedError, match="kohya's layout"):
        open_adapter(located(tmp_path))


def test_a_bad_config_is_a_format_error(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(FormatError, match=r"adapter_config.json: cannot be read as JSON"):
        open_adapter(located(tmp_path))
