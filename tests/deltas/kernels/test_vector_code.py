"""The hot loops are vector code, on every kind of processor: their machine code is looked at.

No such processor need be at hand. numba makes LLVM's code of each function once with fused sums and
once without, and leaves it as it is; LLVM then makes machine code of that for each kind, with the
passes and settings that numba has, and nothing of it is run.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from llvmlite import binding


@dataclass(frozen=True)
class Kind:
    """A kind of processor.

    Attributes:
        features: instructions that it has, by LLVM's names.
        register: in a listing, a register of the width that LLVM has to use.
        triple: its architecture.
        fused: whether it has fused sums, and conversions of float16.
    """

    features: str
    register: str
    triple: str = "x86_64-unknown-linux-gnu"
    fused: bool = True


_V3 = "+avx2,+fma,+f16c"
KINDS = {
    "nehalem": Kind("+sse4.2", r"%xmm\d", fused=False),
    "haswell": Kind(_V3, r"%ymm\d"),
    "skylake-avx512": Kind(f"{_V3},+avx512f,+avx512bw,+avx512dq,+avx512vl", r"%[yz]mm\d"),
    "neoverse-n1": Kind("+neon", r"\bv\d+\.(4s|2d|8h|16b)", "aarch64-unknown-linux-gnu"),
}
"""By LLVM's names. Of its own accord LLVM keeps to 256 bits on skylake-avx512."""

_PACKED = r"v?p(?!ush|op)[a-z]|v?[a-z0-9]+p[sd]\b|[a-z0-9]+\s+v\d+\.|(ld|st)[rp]\s+q\d"
"""How an instruction begins that does several elements."""

FLOATS, SHORTS, BYTES, DOUBLES, LONGS, PLACES = (
    f"{name}[::1]" for name in ("float32", "uint16", "uint8", "float64", "int64", "uint64")
)
AT = COUNT = "uint64"


@dataclass(frozen=True)
class Loops:
    """A compiled function, and how many of its loops have to be vector code.

    Attributes:
        arguments: its types.
        vector: such loops.
    """

    arguments: tuple[str, ...]
    vector: int


_FAST, _MERGE, _CONVERSIONS = (
    f"regraft.{room}" for room in
    ("deltas.kernels.bf16_fast_path", "deltas.kernels.merge", "numerics.conversions")
)  # fmt: skip
_INNER, _STREAMS, _PREDICTION = (
    f"regraft.deltas.kernels.{room}" for room in ("inner", "streams", "prediction")
)
_ROW = (FLOATS, AT, "float32", SHORTS, SHORTS, AT)

HOT = {
    f"{_FAST}:_finish": Loops((*_ROW, DOUBLES, COUNT), 1),
    f"{_FAST}:_add_norms": Loops((FLOATS, AT, "float32", SHORTS, AT, DOUBLES, COUNT), 1),
    f"{_FAST}:_mark": Loops((*_ROW, BYTES, COUNT, "boolean"), 2),
    f"{_FAST}:_expect": Loops((*_ROW, BYTES, COUNT, "boolean"), 2),
    f"{_INNER}:product": Loops(
        (FLOATS, AT, AT, AT, AT, FLOATS, AT, AT, COUNT, FLOATS, AT, COUNT), 2
    ),
    f"{_CONVERSIONS}:decode": Loops((SHORTS, FLOATS, "int64", AT, FLOATS, AT, COUNT), 2),
    f"{_CONVERSIONS}:encode": Loops((FLOATS, AT, "int64", SHORTS, FLOATS, AT, COUNT), 2),
    f"{_MERGE}:_count": Loops((FLOATS, AT, FLOATS, AT, DOUBLES, COUNT), 1),
    f"{_PREDICTION}:mark_bf16_to_keep": Loops(
        (FLOATS, AT, FLOATS, "int64[:,::1]", FLOATS, FLOATS, AT, AT, "int64", "float64", SHORTS,
         AT, BYTES, FLOATS, FLOATS, FLOATS, FLOATS, "boolean",
         "Tuple((float32, float32, float32, uint32, uint32))", COUNT), 5,
    ),
    f"{_STREAMS}:_number": Loops((DOUBLES, DOUBLES, FLOATS, "int64", COUNT, PLACES, LONGS), 1),
}  # fmt: skip
"""Functions of one row of a block, by module and name."""


def code_of(place: str) -> str:
    """Return LLVM's code of a function, as numba made it."""
    module, _, name = place.partition(":")
    function: Any = getattr(importlib.import_module(module), name)
    function.compile("void(" + ",".join(HOT[place].arguments) + ")")
    (signature,) = function.signatures
    return str(function.inspect_llvm(signature))


def machine_code(code: str, name: str, kind: Kind) -> str:
    """Return the listing that LLVM makes of its code for a kind of processor."""
    code = re.sub(r'target (triple|datalayout) = ".*"\n|"target-(cpu|features)"="[^"]*"', "", code)
    machine = binding.Target.from_triple(kind.triple).create_target_machine(
        cpu=name, features=kind.features, opt=3
    )
    module = binding.parse_assembly(code)
    module.triple, module.data_layout = kind.triple, str(machine.target_data)
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return str(machine.emit_assembly(module))


def loops(listing: str) -> Iterator[list[str]]:
    """Yield the instructions of each loop without a branch: LLVM vectorizes no other."""
    label, body = "", list[str]()
    for line in map(str.strip, listing.splitlines()):
        if begins := re.match(r"(\.?L?[\w$.]+):", line):
            label, body = begins[1], []
        elif line and line[0] not in ".#/":
            body.append(line)
            if re.match(r"j[a-z]+\s|b(\.\w\w)?\s|cbn?z\s|tbn?z\s|ret", line):
                if label and line.endswith(label):
                    yield body
                label, body = "", []


def is_vector_code(body: list[str], kind: Kind) -> bool:
    """Whether a loop calls nothing, and much of it does several elements in whole registers."""
    packed = [line for line in body if re.match(_PACKED, line)]
    wide = [line for line in body if re.search(kind.register, line)]
    calls = [line for line in body if re.match(r"callq?\s|blr?\s", line)]
    return not calls and bool(wide) and 3 * len(packed) >= len(body)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_hot_loops_are_vector_code(fused: bool) -> None:
    features = "+fma,+f16c" if fused else ""
    env = os.environ | {
        "NUMBA_OPT": "0", "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features,
    }  # fmt: skip
    made = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    lacking = []
    for place, code in json.loads(made.stdout).items():
        for name, kind in KINDS.items():
            if kind.fused == fused:
                found = [is_vector_code(b, kind) for b in loops(machine_code(code, name, kind))]
                if sum(found) < HOT[place].vector:
                    lacking.append(f"{place} on {name}: {sum(found)} of {HOT[place].vector}")
    assert not lacking


if __name__ == "__main__":
    print(json.dumps({place: code_of(place) for place in HOT}))
