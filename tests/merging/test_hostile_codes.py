"""Quantized weights as a stranger may write them: a typed error before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import regraft
from merging import toys
from merging.quantized_bases import write_quantized
from merging.toys import Q0, tree, write_adapter
from regraft.errors import FormatError, RegraftError

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]
CODES = f"{Q0}.weight"
STATE = f"{CODES}.quant_state.bitsandbytes__nf4"


def rewrite(base: Path, change: Change) -> Path:
    """Put all tensors of a base into one file, changed; return the base."""
    tensors: Tensors = {}
    for path in sorted(base.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (base / toys.INDEX).unlink()
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, base / "model.safetensors")
    return base


def state(**fields: Any) -> Change:
    """Return what changes fields of a weight's state."""

    def change(tensors: Tensors) -> None:
        found = json.loads(tensors[STATE].numpy().tobytes())
        tensors[STATE] = text(json.dumps(found | fields))

    return change


def text(value: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8)


def put(name: str, value: Any) -> Change:
    """Return what sets (or makes from the old one, or with None removes) a tensor."""

    def change(tensors: Tensors) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value

    return change


STATES: dict[str, Change] = {
    f"{field} {str(value)[:20]}": state(**{field: value})
    for field, values in {
        "shape": [[2**40, 2**40], [-16, -16], [16.0, 16.0], [0, 16], [], [16] * 9, "16", None,
                  [True, 256], {"a": 1}, [[16], 16], [256, 10**400], [16, 15], [2**47, 2**47]],
        "blocksize": [0, -64, 64.5, "64", None, [64], {}, 3, 2**70, True, 65],
        "dtype": ["int8", None, 3, [], {}, "torch.bfloat16", "x" * 10**5, "float64"],
        "quant_type": ["fp4", None, 1, [], "af4"],
        "nested_offset": ["1", None, [], 1e400, 10**400, True, 1e39],
    }.items()
    for value in values
}  # fmt: skip
STATES |= {
    "deep": put(STATE, text("[" * 30_000 + "]" * 30_000)),
    "deep in a field": put(STATE, text('{"shape":' + "[" * 20_000 + "]" * 20_000 + "}")),
    "many digits": put(STATE, text('{"blocksize":' + "9" * 60_000 + "}")),
    "a list": put(STATE, text("[]")),
    "not a number": put(STATE, text('{"blocksize":NaN,"nested_offset":Infinity}')),
    "no text": put(STATE, torch.full((90,), 0xFF, dtype=torch.uint8)),
    "empty": put(STATE, torch.empty(0, dtype=torch.uint8)),
    "in floats": put(STATE, lambda t: t.float()),
}
PARTS: dict[str, Change] = {
    **{f"{part} in {dtype}": put(f"{CODES}.{part}", lambda t, d=dtype: t.to(d))
       for part in ("absmax", "quant_map")
       for dtype in (torch.float16, torch.float64, torch.int32, torch.bool, torch.uint8)},
    "codes in float64": put(CODES, lambda t: t.double()),
    "codes in two more": put(CODES, lambda t: torch.cat([t, t[:2]])),
    "no codes": put(CODES, torch.empty((0, 1), dtype=torch.uint8)),
    "scales of infinity": put(f"{CODES}.absmax", lambda t: t / 0),
    "scales of no size": put(f"{CODES}.absmax", torch.empty(0)),
    "a map of other levels": put(f"{CODES}.quant_map", lambda t: t.flip(0)),
    "codes are missing": put(CODES, None),
    "a second state": put(f"{CODES}.quant_state.bitsandbytes__fp4",
                          text('{"quant_type":"fp4","blocksize":64,"dtype":"bfloat16",'
                               '"shape":[16,16]}')),
    "int8 scales beside": put(f"{Q0}.SCB", torch.ones(16)),
    "scales that belong to nobody": put("model.norm.SCB", torch.ones(16)),
    "a weight within a weight": put(
        f"{CODES}.absmax.quant_state.bitsandbytes__nf4",
        text('{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[2,16]}')),
    "a nameless weight": put(".quant_state.bitsandbytes__nf4", text("{}")),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES | PARTS)
def test_what_is_damaged_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    base = rewrite(write_quantized(tmp_path / "base", "nf4"), (STATES | PARTS)[name])
    assert_refused(base, tmp_path)


