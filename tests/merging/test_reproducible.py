"""The same inputs give the same bytes, however many threads, tiles and files there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from merging.toys import BF16, PREFIX, draw, write_adapter, write_base
from regraft.deltas.matrix_units import UNIT_COLUMNS
from regraft.merging.execution.scheduler import Task, execute
from regraft.merging.files.staging import workplace
from regraft.merging.planning import planner as planning
from regraft.merging.planning.planner import SMALLEST_TILE
from regraft.merging.planning.targets import merge_targets
from regraft.merging.undo.corrections import corrections_of
from regraft.merging.undo.keeping import section_names
from regraft.merging.undo.patch import PatchWriter

SMALLEST_CAP = "219MiB"
"""What the plan asks for at least when no single step needs much."""

WIDE = 4 * 2**10
TINY_TILES = (64, 1000, 4096, SMALLEST_TILE, 2**22)
"""Bytes of weights worked on at a time: from a few values of a row to everything."""


def tensors() -> dict[str, np.ndarray]:
    """Return a base with every kind of work in it; some rows are wider than the small tiles."""
    return {
        "a.linear.weight": draw(37, 53, dtype=BF16),
        "b.wide.weight": draw(3, WIDE, dtype=BF16),
        "c.dora.weight": draw(29, 700),
        "d.table.weight": draw(301, 24, dtype=BF16),
        "e.dora_table.weight": draw(60, 700, dtype=np.float16),
        "f.experts": draw(5, 14, 33, dtype=BF16),
        "g.tokens.weight": draw(50, 31, dtype=BF16),
        "h.conv.weight": draw(9, 4, 3, 5, dtype=BF16),
        "i.copied": draw(2000, dtype=BF16),
        "j.saved.weight": draw(8, 11, dtype=BF16),
        "k.pissa.weight": draw(24, 30, dtype=BF16),
        "l.turned.weight": draw(45, 600, dtype=BF16),
    }


def adapter_tensors(rank: int, seed: int) -> dict[str, np.ndarray]:
    """Return an adapter for most of :func:`tensors`."""
    wide = toys.lora("b.wide", 3, WIDE, rank, seed)
    table = toys.embedding("d.table", 301, 24, rank, seed)
    experts = {
        f"{PREFIX}f.lora_A.weight": draw(5 * rank, 33, seed=seed),
        f"{PREFIX}f.lora_B.weight": draw(14, rank * 5, seed=seed + 1),
    }
    conv = {
        f"{PREFIX}h.conv.lora_A.weight": draw(rank, 4, 3, 5, seed=seed),
        f"{PREFIX}h.conv.lora_B.weight": draw(9, rank, 1, 1, seed=seed + 1),
    }
    turned = toys.lora("l.turned", 600, 45, rank, seed)
    return {**toys.lora("a.linear", 37, 53, rank, seed), **wide, **table, **experts, **conv,
            **turned}  # fmt: skip


def dora_tensors() -> dict[str, np.ndarray]:
    """Return an adapter with DoRA, token rows and a module of its own."""
    magnitude = f"{PREFIX}e.dora_table.lora_magnitude_vector"
    return {
        **toys.dora("c.dora", 29, 700, 4),
        **toys.embedding("e.dora_table", 60, 700, 4),
        magnitude: 20 + draw(700),
        f"{PREFIX}g.tokens.token_adapter.trainable_tokens_delta": draw(3, 31),
        f"{PREFIX}j.saved.weight": draw(8, 11, seed=9),
    }


DORA_CONFIG: Mapping[str, Any] = {
    "r": 4,
    "use_dora": True,
    "target_modules": ["c.dora", "e.dora_table"],
    "trainable_token_indices": {"g.tokens": [48, 0, 7]},
    "modules_to_save": ["j.saved"],
}
TARGETS = ["a.linear", "b.wide", "d.table", "h.conv", "l.turned"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and four adapters that between them use every kind of work."""
    folder = tmp_path_factory.mktemp("inputs")
    names = sorted(tensors())
    base = write_base(folder / "base", tensors(), None, shards=[names[::2], names[1::2]])
    experts: dict[str, Any] = {"target_parameters": ["f.experts"], "target_modules": TARGETS}
    pissa = toys.lora("k.pissa", 24, 30, 5)
    return base, [
        write_adapter(folder / "one", adapter_tensors(3, 1), **experts),
        write_adapter(folder / "dora", dora_tensors(), **DORA_CONFIG),
        write_adapter(folder / "two", adapter_tensors(9, 5), r=9, use_rslora=True, **experts),
        write_adapter(folder / "pissa", pissa, r=5, init_lora_weights="pissa",
                      target_modules=["k.pissa"]),
    ]  # fmt: skip


