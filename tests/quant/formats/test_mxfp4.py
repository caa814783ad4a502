"""MXFP4 weights as transformers reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from regraft.errors import FormatError
from regraft.formats.files.reading import FilePool
from regraft.quant.formats import mxfp4
from regraft.quant.formats.mxfp4 import Mxfp4
from regraft.quant.registry import check_contents, find_weights, method_of
from regraft.testing.codecs import check_codec, stored, values, whole

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": []}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAME = "model.layers.0.mlp.experts.gate_up_proj"


def packed(
    experts: int, outputs: int, groups: int, low: int = 100, high: int = 140
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random blocks and scales."""
    torch.manual_seed(experts + outputs + groups)
    blocks = torch.randint(0, 256, (experts, outputs, groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(low, high, (experts, outputs, groups), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("experts", "outputs", "groups"), [(1, 1, 1), (3, 5, 2), (2, 33, 3), (4, 64, 1), (1, 7, 10)]
)
@pytest.mark.parametrize("piece", [1, 100, 2**20])
def test_weights_are_read_as_transformers_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int, outputs: int, groups: int,
    dtype: str, piece: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(mxfp4, "_PIECE", piece)
    blocks, scales = packed(experts, outputs, groups, 117, 134)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=DTYPES[dtype])
    path = tmp_path / "m.safetensors"
    save_file({f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}, path)
    with FilePool() as files:
        place = stored([path], CONFIG, dtype, files)
        (one,) = find_weights(place)[1].weights
        assert one.name == NAME
        assert place.read is not None
        for weight in (one, replace(one, codec=Mxfp4(is_writable=True))):
            check_codec(weight, expected.float().numpy(), place.read)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_extreme_scales_are_read_as_transformers_reads_them(tmp_path: Path, dtype: str) -> None:
    """Subnormal results, results beyond the dtype, and every code with every scale."""
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes | (codes.flip(0) << 4)).expand(1, 256, 1, 16).contiguous()
    scales = torch.arange(256).to(torch.uint8).reshape(1, 256, 1)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=DTYPES[dtype])
    path = tmp_path / "m.safetensors"
    save_file({f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}, path)
    with FilePool() as files:
        place = stored([path], CONFIG, dtype, files)
        (one,) = find_weights(place)[1].weights
        assert place.read is not None
        raw = values(one, whole(one), place.read)
        with pytest.raises(FormatError):
            check_contents([one], place)
    assert raw.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_checkpoint_without_config_is_known_by_its_names(tmp_path: Path) -> None:
    blocks, scales = packed(1, 2, 1)
    path = tmp_path / "m.safetensors"
    save_file({f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}, path)
    with FilePool() as files:
        assert method_of(stored([path], {}, None, files)) == "mxfp4"


BLOCKS, SCALES = packed(2, 3, 2)
BAD: list[tuple[dict[str, torch.Tensor], str]] = [
    ({f"{NAME}_blocks": BLOCKS}, "lacks a part"),
    ({f"{NAME}_scales": SCALES}, "lacks a part"),
    ({f"{NAME}_blocks": BLOCKS, f"{NAME}_scales": SCALES[:, :2]}, "do not fit"),
    ({f"{NAME}_blocks": BLOCKS[..., :8], f"{NAME}_scales": SCALES}, "do not fit"),
    ({f"{NAME}_blocks": BLOCKS[0], f"{NAME}_scales": SCALES[0]}, "do not fit"),
    ({f"{NAME}_blocks": BLOCKS, f"{NAME}_scales": SCALES.float()}, "do not fit"),
    ({f"{NAME}_blocks": BLOCKS[:0], f"{NAME}_scales": SCALES[:0]}, "do not fit"),
    ({NAME: torch.ones(2, 2)}, "no tensor is"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_bad_files_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    with FilePool() as files, pytest.raises(FormatError, match=message):
        find_weights(stored([path], CONFIG, "BF16", files))