def assert_refused(base: Path, tmp_path: Path, says: str = "") -> None:
    """Fail unless every verb refuses a base, by tensor, and leaves everything as it is."""
    adapter = write_adapter(tmp_path / "adapter")
    before = tree(tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: regraft.merge(base, adapter, tmp_path / "out"),
        lambda: regraft.merge(base, adapter, tmp_path / "out", quantize="keep"),
        lambda: regraft.dequantize(base, tmp_path / "out"),
        lambda: regraft.quantize(base, tmp_path / "out", "fp4"),
    ]
    for call in calls:
        with pytest.raises(RegraftError, match=says or ".") as caught:
            call()
        assert isinstance(caught.value, FormatError)
        assert all(problem.where for problem in caught.value.problems[:50])
        assert len(str(caught.value)) < 30_000
        assert tree(tmp_path) == before


INT8: dict[str, Change] = {
    "codes of three axes": put(CODES, lambda t: t[None]),
    "codes in uint8": put(CODES, lambda t: t.byte()),
    "scales in float16": put(f"{Q0}.SCB", lambda t: t.half()),
    "a scale too few": put(f"{Q0}.SCB", lambda t: t[1:]),
    "NaN": put(f"{Q0}.SCB", lambda t: t * float("nan")),
    "codes are missing": put(CODES, None),
    "codes in floats": put(CODES, lambda t: t.float()),
}


@pytest.mark.parametrize("name", INT8)
def test_damaged_int8_is_refused(tmp_path: Path, name: str) -> None:
    assert_refused(rewrite(write_quantized(tmp_path / "base", "int8"), INT8[name]), tmp_path)


FP8: dict[str, Change] = {
    "scales of three axes": put(f"{CODES}_scale_inv", lambda t: t[None]),
    "scales of no size": put(f"{CODES}_scale_inv", torch.empty(0)),
    "scales in integers": put(f"{CODES}_scale_inv", lambda t: t.int()),
    "scales that do not divide": put(f"{CODES}_scale_inv", torch.ones(7, 3)),
    "NaN": put(f"{CODES}_scale_inv", lambda t: t * float("nan")),
    "no scales": put(f"{CODES}_scale_inv", None),
    "codes are missing": put(CODES, None),
    "codes of no rows": put(CODES, lambda t: t[:0]),
}


@pytest.mark.parametrize("name", FP8)
def test_damaged_fp8_is_refused(tmp_path: Path, name: str) -> None:
    assert_refused(rewrite(write_quantized(tmp_path / "base", "fp8"), FP8[name]), tmp_path)


@pytest.mark.slow
def test_thousands_of_problems_are_capped(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors |= {f"m.{n}.weight.quant_state.bitsandbytes__nf4": text("{") for n in range(5000)}

    base = rewrite(write_quantized(tmp_path / "base", "nf4"), change)
    assert_refused(base, tmp_path, "more problems of this kind are not shown")


def test_two_ways_of_scaling_one_weight_are_refused(tmp_path: Path) -> None:
    """FP8 scales under two names: whichever is taken, the other says something else."""
    scales = {f"{CODES}_scale": torch.full((2, 1), 3.0)}
    base = rewrite(
        write_quantized(tmp_path / "base", "fp8"), lambda tensors: tensors.update(scales)
    )
    assert_refused(base, tmp_path)


@pytest.mark.slow
def test_both_methods_of_bitsandbytes_in_one_model_are_read(tmp_path: Path) -> None:
    four, eight = (write_quantized(tmp_path / kind, kind) for kind in ("nf4", "int8"))
    others = {k: v for path in eight.glob("*.safetensors") for k, v in load_file(path).items()}

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{CODES}")]:
            del tensors[name]
        tensors |= {name: t for name, t in others.items() if name.startswith(f"{Q0}.")}

    rewrite(four, change)
    adapter = write_adapter(tmp_path / "adapter")
    receipt = regraft.merge(four, adapter, tmp_path / "out", quantize="keep")
    assert set(receipt.base_formats) == {"nf4", "int8"}
    regraft.dequantize(four, tmp_path / "plain")
    regraft.dequantize(eight, tmp_path / "eight")
    (found,), (expected,) = (
        [load_file(path)[CODES] for path in (tmp_path / folder).glob("*.safetensors")
         if CODES in load_file(path)]
        for folder in ("plain", "eight")
    )  # fmt: skip
    assert torch.equal(found, expected)
    regraft.unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(four)


def test_plain_tensors_with_names_like_scales_are_left_alone(tmp_path: Path) -> None:
    extra = {"model.layers.0.scale": torch.ones(3), "model.absmax": torch.ones(2)}
    base = rewrite(write_quantized(tmp_path / "base", "nf4"), lambda tensors: tensors.update(extra))
    regraft.dequantize(base, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in extra.items())