def executed(
    inputs: tuple[Path, list[Any]], folder: Path, tile_bytes: int, threads: int,
    dtype: str | None, method: str = "sum",
) -> tuple[dict[str, str], list[dict[str, Any]]]:  # fmt: skip
    """Merge with tiles of a size; return the sha256 of every file, and the records."""
    plan = regraft.plan(*inputs, dtype=dtype, method=method)
    made = replace(plan, tile_bytes=tile_bytes, threads=threads)
    folder.mkdir()
    with workplace(folder / "out", overwrite=False) as place:
        place.begin("a merge")
        patch = PatchWriter(
            place.out / "patch.safetensors", section_names(made, corrections_of(made))
        )
        task = Task(made, merge_targets(made), corrections_of(made))
        outcome = execute(task, place, patch, (), None)
        patch.close()
    found = digests(folder / "out")
    if tile_bytes < SMALLEST_TILE:  # smaller than the units that are kept
        del found["patch.safetensors"]
    return found, [asdict(record) for record in outcome.records]


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every weights file in a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def test_this_base_meets_every_kind_of_work(inputs: tuple[Path, list[Path]]) -> None:
    steps = regraft.plan(*inputs).steps
    assert {feature for step in steps for feature in step.features} == {
        "lora", "dora", "token-rows", "pissa",
    }  # fmt: skip
    assert {step.action for step in steps} == {"copy", "merge", "replace"}
    assert {len(step.segments) for step in steps} == {0, 1, 5}
    assert max(len(step.deltas) for step in steps) == 10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_tiles_and_threads_change_no_byte_and_no_record(
    inputs: tuple[Path, list[Path]], tmp_path: Path, dtype: str | None
) -> None:
    expected = executed(inputs, tmp_path / "plain", 2**22, 1, dtype)
    assert len(expected[0]) == 3  # two files of weights, and what an undo needs
    weights = {name: digest for name, digest in expected[0].items() if name[:5] == "model"}
    for tile_bytes in TINY_TILES:
        for threads in (1, 2, 3, 8):
            folder = tmp_path / f"{tile_bytes}-{threads}"
            found = executed(inputs, folder, tile_bytes, threads, dtype)
            of_all = expected[0] if tile_bytes >= SMALLEST_TILE else weights
            assert found == (of_all, expected[1]), (
                f"tiles of {tile_bytes} bytes on {threads} threads"
            )


def merged(inputs: tuple[Path, list[Path]], out: Path, **options: Any) -> dict[str, Any]:
    """Merge and return the receipt as it was written, less what may differ between two runs."""
    regraft.merge(*inputs, out, command="the same", **options)
    receipt: dict[str, Any] = json.loads((out / "regraft" / "receipt.json").read_text())
    for name in ("created", "output", "digest"):
        del receipt[name]
    del receipt["files"]["README.md"]  # has the folder's name in it
    for name in ("seconds", "peak_memory", "threads"):
        del receipt["totals"][name]
    return receipt


def test_the_cap_and_the_threads_change_no_byte_and_no_receipt(
    inputs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    expected = merged(inputs, tmp_path / "plain")
    settings = [(SMALLEST_CAP, 1), (SMALLEST_CAP, 8), ("300MiB", 2), ("16GiB", 3), ("1GiB", 8)]
    for number, (cap, threads) in enumerate(settings):
        out = tmp_path / f"out{number}"
        assert merged(inputs, out, max_memory=cap, threads=threads) == expected
        assert digests(out) == digests(tmp_path / "plain")


def test_the_size_of_the_files_changes_no_tensor(
    inputs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    plain = merged(inputs, tmp_path / "plain")["tensors"]
    expected = {record.pop("name"): record | {"file": ""} for record in plain}
    for size in ("1KB", "20KB", "5GB"):
        found = merged(inputs, tmp_path / size, shard_size=size)["tensors"]
        assert {record.pop("name"): record | {"file": ""} for record in found} == expected


def test_two_runs_write_the_same_folder(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    for name in ("first", "second"):
        regraft.merge(*inputs, tmp_path / name / "out", command="the same")
    first, second = (toys.tree(tmp_path / name / "out") for name in ("first", "second"))
    receipts = [json.loads(found.pop("regraft/receipt.json") or b"") for found in (first, second)]
    assert first == second
    assert receipts[0]["tensors"] == receipts[1]["tensors"]


@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
def test_chance_falls_alike_where_rows_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Rows are worked on in two pieces each, or all in one."""
    columns, name = 2 * UNIT_COLUMNS, "a.wide"
    base = write_base(tmp_path / "base", {f"{name}.weight": draw(2, columns, dtype=BF16)})
    adapter = write_adapter(
        tmp_path / "a", toys.lora(name, 2, columns), target_modules=["wide"], lora_alpha=1
    )
    if kept:
        regraft.quantize(base, tmp_path / "4-bit", to="nf4")
        base = tmp_path / "4-bit"
    found = []
    for tile in (SMALLEST_TILE * 4, 4096):
        monkeypatch.setattr(planning, "SMALLEST_TILE", tile)
        monkeypatch.setattr(planning, "LARGEST_TILE", tile)
        out = tmp_path / str(tile)
        how = {"quantize": "keep" if kept else "nf4", "rounding": "stochastic", "undo": False}
        regraft.merge(base, adapter, out, **how)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
