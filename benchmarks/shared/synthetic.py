"""Make synthetic checkpoints and adapters of a real model's shape, for measuring merges.

    python benchmarks/shared/synthetic.py --out DIR [--shape NAME] [--scale N] [--rank N]
        [--targets LAYER...] [--headers N]

writes ``DIR/base``, a Qwen2.5-1.5B-shaped checkpoint in shards of about 1 GB (with ``--scale 4``,
four times its layers), and ``DIR/adapter``, a PEFT LoRA adapter on all linear layers. With
``--headers 30`` the weights are holes: some 30 files of the right size that take up no room.

Nothing depends on torch, and the same call gives the same bytes: the weights come from one block of
random numbers, read round and round from another place for every tensor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from regraft.formats.safetensors import build_header
from regraft.tensors import nbytes_of

TensorShape = tuple[str, tuple[int, ...]]
"""A tensor's name and shape."""

NUMPY_DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}
WEIGHT_STD = 0.02
FACTOR_STD = 0.01
BLOCK_ELEMENTS = 16 * 2**20
STRIDE = 7_368_787
"""A prime: each tensor begins this much further into the block than the one before it."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Qwen2 or Llama model.

    Attributes:
        model_type: ``"qwen2"`` (biases on q, k and v) or ``"llama"`` (none).
        tied: the output layer shares the embedding's weights.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def kv_size(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def biased(self) -> bool:
        return self.model_type == "qwen2"


QWEN = ModelShape("qwen2", 1536, 8960, 28, 12, 2, 151_936, tied=True)
LLAMA_70B = ModelShape("llama", 8192, 28_672, 80, 64, 8, 128_256, tied=False)
LLAMA_1B = ModelShape("llama", 2048, 8192, 16, 32, 8, 32_000, tied=False)
HALF_SMOLLM2 = ModelShape("llama", 2048, 8192, 12, 32, 32, 49_152, tied=True)
"""SmolLM2-1.7B with half of its layers: 0.9 billion weights."""
TINY = ModelShape("llama", 64, 128, 2, 4, 2, 256, tied=False)
SHAPES = {
    "qwen2.5-1.5b": QWEN, "llama-70b": LLAMA_70B, "llama-1b": LLAMA_1B,
    "half-smollm2-1.7b": HALF_SMOLLM2, "tiny": TINY,
}  # fmt: skip


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Return the linear layers of one block: name under the layer -> (out, in)."""
    hidden, wide, kv = shape.hidden, shape.intermediate, shape.kv_size
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def model_tensors(shape: ModelShape) -> list[TensorShape]:
    """Return every tensor of a checkpoint, in the order of the modules."""
    tensors: list[TensorShape] = [("model.embed_tokens.weight", (shape.vocab, shape.hidden))]
    for layer in range(shape.layers):
        tensors += _layer_tensors(shape, f"model.layers.{layer}")
    tensors.append(("model.norm.weight", (shape.hidden,)))
    if not shape.tied:
        tensors.append(("lm_head.weight", (shape.vocab, shape.hidden)))
    return tensors


def _layer_tensors(shape: ModelShape, prefix: str) -> Iterator[TensorShape]:
    for name, size in linear_shapes(shape).items():
        yield f"{prefix}.{name}.weight", size
        if shape.biased and name.endswith(("q_proj", "k_proj", "v_proj")):
            yield f"{prefix}.{name}.bias", size[:1]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", (shape.hidden,)


def adapter_tensors(shape: ModelShape, rank: int, targets: Sequence[str] = ()) -> list[TensorShape]:
    """Return the tensors of a LoRA adapter on linear layers: A (rank, in), B (out, rank).

    Args:
        shape: the base's.
        rank: the adapter's.
        targets: names of layers, such as ``"q_proj"``; none for all.
    """
    tensors: list[TensorShape] = []
    for layer in range(shape.layers):
        for name, (rows, columns) in linear_shapes(shape).items():
            if targets and name.rpartition(".")[2] not in targets:
                continue
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors.append((f"{prefix}.lora_A.weight", (rank, columns)))
            tensors.append((f"{prefix}.lora_B.weight", (rows, rank)))
    return tensors


