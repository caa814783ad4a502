"""Configs and tensors that make no sense end as problems, never as a crash."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regraft.numerics.arrays import Bytes
from regraft.quant.formats import awq, compressed_tensors, gptq
from regraft.quant.weight import FoundWeights, Stored
from regraft.tensors import TensorSpec, nbytes_of

JUNK: list[Any] = [
    None, True, -1, 0, 4, 8, 2.5, 10**30, "", "x", "4", [], [1], ["a", 2], {}, {"a": 1},
    {"a": {}}, {"a": {"weights": {}}}, {"a": {"weights": 3}}, {"a": {"weights": {"type": []}}},
]  # fmt: skip
KEYS = [
    "bits", "group_size", "checkpoint_format", "format", "pack_dtype", "rotation", "dynamic",
    "version", "w_bit", "q_group_size", "config_groups", "ignore", "sparsity_config",
    "transform_config",
]  # fmt: skip
WEIGHT_KEYS = [
    "num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "scale_dtype",
]  # fmt: skip
ENDINGS = [
    "qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_scale",
    "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
]  # fmt: skip
DTYPES = ["I32", "F16", "BF16", "F32", "U8", "I8", "F8_E4M3", "I64"]


def read(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
    """Read bytes of a tensor that are its offsets."""
    assert 0 <= offset <= offset + buffer.size <= spec.nbytes
    buffer[:] = np.arange(offset, offset + buffer.size) % 251


def configs() -> Iterator[dict[str, Any]]:
    """Yield configs with one value that makes no sense, and the weights of a group likewise."""
    for junk in JUNK:
        for key in KEYS:
            yield {key: junk}
        for key in WEIGHT_KEYS:
            weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
            yield {"config_groups": {"g": {"weights": {**weights, key: junk}}}}
        for key in ("targets", "format", "weights"):
            group = {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}
            yield {"config_groups": {"g": {**group, key: junk}}}


@pytest.mark.slow
@pytest.mark.parametrize("find", [awq.find, compressed_tensors.find, gptq.find])
def test_garbage_is_refused_or_read(find: Callable[[Stored], FoundWeights]) -> None:
    rng = random.Random(0)
    outcomes = set[bool]()
    for config in configs():
        for _ in range(8):
            tensors = dict[str, TensorSpec]()
            for ending in rng.sample(ENDINGS, 9):
                shape = tuple(rng.choice([0, 1, 2, 4, 16, 32]) for _ in range(rng.randint(0, 3)))
                dtype = rng.choice(DTYPES)
                nbytes = nbytes_of(dtype, shape)
                tensors[f"m.{ending}"] = TensorSpec(
                    f"m.{ending}", dtype, shape, Path("m"), 0, nbytes
                )
            reader = read if rng.random() < 0.5 else None
            found = find(Stored(tensors, config, None, reader, "m"))
            outcomes.add(bool(found.problems))
            for weight in found.weights:
                weight.codec.trouble(weight, read)
    assert True in outcomes
