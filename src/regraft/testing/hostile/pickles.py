"""PyTorch files whose pickles are made by a grammar: what regraft reads of them, beside PyTorch.

A run fails if something other than a :class:`~regraft.errors.RegraftError` comes out, or if a file
that ``torch.load(weights_only=True)`` takes too is read as other names, shapes or values. What
PyTorch alone refuses is counted: flags and attributes that regraft passes over.
"""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from regraft.errors import RegraftError
from regraft.formats.torch_zip import read_torch_file
from regraft.tensors import TensorSpec
from regraft.testing.hostile.odd import damaged
from regraft.testing.hostile.report import (
    FuzzReport,
    attempt_case,
    reason,
    run_cases,
    scratch,
)

STORAGE_BYTES = 64
_STORAGES = {"FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
             "ByteStorage": 1, "BoolStorage": 1, "QInt8Storage": 1, "NoStorage": 4}  # fmt: skip
_GLOBALS = ("collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2",
            "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor",
            "torch.nn.parameter Parameter", "torch FloatStorage", "torch float32", "torch device",
            "builtins set", "os system", "builtins eval", "torch nn", "numpy ndarray",
            "collections Counter", "torch._tensor _rebuild_from_type_v2")  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 4, 8, 16, 17, 255, 65535, 2**31 - 1, -1, 2**40, 2**62, 2**63, 2**70)

Make = Callable[[random.Random, int], bytes]


def mutated_pickles(seed: int | str, count: int) -> Iterator[bytes]:
    """Yield PyTorch files: state dicts with all that may and may not be in one.

    Args:
        seed: the same seed makes the same files.
        count: how many.
    """
    for number in range(count):
        rng = random.Random(f"pickles {seed} {number}")
        program = b"\x80\x02" + _state_dict(rng) + b"."
        if rng.random() < 0.2:
            program = damaged(rng, program)
        yield _archive(program, byteorder=b"big" if rng.random() < 0.01 else b"little")


def _archive(program: bytes, *, byteorder: bytes) -> bytes:
    """Return a zip as ``torch.save`` writes it, with two records of values."""
    made = io.BytesIO()
    values = bytes(range(STORAGE_BYTES))
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in (("data.pkl", program), ("byteorder", byteorder), ("data/0", values),
                              ("data/1", values[::-1]), ("version", b"3\n")):  # fmt: skip
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # of no date
    return made.getvalue()


# The grammar: each function returns the instructions that leave one value on the stack


def _state_dict(rng: random.Random) -> bytes:
    count = rng.choice((0, 1, 1, 2, 3))
    odd = rng.random() < 0.15
    items = [_key(rng, i) + (_any(rng, 2) if odd else _tensor(rng)) for i in range(count)]
    start = _global("collections OrderedDict") + b")R" if rng.random() < 0.5 else b"}"
    return start + b"(" + b"".join(items) + b"u" + (_attributes(rng) if rng.random() < 0.1 else b"")


def _attributes(rng: random.Random) -> bytes:
    """What ``module.state_dict()`` keeps besides: versions of modules, as attributes."""
    return b"}" + _text("_metadata") + _any(rng, 1) + b"sb"


def _key(rng: random.Random, number: int) -> bytes:
    return (
        _any(rng, 1) if rng.random() < 0.03 else _text(rng.choice(("a.weight", "b", f"c{number}")))
    )


def _tensor(rng: random.Random) -> bytes:
    """A call of ``_rebuild_tensor_v2``, mostly with arguments that fit together."""
    kind, size = rng.choice(list(_STORAGES.items())[: 8 if rng.random() < 0.05 else 6])
    rows, columns = rng.choice((0, 1, 2, 3)), rng.choice((1, 2, 4))
    sound = rng.random() < 0.8
    elements = STORAGE_BYTES // size if sound else rng.choice(_NUMBERS)
    offset = rng.choice((0, 0, 0, 1)) if sound else rng.choice(_NUMBERS)
    shape = [rows, columns] if sound else [rng.choice(_NUMBERS) for _ in range(rng.randint(0, 3))]
    strides = [columns, 1] if rng.random() < 0.85 else [rng.choice(_NUMBERS) for _ in shape]
    parts = [_storage(rng, kind, elements), _number(offset), _tuple(shape), _tuple(strides),
             b"\x89", _global("collections OrderedDict") + b")R"]  # fmt: skip
    if rng.random() < 0.05:
        parts[rng.randrange(len(parts))] = _any(rng, 2)
    made = _call("torch._utils _rebuild_tensor_v2", parts)
    return _parameter(rng, made) if rng.random() < 0.2 else made


