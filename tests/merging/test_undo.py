"""A merged model gives back its base, takes other adapters, and notices that it was changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import regraft
from merging import toys
from merging.toys import (
    EMBED,
    HIDDEN,
    Q0,
    VOCAB,
    reseal,
    tree,
    write_adapter,
    write_base,
    write_json,
)
from regraft.errors import FormatError, InputError, MismatchError, UnsupportedError, UsageError

UNDO = "regraft/undo"
RECEIPT = "regraft/receipt.json"


def merged(tmp_path: Path, base: Path, adapter: Any, **options: Any) -> Path:
    regraft.merge(base, adapter, tmp_path / "merged", **options)
    return tmp_path / "merged"


def assert_restores(base: Path, model: Path, tmp_path: Path, **options: Any) -> None:
    """Fail unless un-merging gives back every file of the base."""
    report = regraft.unmerge(model, tmp_path / "back", **options)
    assert tree(tmp_path / "back") == tree(base)
    assert not (tmp_path / ".back.regraft").exists()
    assert sorted(report.files) == sorted(
        str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()
    )


def comparable(folder: Path) -> dict[str, bytes | None]:
    """Return what two ways to the same model have in common: all but the card and the receipt."""
    files = tree(folder)
    return {n: c for n, c in files.items() if n not in ("README.md", "regraft/receipt.json")}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a sharded base with files beside its weights."""
    folder = toys.write_sharded_base(tmp_path / "base")
    write_json(folder / "tokenizer.json", {"vocab": ["a" * 100_000]})
    write_json(folder / "generation_config.json", {"temperature": 0.5})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    (folder / "LICENSE").write_text("Do as you please.")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


# -- back to the base ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_everything_the_base_held_comes_back(
    base: Path, adapter: Path, tmp_path: Path, dtype: str | None
) -> None:
    model = merged(tmp_path, base, adapter, dtype=dtype)
    shutil.rmtree(adapter)
    shutil.move(base, tmp_path / "away")
    assert_restores(tmp_path / "away", model, tmp_path)