def model_config(shape: ModelShape) -> dict[str, Any]:
    """Return a ``config.json`` that transformers loads."""
    name = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[shape.model_type]
    return {
        "architectures": [name],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 32_768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def adapter_config(rank: int, alpha: int, targets: Sequence[str] = ()) -> dict[str, Any]:
    """Return an ``adapter_config.json`` for LoRA on linear layers; by default on all."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(targets) or _names_of_layers(),
    }


def _names_of_layers() -> list[str]:
    return [name.rpartition(".")[2] for name in linear_shapes(TINY)]


class RandomSource:
    """Endless random numbers, by reading one block of them round and round.

    Generating the 1.5 billion numbers of a model takes longer than merging it does, and a merge
    cannot tell them from these.
    """

    def __init__(self, dtype: str, std: float, seed: int, elements: int = BLOCK_ELEMENTS) -> None:
        numbers = np.random.default_rng(seed).standard_normal(elements, dtype=np.float32)
        self._block = (numbers * np.float32(std)).astype(NUMPY_DTYPES[dtype])
        self._tensors = 0

    def write(self, file: BinaryIO, count: int) -> None:
        """Append ``count`` numbers to a file, beginning where no tensor before this one did."""
        start = self._tensors * STRIDE % len(self._block)
        self._tensors += 1
        while count:
            part = self._block[start : start + count]
            file.write(part.view(np.uint8).data)
            count -= len(part)
            start = 0


def write_model(folder: Path, shape: ModelShape, *, shard_bytes: int = 10**9) -> None:
    """Write a bfloat16 checkpoint of random weights, sharded as transformers does it."""
    folder.mkdir(parents=True)
    shards = shard(model_tensors(shape), shard_bytes)
    elements = min(BLOCK_ELEMENTS, shape.vocab * shape.hidden)
    source = RandomSource("BF16", WEIGHT_STD, seed=0, elements=elements)
    for path, tensors in zip(shard_paths(folder, len(shards)), shards, strict=True):
        write_tensors(path, tensors, "BF16", source)
    write_index(folder, shards)
    write_json(folder / "config.json", model_config(shape))


def write_adapter(
    folder: Path, shape: ModelShape, *, rank: int = 16, alpha: int = 4, dtype: str = "BF16",
    targets: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write a PEFT adapter of random factors on linear layers; by default on all."""
    folder.mkdir(parents=True)
    source = RandomSource(dtype, FACTOR_STD, seed=1, elements=2**20)
    tensors = sorted(adapter_tensors(shape, rank, targets))
    write_tensors(folder / "adapter_model.safetensors", tensors, dtype, source)
    write_json(folder / "adapter_config.json", adapter_config(rank, alpha, targets))


def write_tensors(
    path: Path, tensors: Sequence[TensorShape], dtype: str, source: RandomSource
) -> None:
    """Write one safetensors file; norms are ones, everything else is random."""
    with path.open("wb") as file:
        file.write(header_of(tensors, dtype))
        for name, size in tensors:
            if name.endswith("norm.weight"):
                file.write(np.ones(size, NUMPY_DTYPES[dtype]).tobytes())
            else:
                source.write(file, int(np.prod(size)))


def header_of(tensors: Sequence[TensorShape], dtype: str) -> bytes:
    """Return the header of a safetensors file as transformers writes it."""
    return build_header([(name, dtype, size) for name, size in tensors], {"format": "pt"})


def write_headers(folder: Path, shape: ModelShape, *, files: int, rank: int, alpha: int) -> None:
    """Write a checkpoint (in about ``files`` shards) and an adapter whose weights are holes."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    total = sum(nbytes_of("BF16", size) for _, size in model_tensors(shape))
    shards = shard(model_tensors(shape), -(-total // files))
    for path, tensors in zip(shard_paths(base, len(shards)), shards, strict=True):
        write_sparse(path, tensors)
    write_index(base, shards)
    write_json(base / "config.json", model_config(shape))
    write_sparse(adapter / "adapter_model.safetensors", sorted(adapter_tensors(shape, rank)))
    write_json(adapter / "adapter_config.json", adapter_config(rank, alpha))


def write_sparse(path: Path, tensors: Sequence[TensorShape]) -> None:
    """Write one safetensors file of zeros that takes up no more than its header."""
    header = header_of(tensors, "BF16")
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes_of("BF16", size) for _, size in tensors))


def shard(tensors: Sequence[TensorShape], limit: int) -> list[list[TensorShape]]:
    """Split tensors into files of at most ``limit`` bytes, sorted by name within each."""
    shards: list[list[TensorShape]] = [[]]
    used = 0
    for name, size in tensors:
        nbytes = nbytes_of("BF16", size)
        if used + nbytes > limit and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append((name, size))
        used += nbytes
    return [sorted(tensors) for tensors in shards]


def shard_paths(folder: Path, count: int) -> list[Path]:
    """Return the paths of a checkpoint's weight files."""
    if count == 1:
        return [folder / "model.safetensors"]
    return [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def write_index(folder: Path, shards: Sequence[Sequence[TensorShape]]) -> None:
    """Write the index of a sharded checkpoint; a single file needs none."""
    if len(shards) == 1:
        return
    places = zip(shard_paths(folder, len(shards)), shards, strict=True)
    weight_map = {name: path.name for path, tensors in places for name, _ in tensors}
    total = sum(nbytes_of("BF16", size) for tensors in shards for _, size in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def scaled(shape: ModelShape, scale: int) -> ModelShape:
    """Return a shape with ``scale`` times the layers."""
    return replace(shape, layers=shape.layers * scale)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    shape = scaled(SHAPES[options.shape], options.scale)
    rank, alpha = options.rank, options.alpha
    if options.headers:
        write_headers(options.out, shape, files=options.headers, rank=rank, alpha=alpha)
        return
    write_model(options.out / "base", shape)
    dtype = options.adapter_dtype
    write_adapter(
        options.out / "adapter", shape, rank=rank, alpha=alpha, dtype=dtype,
        targets=options.targets,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a synthetic checkpoint and an adapter.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make base/, adapter/ in")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b", help="model to imitate")
    parser.add_argument("--scale", type=int, default=1, help="times the model's layers")
    parser.add_argument(
        "--targets", nargs="+", default=(), choices=_names_of_layers(), metavar="LAYER",
        help="linear layers of the adapter (all)",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument(
        "--alpha", type=int, default=4, help="lora_alpha; 4 at rank 16 makes |delta|/|W| 0.5%%"
    )
    parser.add_argument(
        "--adapter-dtype", choices=tuple(NUMPY_DTYPES), default="BF16", help="dtype of the factors"
    )
    parser.add_argument(
        "--headers", type=int, metavar="FILES", help="write only headers, in about FILES shards"
    )
    return parser


if __name__ == "__main__":
    main()
