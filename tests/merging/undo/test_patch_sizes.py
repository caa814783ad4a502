"""Sizes that an undo patch states: held against what a section is for, before there is room."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file, save_file

import regraft
from deltas.undo.test_compression import claiming, without_a_size
from merging import toys
from regraft.errors import FormatError

PATCH = "regraft/undo/patch.safetensors"


def sections(model: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write a patch anew, with its sections as ``change`` makes them of name and content."""
    path = model / PATCH
    held = {name: change(name, value.tobytes()) for name, value in load_file(path).items()}
    save_file({name: np.frombuffer(c, np.uint8) for name, c in held.items()}, path)


def huge_lengths(content: bytes) -> bytes:
    """Return a table of lengths in which each is the largest that there is."""
    size = zstandard.frame_content_size(content)
    return zstandard.ZstdCompressor().compress(b"\xfe\xff\xff\xff" * (size // 4) + bytes(size % 4))


CLAIMS: dict[str, tuple[Callable[[str, bytes], bytes], str]] = {
    "a file's section states 16 GiB": (
        lambda name, content: claiming(2**34) if name.startswith("file:") else content,
        "a size of 17179869184 bytes",
    ),
    "a table states 16 GiB": (
        lambda name, content: claiming(2**34) if name.endswith("/units") else content,
        "a size of 17179869184 bytes",
    ),
    "a table states no size": (
        lambda name, content: without_a_size(b"x" * 6) if name.endswith("/units") else content,
        "no size",
    ),
    "a table that is longer than it can be": (
        lambda name, content: content + bytes(10**6) if name.endswith("/units") else content,
        "expected at most",
    ),
    "lengths of units of 4 GiB": (
        lambda name, content: huge_lengths(content) if name.endswith("/units") else content,
        "no unit longer than its weights",
    ),
    "lengths of chunks of 4 GiB": (
        lambda name, content: huge_lengths(content) if name.endswith("/chunks") else content,
        "chunks of at most",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CLAIMS)
def test_sizes_that_a_patch_states_are_held_against_what_it_is_for(
    base: Path, tmp_path: Path, what: str
) -> None:
    change, says = CLAIMS[what]
    head = {f"{toys.PREFIX}lm_head.weight": toys.draw(toys.VOCAB, toys.HIDDEN, seed=3)}
    tensors = {name: 3 * value for name, value in toys.attention().items()} | head
    adapter = toys.write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"])
    model = tmp_path / "merged"
    regraft.merge(base, adapter, model)
    sections(model, change)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=says):
            regraft.unmerge(model, tmp_path / "back", threads=1)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "back").exists()
