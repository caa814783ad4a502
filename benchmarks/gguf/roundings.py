"""Other ways to round to the codes of a GGUF file, which regraft does not have: tried here.

    python -m benchmarks.gguf.roundings WORK FOLDER [--type TYPE]

prints a table of them. WORK is what ``python -m benchmarks.gguf --work WORK`` has left, FOLDER has
llama.cpp's programs.

Each takes the base's scales, as regraft does, and writes a copy of the base with other codes.

- **Stochastic, far deltas alone**: a weight whose delta is less than a tenth of a step stays.
- **Error feedback**: of a row's error E, what lies in the space that the rows of the adapter's A
  span is what the adapter's own inputs see. Columns are passed over, and a code moves by a step
  where that makes ``|E a|^2 + w E_j^2`` smaller: ``a`` is an orthonormal basis of the space, ``w``
  says how well a move has to point at the error. It falls from pass to pass. Where nothing has
  moved yet, the error is the delta.
- **Stochastic, then error feedback**: the same, after each code was rounded stochastically.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from safetensors.numpy import load_file

from benchmarks.gguf import figures, measure
from benchmarks.gguf.models import EXACT, Base, Candidate, Sizes, base_in
from benchmarks.gguf.names import TYPES
from benchmarks.qlora.figures import measured
from benchmarks.qlora.measure import texts, tokenizer_of
from regraft.numerics.compiling import njit
from regraft.quant.formats.gguf_rounding import GRIDS, Grid

Matrix = npt.NDArray[Any]

_MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A weight in codes, and what is to be added to it; rows as they are stored.

    Attributes:
        codes: int32 (rows, columns).
        steps: the scale of each code, float32 likewise; none is 0.
        delta: float32 likewise.
        basis: orthonormal, float32 (columns, r): of what the rows of A span.
        least, most: the codes that there are.
    """

    codes: Matrix
    steps: Matrix
    delta: Matrix
    basis: Matrix
    least: int
    most: int


Rule = Callable[[Layer, np.random.Generator], Matrix]
"""Returns how many steps each code moves, int8; what leaves the grid is cut off afterwards."""


def stochastic(layer: Layer, rng: np.random.Generator, least: float = 0.0) -> Matrix:
    """Move by chance, where the delta is more than a share of a step."""
    way = layer.delta / layer.steps
    whole = np.trunc(way)
    drawn = rng.random(way.shape, np.float32)
    moves = (drawn < np.abs(way - whole)) & (np.abs(way) > least)
    found: Matrix = (whole + moves * np.sign(way)).astype(np.int8)
    return found


def far_alone(layer: Layer, rng: np.random.Generator) -> Matrix:
    """Move by chance, where the delta is more than a tenth of a step."""
    return stochastic(layer, rng, 0.1)


def feedback(layer: Layer, rng: np.random.Generator) -> Matrix:
    """Move where the error is."""
    del rng
    return _fed_back(layer, np.zeros(layer.codes.shape, np.int8), (4, 2, 1, 0.5))


def stochastic_and_feedback(layer: Layer, rng: np.random.Generator) -> Matrix:
    """Move by chance, and then where the error is."""
    return _fed_back(layer, stochastic(layer, rng), (2, 1, 0.5))


RULES: dict[str, Rule] = {
    "stochastic, from a tenth of a step on": far_alone,
    "error feedback": feedback,
    "stochastic, then error feedback": stochastic_and_feedback,
}


def _fed_back(layer: Layer, moves: Matrix, weights: tuple[float, ...]) -> Matrix:
    _feed_back(moves, layer.delta, layer.steps, layer.basis, np.array(weights, np.float32))
    return moves


@njit(nogil=True, error_model="numpy", fastmath=True)
def _feed_back(moves: Any, delta: Any, steps: Any, basis: Any, weights: Any) -> None:
    """Change moves of codes; rows begin at places of their own, and pass over columns in strides.

    Else all rows would move the same columns, and their errors would add up in a layer's output.
    """
    rows, columns = delta.shape
    rank = basis.shape[1]
    length = np.zeros(columns, np.float32)
    size = 1
    while size < columns:
        size *= 2
    for j in range(columns):
        for k in range(rank):
            length[j] += basis[j, k] * basis[j, k]
    error = np.zeros(rank, np.float32)
    for i in range(rows):
        error[:] = 0
        for j in range(columns):
            for k in range(rank):
                error[k] += (moves[i, j] * steps[i, j] - delta[i, j]) * basis[j, k]
        for turn in range(weights.shape[0]):
            seed = np.uint64(i * 64 + turn + 1) * np.uint64(0x9E3779B97F4A7C15)
            seed ^= seed >> np.uint64(29)
            place, stride = np.int64(seed % np.uint64(size)), np.int64(seed >> np.uint64(40)) | 1
            for _ in range(size):
                place = (place + stride) % size
                j = int(place)
                if j >= columns or length[j] == 0:
                    continue
                step, along = steps[i, j], np.float32(0)
                for k in range(rank):
                    along += error[k] * basis[j, k]
                weight = weights[turn] * length[j]
                own = moves[i, j] * step - delta[i, j]
                more = np.rint(-(along + weight * own) / (step * (length[j] + weight)))
                if more != 0:
                    moves[i, j] += np.int8(more)
                    for k in range(rank):
                        error[k] += more * step * basis[j, k]