def test_however_the_files_were_cut(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert_restores(base, merged(tmp_path, base, adapter, shard_size="2KB"), tmp_path)


def test_a_tokenizer_that_the_adapter_replaced_comes_back(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    write_json(adapter / "tokenizer.json", {"vocab": ["b"]})
    write_json(adapter / "tokenizer_config.json", {"chat_template": "{{ x }}"})
    assert_restores(base, merged(tmp_path, base, adapter), tmp_path)


def test_replaced_and_added_tensors_and_rows_go_away(base: Path, tmp_path: Path) -> None:
    key = toys.PREFIX
    tensors = {
        **toys.attention(),
        f"{key}lm_head.weight": toys.draw(VOCAB, HIDDEN, seed=5),
        f"{key}{EMBED}.token_adapter.trainable_tokens_delta": toys.draw(2, HIDDEN, seed=6),
    }
    adapter = write_adapter(
        tmp_path / "adapter", tensors, modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [3, 7]},
    )  # fmt: skip
    assert_restores(base, merged(tmp_path, base, adapter), tmp_path)


def test_headers_come_back_however_they_were_written(adapter: Path, tmp_path: Path) -> None:
    tensors = toys.llama_tensors()
    entries, at = {}, 0
    for name in reversed(list(tensors)):
        end = at + tensors[name].nbytes
        shape = list(tensors[name].shape)
        entries[name] = {"data_offsets": [at, end], "shape": shape, "dtype": "BF16"}
        at = end
    meta = {"__metadata__": {"z": "1", "a": "ä", "format": "pt"}}
    header = json.dumps(entries | meta, indent=1).encode() + b"   "
    folder = tmp_path / "base"
    write_json(folder / "config.json", toys.CONFIG)
    data = b"".join(tensors[name].tobytes() for name in entries)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert_restores(folder, merged(tmp_path, folder, adapter), tmp_path)


def test_a_lone_file_comes_back(adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(toys.llama_tensors(), folder / "weights.safetensors")
    model = merged(tmp_path, folder / "weights.safetensors", adapter)
    assert_restores(folder, model, tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_files_come_back(adapter: Path, tmp_path: Path, shards: int) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "base"
    write_json(folder / "config.json", toys.CONFIG)
    tensors = {
        name: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        for name, value in toys.llama_tensors().items()
    }
    names = sorted(tensors)
    files = {
        f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin": names[i::shards] for i in range(shards)
    }
    if shards == 1:
        files = {"pytorch_model.bin": names}
    else:
        weight_map = {name: file for file, held in files.items() for name in held}
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    assert_restores(folder, merged(tmp_path, folder, adapter), tmp_path)


def test_tensors_that_share_memory_in_a_pytorch_file_come_back(
    adapter: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "base"
    write_json(folder / "config.json", toys.CONFIG | {"tie_word_embeddings": True})
    tensors = {
        name: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        for name, value in toys.llama_tensors().items()
    }
    tensors["lm_head.weight"] = tensors[f"{EMBED}.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_restores(folder, merged(tmp_path, folder, adapter), tmp_path)


def test_what_is_not_kept_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "original").mkdir()
    (base / "model.gguf").write_bytes(b"GGUF")
    (base / "training.log").write_text("what nobody else should read")
    model = merged(tmp_path, base, adapter)
    report = regraft.unmerge(model, tmp_path / "back")
    assert report.left_out == ("model.gguf", "original", "training.log")
    assert b"nobody else" not in b"".join(c for c in tree(model).values() if c)
    regraft.swap(model, adapter, tmp_path / "again")
    assert regraft.unmerge(tmp_path / "again", tmp_path / "back2").left_out == report.left_out


def test_the_adapter_need_not_be_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = merged(tmp_path, base, (adapter, 0.5), keep_adapter=False)
    assert not (model / UNDO / "adapter-0").exists()
    with pytest.raises(InputError, match="kept no copy of its adapters"):
        regraft.unmerge(model, tmp_path / "back")
    with pytest.raises(UsageError, match="not the adapters that were merged"):
        regraft.unmerge(model, tmp_path / "back", adapters=adapter)
    assert_restores(base, model, tmp_path, adapters=(adapter, 0.5))


def test_without_an_undo_there_is_no_way_back(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = merged(tmp_path, base, adapter, undo=False)
    assert not (model / UNDO).exists()
    with pytest.raises(InputError, match="it keeps no undo patch"):
        regraft.unmerge(model, tmp_path / "back")
    with pytest.raises(InputError, match="it keeps no undo patch"):
        regraft.swap(model, adapter, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_receipt_says_what_the_patch_takes(base: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, adapter, tmp_path / "merged")
    patch = tmp_path / "merged" / UNDO / "patch.safetensors"
    assert receipt.totals.undo_bytes == patch.stat().st_size
    assert f"{UNDO}/patch.safetensors" in receipt.files


# -- to other adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"shard_size": "3KB"}])
def test_swapping_is_merging_the_base_anew(
    base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    other = write_adapter(tmp_path / "other", toys.dora(Q0, HIDDEN, HIDDEN), use_dora=True,
                          target_modules=["q_proj"])  # fmt: skip
    model = merged(tmp_path, base, adapter, dtype="float16")
    regraft.swap(model, [(other, 0.5), adapter], tmp_path / "swapped", **options)
    regraft.merge(base, [(other, 0.5), adapter], tmp_path / "fresh", **options)
    assert comparable(tmp_path / "swapped") == comparable(tmp_path / "fresh")
    swapped, fresh = (
        json.loads((tmp_path / name / "regraft/receipt.json").read_text())
        for name in ("swapped", "fresh")
    )
    assert swapped["base"] == fresh["base"]
    assert swapped["tensors"] == fresh["tensors"]
    assert_restores(base, tmp_path / "swapped", tmp_path)


def test_a_swap_may_replace_what_it_reads_from_only_by_another_folder(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = merged(tmp_path, base, adapter)
    with pytest.raises(UsageError, match="in \\(or over\\) an input"):
        regraft.swap(model, adapter, model, overwrite=True)


# -- what was changed ------------------------------------------------------------------------------


def flip(path: Path, at: int = -1) -> None:
    """Flip a bit of a file's byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def edit_weights(model: Path) -> None:
    for path in sorted(model.glob("*.safetensors"))[:2]:
        flip(path)


def edit_adapter(model: Path) -> None:
    flip(model / UNDO / "adapter-0" / "adapter_model.safetensors")


def edit_streams(model: Path) -> None:
    flip(model / UNDO / "patch.safetensors", 5000)


def other_weights(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[0]
    tensors = toys.load(model)
    held = toys.read_json(model / toys.INDEX)["weight_map"]
    names = [name for name in tensors if held[name] == path.name]
    save_file({name: tensors[name].astype(np.float32) for name in names}, path)


def edit_side_file(model: Path) -> None:
    write_json(model / "tokenizer.json", {})


def edit_adapter_config(model: Path) -> None:
    (path,) = (model / UNDO).rglob("adapter_config.json")
    path.write_text(path.read_text().replace('"lora_alpha"', '"lora_alphas"'))


def add_code(model: Path) -> None:
    (model / UNDO / "base" / "added.py").write_text("print('code')")


def link_a_config(model: Path) -> None:
    path = model / UNDO / "base" / "config.json"
    path.unlink()
    path.symlink_to("/etc/hostname")


CHANGES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "weights": (edit_weights, MismatchError, "undo patch does not fit the weights"),
    "the adapter": (edit_adapter, MismatchError, "other ones: .*adapter_model.safetensors"),
    "an adapter's config": (edit_adapter_config, MismatchError, "other ones: .*adapter_config"),
    "code beside the base": (add_code, MismatchError, "other ones: .*added.py"),
    "a link": (link_a_config, MismatchError, "other ones: .*base/config.json"),
    "another dtype": (other_weights, MismatchError, "not those that the patch was made for"),
    "a side file": (edit_side_file, MismatchError, "tokenizer.json.*changed since the merge"),
    "a config": (
        lambda model: flip(model / UNDO / "undo.json", 20),
        MismatchError,
        "other ones: .*undo.json",
    ),
    "no patch": (
        lambda model: (model / UNDO / "patch.safetensors").unlink(), InputError, "no such file",
    ),
    "a cut patch": (
        lambda model: os.truncate(model / UNDO / "patch.safetensors", 4500),
        FormatError,
        "cut short",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_since_is_refused(
    base: Path, adapter: Path, tmp_path: Path, what: str
) -> None:
    change, error, says = CHANGES[what]
    model = merged(tmp_path, base, adapter)
    change(model)
    before = tree(tmp_path)
    with pytest.raises(error, match=says):
        regraft.unmerge(model, tmp_path / "back")
    with pytest.raises(error, match=says):
        regraft.swap(model, adapter, tmp_path / "back")
    assert tree(tmp_path) == before


def test_an_adapter_that_is_not_the_one_is_refused_whatever_the_receipt_says_of_its_file(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = merged(tmp_path, base, adapter)
    edit_adapter(model)
    reseal(model)
    with pytest.raises(MismatchError, match=r"1 others: 'base_model\.model"):
        regraft.unmerge(model, tmp_path / "back")


def test_every_changed_tensor_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = merged(tmp_path, base, adapter)
    edit_weights(model)
    with pytest.raises(MismatchError) as caught:
        regraft.unmerge(model, tmp_path / "back")
    assert len(caught.value.problems) == 2


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "a path upwards": lambda m: m["files"][0].update(name="../x.safetensors"),
    "a path": lambda m: m["files"][0].update(name="a/b.safetensors"),
    "a side file upwards": lambda m: m["side_files"][0].update(name="../../evil"),
    "a hidden side file": lambda m: m["side_files"][0].update(name=".git/config"),
    "a side file of its own": lambda m: m["side_files"][0].update(name="regraft/x.json"),
    "a file that no merge keeps": lambda m: m["side_files"][0].update(name="optimizer.pt"),
    "an absolute side file": lambda m: m["side_files"][0].update(name="/tmp/evil"),
    "a huge gap": lambda m: m["files"][0].update(size=2**40, gaps=[[0, 2**39]]),
    "a negative gap": lambda m: m["files"][0].update(gaps=[[-8, 16]]),
    "gaps that overlap": lambda m: m["files"][0].update(gaps=[[0, 8], [4, 8]]),
    "a negative size": lambda m: m["files"][0].update(size=-1),
    "a size that is true": lambda m: m["files"][0].update(size=True),
    "an adapter elsewhere": lambda m: m.update(adapters=["../../adapter"]),
    "another layout": lambda m: m.update(format=4),
    "the layout of a GGUF file": lambda m: m.update(format=3),
    "a head of another file": lambda m: m["files"][0].update(kept=48),
    "no number of bytes": lambda m: m["files"][0].update(kept="48"),
    "a layout that is true": lambda m: m.update(format=True),
    "no files": lambda m: m.pop("files"),
    "files of another kind": lambda m: m.update(files={"a": 1}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_stranger_s_manifest_does_no_harm(
    base: Path, adapter: Path, tmp_path: Path, what: str
) -> None:
    model = merged(tmp_path, base, adapter)
    manifest = toys.read_json(model / UNDO / "undo.json")
    HOSTILE[what](manifest)
    write_json(model / UNDO / "undo.json", manifest)
    reseal(model)
    before = tree(tmp_path)
    with pytest.raises(FormatError):
        regraft.unmerge(model, tmp_path / "back")
    assert tree(tmp_path) == before
    report = regraft.verify(model, receipt_only=True)
    assert not report.ok
    assert "undo manifest cannot be read" in report.differences[0].what


def test_a_manifest_of_other_adapters_than_the_receipt_s_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = merged(tmp_path, base, adapter)
    manifest = toys.read_json(model / UNDO / "undo.json")
    write_json(model / UNDO / "undo.json", manifest | {"adapters": ["adapter-0"] * 3})
    reseal(model)
    with pytest.raises(InputError, match="different numbers of adapters"):
        regraft.unmerge(model, tmp_path / "back")
    assert not regraft.verify(model).ok


def test_a_merge_planned_otherwise_is_not_guessed_at(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = merged(tmp_path, base, adapter)
    manifest = toys.read_json(model / UNDO / "undo.json")
    write_json(model / UNDO / "undo.json", manifest | {"plan": "0" * 64})
    reseal(model)
    with pytest.raises(UnsupportedError, match="by this version of regraft"):
        regraft.unmerge(model, tmp_path / "back")


def test_a_base_without_config_comes_back(adapter: Path, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", config=None)
    assert_restores(folder, merged(tmp_path, folder, adapter), tmp_path)


def test_a_swap_of_a_base_that_was_one_file_has_a_config(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base") / "model.safetensors"
    one, two = (
        toys.write_adapter(tmp_path / n, toys.attention(seed=i)) for i, n in enumerate(("1", "2"))
    )
    regraft.merge(base, one, tmp_path / "merged")
    receipt = regraft.swap(tmp_path / "merged", two, tmp_path / "swapped")
    regraft.merge(base, two, tmp_path / "expected")
    for name in ("config.json", "model.safetensors"):
        found, expected = ((tmp_path / n / name).read_bytes() for n in ("swapped", "expected"))
        assert found == expected
    assert any("config.json is the merged model's" in note for note in receipt.warnings)
