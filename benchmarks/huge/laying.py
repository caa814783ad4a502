"""Lay the model down as files with holes: attention layers hold numbers, all else is zeros.

    python -m benchmarks.huge.laying --out DIR --shape '{"format": "fp8", "layers": 2}' [--known]

writes ``DIR/base`` and ``DIR/adapter``. The numbers of the attention layers lie in one file of
random ones, whose blocks they share, so laying two terabytes takes seconds. ``--known`` puts the
digests of all tensors where ``regraft digest`` would put them (``REGRAFT_CACHE``): each tensor of
numbers is read and hashed as it does, and zeros once for each size.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
from blake3 import blake3

from benchmarks.huge.kimi import ATTENTION, Kimi, Tensor
from benchmarks.shared.synthetic import adapter_config
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.files.known_digests import KnownDigests
from regraft.formats.files.reading import FilePool
from regraft.formats.hub import locate
from regraft.formats.safetensors import build_header
from regraft.merging.files.direct_io import whole_blocks
from regraft.system.positioned import write_all
from regraft.system.sharing import share_blocks
from regraft.tensors import TensorSpec

DISK_BLOCK = 4096
NUMBERS = 2**27
"""Bytes of random numbers; larger than any tensor that takes them."""

STRIDE = 1801 * DISK_BLOCK
"""Each tensor begins this much further into the numbers than the one before it."""

CODE_STD, SCALE, WEIGHT_STD, FACTOR_STD = 100.0, 2e-4, 0.02, 0.01
ALPHA = 4


@dataclass
class Numbers:
    """A file of random numbers, whose blocks are lent to tensors."""

    path: Path
    fd: int
    content: memoryview
    used: int = 0

    @classmethod
    def made(cls, path: Path, format: str) -> Numbers:
        normal = np.random.default_rng(0).standard_normal(NUMBERS // 2, dtype=np.float32)
        if format == "fp8":
            codes = np.clip(normal * np.float32(CODE_STD), -448, 448)
            half = codes.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            raw = np.concatenate([half, half[::-1]])
        else:
            raw = (normal * np.float32(WEIGHT_STD)).astype(ml_dtypes.bfloat16).view(np.uint8)
        path.write_bytes(raw.data)
        return cls(path, os.open(path, os.O_RDONLY), raw.data)

    def put(self, fd: int, start: int, nbytes: int) -> None:
        """Fill a range of a file: whole blocks are lent, the edges of the range written."""
        self.used = (self.used + STRIDE) % (NUMBERS - nbytes - DISK_BLOCK)
        begin = self.used // DISK_BLOCK * DISK_BLOCK + start % DISK_BLOCK
        first, last = whole_blocks(start, nbytes)
        if first < last and not share_blocks(
            self.fd, begin + first - start, fd, first, last - first
        ):
            raise OSError(f"blocks of {self.path} cannot be shared")
        write_all(fd, self.content[begin : begin + first - start], start)
        write_all(fd, self.content[begin + last - start : begin + nbytes], last)


def lay(out: Path, kimi: Kimi, rank: int) -> None:
    """Write base and adapter."""
    base, adapter = out / "base", out / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    numbers = Numbers.made(out / "numbers", kimi.format)
    files = kimi.files()
    for name, tensors in files.items():
        _lay_file(base / name, tensors, numbers)
    os.close(numbers.fd)
    numbers.path.unlink()
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(base / "model.safetensors.index.json", index)
    _write_json(base / "config.json", kimi.config())
    _lay_adapter(adapter, kimi, rank)


def _lay_file(path: Path, tensors: Sequence[Tensor], numbers: Numbers) -> None:
    header = _header(tensors)
    with path.open("wb") as file:
        file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
        file.write(header)
        file.flush()
        at = len(header)
        for tensor in tensors:
            if tensor.dtype == "F32" and tensor.name.endswith("_scale_inv"):
                scales = np.full(tensor.shape, SCALE, np.float32)
                write_all(file.fileno(), scales.view(np.uint8).data.cast("B"), at)
            elif tensor.is_merged:
                numbers.put(file.fileno(), at, tensor.nbytes)
            at += tensor.nbytes


def _lay_adapter(folder: Path, kimi: Kimi, rank: int) -> None:
    tensors, rng = kimi.adapter(rank), np.random.default_rng(1)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            factor = rng.standard_normal(tensor.shape, np.float32) * np.float32(FACTOR_STD)
            file.write(factor.astype(ml_dtypes.bfloat16).tobytes())
    _write_json(folder / "adapter_config.json", adapter_config(rank, ALPHA, ATTENTION))


def _header(tensors: Sequence[Tensor]) -> bytes:
    return build_header([(t.name, t.dtype, t.shape) for t in tensors], {"format": "pt"})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- known digests ---------------------------------------------------------------------------------


def make_known(base: Path) -> None:
    """Keep the digests of all tensors, as ``regraft digest`` does.

    Raises:
        OSError: they are not kept: this file system's times are not believed.
    """
    known, stored = KnownDigests.of_user(), open_checkpoint(locate(base, kind="base"))
    with FilePool() as files:
        for shard in stored.shards:
            specs = [stored.tensors[name] for name in shard.tensors]
            digests = {(s.start, s.nbytes): _digest(s, files) for s in specs}
            if not known.remember(shard.path, digests, own=True):
                raise OSError(f"digests of {shard.path} are not kept")


def _digest(spec: TensorSpec, files: FilePool) -> str:
    numbered = Tensor(spec.name, spec.dtype, spec.shape).is_merged or spec.dtype == "F32"
    return files.digest(spec) if numbered else _digest_of_zeros(spec.nbytes)


@cache
def _digest_of_zeros(nbytes: int) -> str:
    digest, piece = blake3(), bytes(2**20)
    for start in range(0, nbytes, len(piece)):
        digest.update(piece[: nbytes - start])
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Lay down a model of the shape of Kimi K2.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make base/, adapter/ in")
    parser.add_argument("--shape", type=json.loads, required=True, help="of Kimi, as JSON")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--known", action="store_true", help="keep the digests of all tensors")
    options = parser.parse_args(arguments)
    lay(options.out, Kimi(**options.shape), options.rank)
    if options.known:
        make_known(options.out / "base")


if __name__ == "__main__":
    main()
