"""Reading an adapter from disk into memory, in one piece."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from regraft.adapters.fingerprint import KEY, mismatch
from regraft.adapters.known_settings import unknown_note
from regraft.adapters.lora_config import VELORA
from regraft.adapters.model import Adapter
from regraft.errors import BaseMismatchWarning, ChangedError, UnsupportedError, redacted
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import Stamp, watched
from regraft.formats.hub import locate
from regraft.merging.compute.factors import not_finite
from regraft.merging.inputs.any_dialect import open_adapter
from regraft.merging.inputs.expert_stacks import check_version, with_version
from regraft.merging.options import parse_dtype
from regraft.merging.planning.match import prefix_changes
from regraft.runtime.model.fingerprint import compare
from regraft.runtime.model.live_base import LiveBase, torch_dtype_of
from regraft.runtime.model.matching import LiveAdapter, adapter_of
from regraft.tensors import DTYPES, TensorSpec


def open_files(
    source: str | Path,
    token: str | None = None,
    peft_version: str | None = None,
    base: Checkpoint | None = None,
) -> AdapterFiles:
    """Open an adapter's files: a folder, or a Hub id ``org/name[@revision]``.

    Args:
        source: the folder or id.
        token: Hub token.
        peft_version: the release of PEFT that trained it, where its config does not say so.
        base: the model it is for, seen as a checkpoint; some dialects cannot be read without.

    Raises:
        UsageError: ``peft_version`` is no release that tells anything.
        ChangedError: a file was changed meanwhile.
        RegraftError: it is none, or is malformed.
    """
    check_version(peft_version)
    with watched(to_the_end=True) as watch:
        files = open_adapter(locate(source, kind="adapter", token=token), base)
    seen = watch.first(files.root / files.weights_file)
    return with_version(replace(files, seen=seen), peft_version)


def load(name: str, files: AdapterFiles, adapter: Adapter) -> LiveAdapter:
    """Read an adapter's tensors, in the dtype that they have.

    All tensors of a file lie in one piece of memory, so they can be moved in one piece.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
        ChangedError: the file was changed meanwhile, or since its header was read.
        AccessError, FormatError: the file cannot be read as its header says.
    """
    specs = list(files.tensors.values())
    begin = min(spec.start for spec in specs)
    end = max(spec.start + spec.nbytes for spec in specs)
    whole = TensorSpec("", "U8", (end - begin,), specs[0].path, begin, end - begin)
    raw = torch.empty(end - begin, dtype=torch.uint8)
    with watched(to_the_end=True) as watch, FilePool() as pool:
        pool.read_into(whole, 0, memoryview(raw.numpy()))
        _check_since(files, watch.first(whole.path))
    tensors = {key: _view(raw, spec, begin) for key, spec in files.tensors.items()}
    if not _is_finite(raw, specs):
        check_finite(tensors, files.tensors)
    return LiveAdapter(name, dict(files.config), adapter, tensors, dict(files.metadata))


def _check_since(files: AdapterFiles, now: Stamp | None) -> None:
    """Refuse a file that is another one than that whose header and config were read.

    With a cache that may be long ago. New modes and links of a file are no change.

    Raises:
        ChangedError: it is.
    """
    if files.seen is not None and now is not None and not now.is_of_same_content(files.seen):
        raise ChangedError(
            "the adapter's file was changed since it was looked at", where=files.weights_shown,
            expected="the file whose header and config were read",
            hint="Load the adapter again (load_adapter), under another name or once it is deleted",
        )  # fmt: skip


def _view(raw: torch.Tensor, spec: TensorSpec, begin: int) -> torch.Tensor:
    part = raw[spec.start - begin : spec.start - begin + spec.nbytes]
    if part.storage_offset() % max(DTYPES[spec.dtype].bits // 8, 1):
        part = part.clone()
    return part.view(torch_dtype_of(spec.dtype)).reshape(spec.shape)


def _is_finite(raw: torch.Tensor, specs: Sequence[TensorSpec]) -> bool:
    """Whether one look at all the memory shows that every value in it is finite."""
    kinds = {spec.dtype for spec in specs}
    if len(kinds) != 1 or sum(spec.nbytes for spec in specs) != raw.numel():
        return False
    return _sums_up(raw.view(torch_dtype_of(kinds.pop())))


def _sums_up(values: torch.Tensor) -> bool:
    """Whether the sum of values is finite: quicker than to look at each, and rarely wrong."""
    return bool(torch.isfinite(torch.sum(values, dtype=torch.float32)))


def check_finite(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Refuse NaN and infinity.

    Raises:
        AdapterError: a tensor holds some; the first one is named.
    """
    for key, tensor in tensors.items():
        if _sums_up(tensor):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise not_finite(specs[key], bad)


