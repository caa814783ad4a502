"""A model as mlx-lm reads it: the same weights, and what its config lacks at its top level.

transformers 5 writes the rotary embedding's parameters into ``rope_parameters`` and renames counts
of experts. mlx-lm looks for the keys of published configs, and takes defaults in silence where it
does not find them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import open_regular, read_at
from regraft.formats.problems import quoted
from regraft.merging.files.direct_io import OutputFile
from regraft.merging.files.publish import copy_file, write_file
from regraft.merging.files.side_files import json_bytes, plan_side_files
from regraft.merging.files.staging import Workplace
from regraft.merging.inputs.base import see
from regraft.progress import Progress, ProgressMeter

CONFIG, INDEX = "config.json", "model.safetensors.index.json"

_TWINS = (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts"))
_MOVED = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_PIECE = 4 * 2**20
_WINDOWLESS = ("gemma2", "mistral", "phi3", "qwen2", "qwen3", "starcoder2")
"""Kinds of models whose limited window mlx-lm does not keep to."""


def mlx_config(config: Mapping[str, Any], *, has_head: bool) -> dict[str, Any]:
    """Return a config with the keys that mlx-lm looks for; those that are there stay as they are.

    Args:
        config: as transformers 4 or 5 wrote it.
        has_head: whether the model has an output head of its own.

    Raises:
        UnsupportedError: its layers look back in an order that mlx-lm cannot be told.
    """
    found = {"tie_word_embeddings": not has_head, **_added(config), **config}
    inner = config.get("text_config")
    if isinstance(inner, dict):
        found["text_config"] = {**_added(inner), **inner}
    return found


def _added(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        found |= _of_rope(rope)
    for name, twin in _TWINS:
        if config.get(twin) is not None and config.get(name) is None:
            found[name] = config[twin]
    if config.get("model_type") == "gemma3_text" and config.get("layer_types"):
        found["sliding_window_pattern"] = _pattern(config["layer_types"])
    return {key: value for key, value in found.items() if config.get(key) is None}


def _of_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    local = rope.get("sliding_attention")
    whole = rope["full_attention"] if isinstance(rope.get("full_attention"), dict) else rope
    found = {key: whole[key] for key in _MOVED if whole.get(key) is not None}
    if isinstance(local, dict) and local.get("rope_theta") is not None:
        found["rope_local_base_freq"] = local["rope_theta"]
    kind = whole.get("rope_type", "default")
    if kind != "default":
        scaling = {key: value for key, value in whole.items() if key != "rope_theta"}
        found["rope_scaling"] = {"type": kind, **scaling}
    return found


def _pattern(kinds: Iterable[str]) -> int:
    """Return of how many layers the last one looks back without a limit."""
    limited = [kind == "sliding_attention" for kind in kinds]
    every = limited.index(False) + 1 if False in limited else len(limited) + 1
    if limited != [(layer + 1) % every != 0 for layer in range(len(limited))]:
        raise UnsupportedError(
            "mlx-lm cannot be told which layers look back a limited number of tokens",
            where="layer_types", expected="every n-th layer without a limit",
            found=quoted(str(list(kinds))), hint="Serve the model with transformers or vLLM",
        )  # fmt: skip
    return every


def window_note(config: Mapping[str, Any]) -> str | None:
    """Return what a user should know of a limited window that mlx-lm does not keep to."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    is_used = config.get("use_sliding_window") is not False
    if not window or not is_used or window >= longest:
        return None
    if config.get("model_type") not in _WINDOWLESS:
        return None
    return (
        f"the model looks back {window} tokens; mlx-lm lets it look back without a limit, so "
        "answers differ on longer texts"
    )


def check_for_mlx(stored: Checkpoint) -> None:
    """Refuse a model whose weights mlx-lm would not read.

    Raises:
        UnsupportedError: it is quantized, has no config, or has other files than it looks for.
    """
    if see(stored)[1] is not None:
        raise UnsupportedError(
            "mlx-lm does not read weights that are quantized in this way", where=stored.source,
            hint="Write plain weights first: regraft dequantize; then mlx_lm.convert -q",
        )  # fmt: skip
    names = [shard.name for shard in stored.shards]
    odd = [n for n in names if not (n.startswith("model") and n.endswith(".safetensors"))]
    if odd:
        raise UnsupportedError(
            "mlx-lm does not read these files", where=stored.source,
            expected="model*.safetensors", found=", ".join(map(quoted, odd[:3])),
            hint="Write such files first: regraft convert MODEL -o NEW --shard-size 5GB",
        )  # fmt: skip
    if stored.config is None:
        raise UnsupportedError("which kind of model it is cannot be told", where=stored.source,
                               expected="a folder with config.json")  # fmt: skip


def write_mlx(
    stored: Checkpoint, config: Mapping[str, Any], work: Workplace, *, share: bool,
    progress: Progress | None,
) -> tuple[str, ...]:  # fmt: skip
    """Write the folder; return the names of its files.

    Args:
        stored: the model as it is on disk.
        config: its config, as mlx-lm wants it.
        work: where to build.
        share: whether weights may share blocks of the disk with the model's own files.
        progress: told of the bytes of weights.
    """
    told = ProgressMeter(progress, "export", sum(_size(s.path) for s in stored.shards))
    sides = side_files(stored)
    for shard in stored.shards:
        copy_weights(shard.path, work.out / shard.name, told, share=share)
    for name, path in sides.items():
        copy_file(path, work.out / name)
    write_file(work.out / CONFIG, json_bytes(config))
    return (CONFIG, *sorted(sides), *(shard.name for shard in stored.shards))


def side_files(stored: Checkpoint) -> dict[str, Path]:
    """Return what goes along: name to path; the index among them."""
    sides = dict(plan_side_files(stored.root, [], code=False).files)
    index = stored.root / INDEX
    return sides | ({INDEX: index} if index.is_file() else {})


def nbytes_for_mlx(stored: Checkpoint) -> int:
    """Return what the folder takes."""
    own = [shard.path for shard in stored.shards]
    return sum(map(_size, [*own, *side_files(stored).values()]))


def _size(path: Path) -> int:
    return path.stat().st_size


def copy_weights(source: Path, path: Path, told: ProgressMeter, *, share: bool) -> None:
    """Copy a file of weights, or have it share blocks of the disk; it is flushed to the disk.

    Raises:
        InputError, AccessError, DiskSpaceError: the system refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = _size(source)
    fd = open_regular(source)
    try:
        file = OutputFile(path, size, [], share=share)
        whole = False
        try:
            if share:
                file.share(0, size, (fd, 0))
            written = sum(last - first for first, last in file.unshared(0, size))
            told.add(size - written)
            for first, last in file.unshared(0, size):
                _copy_range(fd, source, file, (first, last), told)
            whole = True
        finally:
            file.close(sync=whole)
    finally:
        os.close(fd)
    told.add(0, path.name)


def _copy_range(
    fd: int, source: Path, file: OutputFile, part: tuple[int, int], told: ProgressMeter
) -> None:
    for at in range(part[0], part[1], _PIECE):
        data = read_at(fd, source, at, min(_PIECE, part[1] - at))
        file.write(at, memoryview(data), np.frombuffer(data, np.uint8).ctypes.data)
        told.add(len(data))