def candidates(base: Base, wide: Path, adapter: Path, work: Path) -> Iterator[Candidate]:
    """Yield a file for each rule, written to the same place.

    Args:
        base: the base.
        wide: the merge in F32.
        adapter: the adapter's folder.
        work: where files are written.
    """
    out = work / f"{base.type}-other.gguf"
    for name, rule in RULES.items():
        shutil.copy(base.path, out)
        sums = _rewritten(out, wide, adapter, rule)
        survived, noise = sums[0] / sums[1], (sums[2] / sums[3]) ** 0.5
        yield Candidate(name, out, float(survived), float(noise))
    out.unlink()


def _rewritten(path: Path, wide: Path, adapter: Path, rule: Rule) -> Matrix:
    """Put other codes into a file; return sums that tell what survived, and the noise."""
    factors = load_file(adapter / "adapter_model.safetensors")
    merged = {tensor.name: tensor for tensor in GGUFReader(wide).tensors}
    rng, sums = np.random.default_rng(0), np.zeros(4)
    for tensor in GGUFReader(path, "r+").tensors:
        _, _, rest = tensor.name.partition("blk.")
        number, _, kind = rest.removesuffix(".weight").partition(".")
        if kind not in _MODULES:
            continue
        right = factors[f"base_model.model.model.layers.{number}.{_MODULES[kind]}.lora_A.weight"]
        grid = GRIDS[tensor.tensor_type.name]
        blocks = np.array(tensor.data).reshape(-1, grid.nbytes)
        was, layer = _layer(grid, blocks, merged[tensor.name].data, right)
        codes = np.clip(layer.codes + rule(layer, rng), layer.least, layer.most)
        packed = grid.pack(codes.astype(np.uint8).reshape(-1, grid.elements))
        blocks[:, grid.begin : grid.end] = packed
        tensor.data[:] = blocks.reshape(tensor.data.shape)
        moved = (codes - layer.codes) * layer.steps
        due, off = layer.delta, moved - layer.delta
        sums += [np.vdot(moved, due), np.vdot(due, due), np.vdot(off, off), np.vdot(was, was)]
    return sums


def _layer(grid: Grid, blocks: Matrix, values: Matrix, right: Matrix) -> tuple[Matrix, Layer]:
    """Return what codes stand for, and the layer; codes without a scale are given a huge one."""
    shape = values.shape
    codes = grid.unpack(blocks[:, grid.begin : grid.end]).reshape(shape).astype(np.int32)
    scales, offsets = (np.asarray(each, np.float32) for each in grid.scales(blocks))
    part = codes.size // scales.size
    steps, shifts = (np.repeat(each, part).reshape(shape) for each in (scales, offsets))
    was = steps * (codes.astype(np.float32) + np.float32(grid.low)) - shifts
    basis = np.linalg.qr(right.astype(np.float64).T)[0].astype(np.float32)
    steps = np.where(steps == 0, np.float32(1e30), steps)
    return was, Layer(codes, steps, values - was, basis, grid.least, grid.most)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try other roundings.")
    parser.add_argument("work", type=Path)
    parser.add_argument("tools", type=Path)
    parser.add_argument("--type", choices=TYPES, default=TYPES[0])
    options = parser.parse_args(arguments)
    work, tools = options.work.resolve(), options.tools.resolve()
    base, name, scratch = base_in(options.type, work), f"{options.type}-40", work / "roundings"
    scratch.mkdir(exist_ok=True)
    asked = texts(tokenizer_of(base.plain), Sizes().sentences)
    exact = measure.seen(tools, work / f"{name}-exact.gguf", asked, scratch)
    rows = [measured(EXACT, exact, exact)]
    wide, adapter = work / f"{name}-wide.gguf", work / name / "adapter-fields"
    for each in candidates(base, wide, adapter, scratch):
        row = measured(each.group, measure.seen(tools, each.path, asked, scratch), exact)
        rows.append(row.with_receipt(each.survived, each.noise, None, None))
    print(figures.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