def prepared(
    adapter: LiveAdapter,
    base: LiveBase,
    dtype: torch.dtype | str | None = None,
    *,
    is_trainable: bool = False,
) -> LiveAdapter:
    """Return an adapter as a model wants it: on its device, in a dtype, ready for training.

    Args:
        adapter: as it was loaded.
        base: the model.
        dtype: of its tensors; by default as they are, or float32 for training.
        is_trainable: whether its tensors are to be trained.

    Raises:
        UsageError: the dtype is none.
        UnsupportedError: it is to be trained, and is VeLoRA's.
    """
    if is_trainable and adapter.config.get("velora_config"):
        raise UnsupportedError(VELORA[0], where=repr(adapter.name), hint=VELORA[1])
    wanted = torch_dtype(dtype) or (torch.float32 if is_trainable else None)
    device = base.device
    frozen_b = str(adapter.config.get("init_lora_weights")).lower() == "mica"  # it trains A alone
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in adapter.tensors.items():
        moved = tensor.to(device=device, dtype=wanted or tensor.dtype)
        trained = not (frozen_b and ".lora_B." in key)
        tensors[key] = nn.Parameter(moved.clone(), trained) if is_trainable else moved
    if is_trainable and adapter.config.get("ensure_weight_tying"):
        _tie(tensors, adapter.adapter, base.tied)
    if wanted is None:
        return replace(adapter, tensors=tensors)
    described = adapter_of(adapter.name, adapter.config, tensors, adapter.adapter.source)
    return replace(adapter, tensors=tensors, adapter=described)


def _tie(tensors: dict[str, torch.Tensor], adapter: Adapter, tied: Mapping[str, str]) -> None:
    """Let both sides of a tie be one parameter again; in a file they are two tensors.

    Sides that have come to differ stay two: which of them is right is not known.

    Args:
        tensors: by key; changed.
        adapter: what they are.
        tied: the model's tied parameters, by the name of the other side.
    """
    keys = {whole.parameter: whole.spec.name for whole in adapter.whole}
    for name, owner in tied.items():
        mine, other = keys.get(name), keys.get(owner)
        if mine and other and torch.equal(tensors[mine], tensors[other]):
            tensors[mine] = tensors[other]
    pairs = {target.module: target for target in adapter.targets}
    for name, owner in tied.items():
        head, embedding = (pairs.get(n.removesuffix(".weight")) for n in (name, owner))
        if head is None or embedding is None or (head.kind, embedding.kind) != _SIDES:
            continue
        for factor, of_embedding in ((head.a, embedding.b), (head.b, embedding.a)):
            turned = tensors[of_embedding.name].t()
            if torch.equal(tensors[factor.name], turned):
                tensors[factor.name] = turned


_SIDES = ("linear", "embedding")
"""Kinds of the two sides of a tie: a head, which gets the embedding's factors turned round."""


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a torch dtype for ``"bfloat16"``, ``"BF16"``, ``torch.bfloat16``, ...; None for None.

    Raises:
        UsageError: it is none that adapters can have.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = parse_dtype(dtype)
    return torch_dtype_of(found) if found else None


def without_values(
    name: str, files: AdapterFiles, adapter: Adapter, dtype: torch.dtype | str | None = None
) -> LiveAdapter:
    """Return an adapter whose tensors have shapes and no values, to see whether it fits.

    They require gradients, so that nothing is computed from them beforehand.
    """
    wanted = torch_dtype(dtype)
    tensors = {
        key: torch.empty(spec.shape, dtype=wanted or torch_dtype_of(spec.dtype), device="meta")
        for key, spec in files.tensors.items()
    }
    for tensor in tensors.values():
        tensor.requires_grad_(tensor.is_floating_point())
    return LiveAdapter(name, dict(files.config), adapter, tensors)


def bytes_in_use(adapter: LiveAdapter, base: LiveBase) -> int:
    """Return the bytes that an adapter takes while it is used, at most.

    On a model in 16 bits, factors get a copy in 16 bits (see
    :class:`regraft.runtime.forward.layers.quick.Quick`).
    """
    size: int = base.dtype.itemsize
    if size >= torch.float32.itemsize:
        return adapter.nbytes
    floats: int = sum(t.numel() for t in adapter.tensors.values() if t.is_floating_point())
    return adapter.nbytes + size * floats


def warn_of(name: str, files: AdapterFiles, adapter: Adapter, base: LiveBase) -> None:
    """Warn of settings that are not known, of other names, and of another base's fingerprint."""
    for note in (*adapter.notes, *unknown_note(f"adapter {name!r}", adapter.settings.unknown)):
        warnings.warn(note, UserWarning, stacklevel=4)
    changes = prefix_changes(base.index, adapter)
    for change in changes:
        warnings.warn(change.note(f"adapter {name!r}"), UserWarning, stacklevel=4)
    carried = files.metadata.get(KEY)
    rename = changes[0].in_base if changes else str
    if carried is None or compare(carried, base, rename) != "another":
        return
    message = mismatch(name, files.config.get("base_model_name_or_path"), base.checkpoint.source)
    warnings.warn(redacted(message), BaseMismatchWarning, stacklevel=4)