def _parameter(rng: random.Random, tensor: bytes) -> bytes:
    return _call(
        "torch._utils _rebuild_parameter",
        [tensor, rng.choice((b"\x88", b"\x89")), _global("collections OrderedDict") + b")R"],
    )


def _storage(rng: random.Random, kind: str, elements: int) -> bytes:
    key = rng.choice(("0", "1", "0", "2")) if rng.random() < 0.9 else rng.choice(("", "../0", "x"))
    place = _text("cpu" if rng.random() < 0.95 else "cuda:0")
    named = _text("storage") + _global(f"torch {kind}") + _text(key) + place
    return b"(" + named + _number(elements) + b"tQ"


def _any(rng: random.Random, depth: int) -> bytes:
    """Any value, nested at most so deep."""
    leaves: tuple[Make, ...] = (
        lambda rng, _: _number(rng.choice(_NUMBERS)),
        lambda rng, _: _text(rng.choice(("", "a", "\x1b[2J", "x" * 300))),
        lambda rng, _: rng.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f")),
        lambda rng, _: _global(rng.choice(_GLOBALS)),
        lambda rng, _: b"G" + struct.pack(">d", rng.choice((0.5, float("nan"), 1e300))),
        lambda rng, _: _tensor(rng),
    )
    nested: tuple[Make, ...] = (
        lambda rng, d: b"(" + b"".join(_any(rng, d - 1) for _ in range(rng.randint(0, 3))) + b"t",
        lambda rng, d: b"](" + b"".join(_any(rng, d - 1) for _ in range(rng.randint(0, 3))) + b"e",
        lambda rng, d: b"}" + _text("k") + _any(rng, d - 1) + b"s",
        lambda rng, d: _call(rng.choice(_GLOBALS), [_any(rng, d - 1)]),
        lambda rng, d: _any(rng, d - 1) + b"q\x05h\x05" + rng.choice((b"\x86", b"\x87", b"a")),
    )
    return rng.choice(leaves if depth == 0 or rng.random() < 0.4 else nested)(rng, depth)


def _call(name: str, arguments: list[bytes]) -> bytes:
    return _global(name) + b"(" + b"".join(arguments) + b"tR"


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(values: list[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


# The run


def run_pickles(count: int, seed: int | str = 0, folder: Path | None = None) -> FuzzReport:
    """Read PyTorch files with regraft and with ``torch.load(weights_only=True)``.

    Args:
        count: how many.
        seed: of :func:`mutated_pickles`.
        folder: where a scratch file may lie; a temporary one by default.
    """
    report = FuzzReport("pickles")
    with scratch(folder) as place:
        path = place / "pytorch_model.bin"

        def one(content: bytes) -> None:
            path.write_bytes(content)
            ours = attempt_case(report, lambda: read_torch_file(path), content)
            if isinstance(ours, RegraftError):
                report.refused += 1
                report.reasons[reason(ours)] += 1
                report.stricter[reason(ours)] += _is_state_dict(_theirs(content))
            elif ours is not None:
                _compare(report, content, ours)

        run_cases(report, mutated_pickles(seed, count), count, one)
    return report


def _compare(report: FuzzReport, content: bytes, ours: dict[str, TensorSpec]) -> None:
    """Count what regraft took, and hold it against PyTorch."""
    report.accepted += 1
    theirs = _theirs(content)
    if theirs is None:
        report.reasons["accepted, but PyTorch refuses it"] += 1
    elif trouble := _difference(content, ours, theirs):
        report.differ(trouble, content.hex())


def _theirs(content: bytes) -> Any:
    """Return what PyTorch reads, None where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols
            return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:  # of whatever kind: it is what PyTorch refuses
        return None


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values())


def _difference(content: bytes, ours: dict[str, TensorSpec], theirs: Any) -> str | None:
    found = {k: v for k, v in theirs.items() if isinstance(v, torch.Tensor)}
    if found.keys() != ours.keys():
        return "other names"
    for name, tensor in found.items():
        spec = ours[name]
        plain = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().flatten())
        raw = plain.view(torch.uint8).numpy().tobytes()
        ours_raw = content[spec.start : spec.start + spec.nbytes]
        if tuple(tensor.shape) != spec.shape:
            return f"another shape of {name!r}"
        if spec.dtype == "BOOL":  # PyTorch makes a byte that is neither 0 nor 1 a 1
            ours_raw = bytes(map(bool, ours_raw))
        if raw != ours_raw:
            return f"other bytes of {name!r}"
    return None
