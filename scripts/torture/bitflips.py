"""Flip bits of merged models, one at a time, and see that ``regraft.verify`` finds each.

    python -m torture.bitflips --small-all      every bit of every file of a tiny output
    python -m torture.bitflips --large 1000     random bits of an output of some 100 MB

A flip counts as found if ``verify`` reports a difference, or refuses a receipt that is not as it
was written. Anything else, such as another exception, counts as missed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import regraft

PREFIX = "base_model.model."


def write_inputs(folder: Path, tensors: int, rows: int, columns: int, rank: int) -> None:
    """Write a base in two shards, with a tokenizer, and an adapter for half of its tensors."""
    draw = np.random.default_rng(5)
    names = [f"layers.{number}.weight" for number in range(tensors)]
    weights = {name: draw.normal(size=(rows, columns)).astype(np.float16) for name in names}
    base = folder / "base"
    base.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in shard}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(base / "config.json", {"torch_dtype": "float16"})
    write_json(base / "tokenizer.json", {"version": "1.0"})
    factors = {}
    for name in names[: max(tensors // 2, 1)]:
        key = PREFIX + name.removesuffix(".weight")
        factors[f"{key}.lora_A.weight"] = draw.normal(size=(rank, columns)).astype(np.float32)
        factors[f"{key}.lora_B.weight"] = draw.normal(size=(rows, rank)).astype(np.float32)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    modules = [name.removesuffix(".weight") for name in names]
    write_json(
        adapter / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules},
    )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value))


def every_bit(files: Iterable[Path]) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, byte, bit) of every bit."""
    for path in files:
        for at in range(path.stat().st_size):
            for bit in range(8):
                yield path, at, bit


def random_bits(files: list[Path], count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Yield random bits; a file's share is that of its bytes, and each file gets some."""
    draw = random.Random(seed)
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        few = number < 10 * len(files)
        path = files[number % len(files)] if few else draw.choices(files, sizes)[0]
        yield path, draw.randrange(path.stat().st_size), draw.randrange(8)


def is_found(out: Path) -> bool:
    """Whether ``verify`` notices that a folder is not as it was written."""
    try:
        return not regraft.verify(out, receipt_only=True, threads=2).ok
    except regraft.FormatError:  # of the receipt
        return True


def torture(out: Path, flips: Iterable[tuple[Path, int, int]]) -> tuple[Counter[str], list[str]]:
    """Flip each bit, verify, and flip it back; return the flips by file, and those missed."""
    done: Counter[str] = Counter()
    missed = []
    for path, at, bit in flips:
        fd = os.open(path, os.O_RDWR)
        byte = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([byte[0] ^ (1 << bit)]), at)
        try:
            found = is_found(out)
        except Exception as error:
            found = False
            print(f"{path.name} {at}.{bit}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os.pwrite(fd, byte, at)
            os.close(fd)
        name = str(path.relative_to(out))
        done[name] += 1
        if not found:
            missed.append(f"{name} byte {at} bit {bit}")
    return done, missed


def run(title: str, folder: Path, count: int | None, seed: int, shape: tuple[int, ...]) -> bool:
    """Make an output, torture it, and print the table; return whether every flip was found."""
    write_inputs(folder, *shape)
    out = folder / "out"
    regraft.merge(folder / "base", folder / "adapter", out, command="regraft merge")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    if is_found(out):
        print(f"{title}: the untouched output does not verify")
        return False
    started = time.perf_counter()
    flips = every_bit(files) if count is None else random_bits(files, count, seed)
    done, missed = torture(out, flips)
    print(f"{title}: {sum(path.stat().st_size for path in files):,} bytes in {len(files)} files")
    for name, flipped in sorted(done.items()):
        print(f"  {flipped:>9,}  {name}")
    found = sum(done.values()) - len(missed)
    print(f"  {found:,} of {sum(done.values()):,} flips found, "
          f"in {time.perf_counter() - started:.0f} s")  # fmt: skip
    for miss in missed[:20]:
        print(f"  missed: {miss}")
    return not missed and not is_found(out)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small-all", action="store_true", help="every bit of a tiny output")
    parser.add_argument("--large", type=int, metavar="N", help="N random bits of a large output")
    parser.add_argument("--seed", type=int, default=1, help="of the random bits (1)")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    chosen = parser.parse_args()
    good = True
    for title, count, shape in (
        ("every bit of a small output", None if chosen.small_all else 0, (2, 2, 3, 1)),
        ("random bits of a large output", chosen.large or 0, (24, 1024, 2048, 16)),
    ):
        if count != 0:
            with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
                good &= run(title, Path(folder), count, chosen.seed, shape)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
