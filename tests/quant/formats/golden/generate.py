"""Write the golden files: weights as GPTQModel, AutoAWQ and compressed-tensors 0.12 read them.

These libraries cannot be installed beside what the tests need. In an environment of their own:

    pip install torch==2.13.0 numpy safetensors transformers
    pip install --no-deps compressed-tensors==0.12.2 gptqmodel==7.7.0 autoawq==0.2.9
    python tests/quant/formats/golden/generate.py

(and what they import: pillow, tokenicer, logbar, device-smi, pypcre, ...). Each file has the stored
tensors of a weight ``m``, its values as ``expected`` in the model's orientation, and the config as
metadata.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent

Tensors = dict[str, torch.Tensor]


def save(name: str, tensors: Tensors, expected: torch.Tensor, config: dict[str, Any]) -> None:
    """Write one file."""
    named = {f"m.{key}": tensor.contiguous().clone() for key, tensor in tensors.items()}
    named["expected"] = expected.contiguous().clone()
    save_file(named, HERE / f"{name}.safetensors", {"config": json.dumps(config)})


def gptq(bits: int, size: int, order: str, sym: bool, kind: str) -> None:
    """Pack a weight with GPTQModel, and have its plain torch kernel dequantize it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    inputs, outputs = 64, 32
    torch.manual_seed(bits)
    linear = torch.nn.Linear(inputs, outputs, bias=False).half()
    each = inputs if size == -1 else size
    groups = torch.arange(inputs) // each
    if order == "act":
        groups = groups[torch.randperm(inputs)]
    count = inputs // each
    scales = torch.rand(outputs, count) * 0.02 + 0.01
    zeros = torch.randint(0, 2**bits, (outputs, count)).float()
    if sym:
        zeros[:] = 2 ** (bits - 1)
    module = TorchLinear(
        bits=bits, group_size=size, sym=sym, desc_act=order == "act", in_features=inputs,
        out_features=outputs, register_buffers=True, format=FORMAT.GPTQ_V2,
    )  # fmt: skip
    module.optimize = lambda *_args, **_kwargs: None
    module.pack(linear, scales.half().float(), zeros, groups.int())
    module.qzero_format(format=2)
    module.post_init()
    module.eval()
    if kind == "gptq":
        settings = type("Settings", (), {"bits": bits, "pack_dtype": torch.int32})()
        convert_gptq_v2_to_v1_format_module(module, settings)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {part: getattr(module, part).clone() for part in parts}
    if kind == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym,
        "desc_act": order == "act", "checkpoint_format": kind,
    }  # fmt: skip
    width, zeros_name = size if size > 0 else "column", "sym" if sym else "zeros"
    name = f"gptq-{bits}-{width}-{order}-{zeros_name}-{kind}"
    save(name, tensors, TorchLinear.dequantize_weight(module).T, config)


def awq(size: int) -> None:
    """Have AutoAWQ dequantize random words; its packing code alone, as the rest wants a GPU."""
    for place in map(Path, sys.path):
        path = place / "awq" / "utils" / "packing_utils.py"
        if path.exists():
            break
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(size)
    inputs, outputs = 64, 40
    each = inputs if size == -1 else size

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()

    qweight, qzeros = words(inputs, outputs // 8), words(inputs // each, outputs // 8)
    scales = (torch.rand(inputs // each, outputs) * 0.02).half()
    expected = module.dequantize_gemm(qweight, qzeros, scales, 4, each)
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    save(f"awq-{size if size > 0 else 'column'}", tensors, expected.T, config)


def compressed(bits: int) -> None:
    """Compress a weight whose inputs are in groups of any order, as newer versions cannot.

    This version cannot decompress packed zeros, so there are none.
    """
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    torch.manual_seed(bits)
    outputs, inputs, size = 24, 64, 16
    said = {
        "num_bits": bits, "type": "int", "strategy": "group", "group_size": size,
        "symmetric": True, "actorder": "group",
    }  # fmt: skip
    args = QuantizationArgs(**said)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized")
    compressor = PackedQuantizationCompressor(config=config)
    groups = (torch.arange(inputs) // size)[torch.randperm(inputs)].int()
    scales = ((torch.rand(outputs, inputs // size) + 0.5) * 3 / 2 ** (bits - 1)).bfloat16()
    weight = torch.randn(outputs, inputs).bfloat16()
    stored = compressor.compress_weight(weight, scales, args, g_idx=groups)
    tensors = {**stored, "weight_scale": scales, "weight_g_idx": groups}
    expected = compressor.decompress_weight(dict(tensors), args)
    group = {"targets": ["Linear"], "weights": said}
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }  # fmt: skip
    save(f"compressed-{bits}-act", tensors, expected, settings)


def jobs() -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    """Yield what makes each file."""
    for bits in (2, 3, 4, 8):
        yield gptq, (bits, 16, "act", False, "gptq")
        yield gptq, (bits, 32, "none", True, "gptq")
        yield gptq, (bits, -1, "none", False, "gptq_v2")
    for size in (16, -1):
        yield awq, (size,)
    for bits in (4, 8):
        yield compressed, (bits,)


if __name__ == "__main__":
    for make, arguments in jobs():
        make(*arguments)
