"""What an undo keeps of merges out of quantized bases, format by format, and that they come back.

    python -m benchmarks.quantized.patch_sizes [--work DIR] [--only NAME ...]

Bases of normal weights, one layer of a llama (23 million parameters) or four experts of gpt-oss;
the adapter has rank 16 on each weight and moves weights by 0.5%, as that of the other figures. A
line says what share of the output the patch is, and what processor time merge and un-merge take.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import regraft
from benchmarks.quantized import storing
from benchmarks.quantized.storing import Array, Floats, Tensors
from regraft.formats.safetensors import build_header

HIDDEN, INNER, RANK, STD, FACTOR_STD = 1024, 5632, 16, 0.02, 0.01
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "vocab_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
EXPERTS = 4
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": EXPERTS,
    "tie_word_embeddings": False, "dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": storing.GROUP,
        "checkpoint_format": "gptq_v2"}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": storing.GROUP, "version": "gemm"}
TYPES = {np.dtype(np.uint8): "U8", np.dtype(np.int32): "I32", np.dtype(np.float16): "F16",
         np.dtype(np.float32): "F32"}  # fmt: skip


def _weight(*shape: int, seed: int, std: float = STD) -> Floats:
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return drawn * np.float32(std)


def _save(path: Path, tensors: Mapping[str, Array]) -> None:
    entries = [(name, TYPES[array.dtype], array.shape) for name, array in tensors.items()]
    with path.open("wb") as file:
        file.write(build_header(entries, {"format": "pt"}))
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def _write(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    _save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _rest() -> Tensors:
    ones = np.ones(HIDDEN, np.float32)
    return {
        "model.embed_tokens.weight": _weight(16, HIDDEN, seed=90),
        "lm_head.weight": _weight(16, HIDDEN, seed=91), "model.norm.weight": ones,
        "model.layers.0.input_layernorm.weight": ones,
        "model.layers.0.post_attention_layernorm.weight": ones,
    }  # fmt: skip


def _linear(
    store: Callable[[str, Floats], Tensors], config: Mapping[str, Any], folder: Path
) -> Path:
    tensors = _rest()
    for seed, (name, shape) in enumerate(LAYER.items()):
        tensors |= store(f"model.layers.0.{name}", _weight(*shape, seed=seed))
    return _write(folder, tensors, CONFIG | {"quantization_config": config})


def _gguf(kind: str, folder: Path) -> Path:
    from regraft.testing.gguf_files import write

    names = {"embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
             "input_layernorm": "blk.0.attn_norm",
             "post_attention_layernorm": "blk.0.ffn_norm"}  # fmt: skip
    tensors: dict[str, tuple[Array, str]] = {}
    for name, array in _rest().items():
        ours = next(theirs for part, theirs in names.items() if part in name)
        tensors[f"{ours}.weight"] = (array, "F32")
    for seed, (name, shape) in enumerate(LAYER.items()):
        blocks = storing.GGUF[kind](_weight(*shape, seed=seed))
        tensors[f"blk.0.{GGUF_NAMES[name]}.weight"] = (blocks, kind)
    metadata = {
        "llama.context_length": 32, "llama.block_count": 1, "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER, "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 8, "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": HIDDEN // 8, "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(16)],
    }  # fmt: skip
    folder.mkdir(parents=True)
    return write(folder / "m.gguf", "llama", metadata, tensors)


_STACK = "model.layers.0.mlp.experts.gate_up_proj"
_STACK_SIZE = (2 * HIDDEN, HIDDEN)


def _mxfp4(folder: Path) -> Path:
    stack = _weight(EXPERTS, *_STACK_SIZE, seed=1)
    return _write(folder, storing.mxfp4(_STACK, stack), GPT_OSS)


def _adapter(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    tensors: Tensors = {}
    for seed, (module, (out, inputs)) in enumerate(shapes.items()):
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = _weight(RANK, inputs, seed=seed, std=FACTOR_STD)
        tensors[f"{key}.lora_B.weight"] = _weight(out, RANK, seed=seed + 50, std=FACTOR_STD)
    folder.mkdir(parents=True)
    _save(folder / "adapter_model.safetensors", tensors)
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK / 4, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "gptq": partial(_linear, storing.gptq(ordered=True), GPTQ),
    "gptq, any order": partial(_linear, storing.gptq(ordered=False), GPTQ | {"desc_act": True}),
    "awq": partial(_linear, storing.awq, AWQ),
    "mxfp4": _mxfp4,
    **{f"GGUF {kind}": partial(_gguf, kind) for kind in storing.GGUF},
}
"""What writes a base, by the name of its format."""


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Merge into a base of a format and take it back; return sizes and processor seconds.

    Raises:
        AssertionError: other bytes come back.
    """
    base = BASES[name](folder / "base")
    shapes = {f"model.layers.0.{module}": shape for module, shape in LAYER.items()}
    if name == "mxfp4":
        single = _STACK.replace("gate_up_proj", "gate_up_projs")
        shapes = {f"{single}.{i}": _STACK_SIZE for i in range(EXPERTS)}
    adapter = _adapter(folder / "adapter", shapes)
    times = [_cpu_seconds()]
    for undo in (False, True):
        out = folder / f"out{undo}"
        regraft.merge(base, adapter, out, undo=undo)
        times.append(_cpu_seconds())
    regraft.unmerge(folder / "outTrue", folder / "back")
    times.append(_cpu_seconds())
    file = base / "model.safetensors" if base.is_dir() else base
    assert (folder / "back" / file.name).read_bytes() == file.read_bytes(), name
    size = sum(p.stat().st_size for p in (folder / "outTrue").glob("*.safetensors"))
    patch = (folder / "outTrue/regraft/undo/patch.safetensors").stat().st_size
    steps = [b - a for a, b in pairwise(times)]
    return {"format": name, "base": file.stat().st_size, "output": size, "patch": patch,
            "share": patch / size, "no undo": steps[0], "merge": steps[1],
            "unmerge": steps[2]}  # fmt: skip


def main() -> None:
    """Measure each format and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--only", nargs="*", choices=list(BASES), default=list(BASES))
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        for number, name in enumerate(options.only):
            found = measure(name, work / str(number))
            sys.stdout.write(
                f"{name:16} patch {found['share']:7.2%} of {found['output'] / 1e6:.1f} MB; "
                f"CPU s: merge {found['merge']:.2f}, without undo {found['no undo']:.2f}, "
                f"unmerge {found['unmerge']:.2f}\n"
            )
            sys.stdout.flush()
            shutil.rmtree(work / str(number))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
