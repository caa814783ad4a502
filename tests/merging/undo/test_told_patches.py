"""Merges out of formats whose codes lie transposed or in blocks: small patches, exact ways back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging.test_undo import assert_restores, comparable
from regraft.formats.safetensors import read_header
from regraft.merging import building
from regraft.merging.undo import corrections
from regraft.quant.formats.gguf_blocks import LAYOUTS

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from digests import plain, quantized
from digests.making import lora, write_adapter

Write = Callable[[Path], Path]

TRANSPOSED = ("gptq-2", "gptq-3", "gptq-4", "gptq-4-any-order", "gptq-8", "awq")
BASES: dict[str, Write] = {
    **{name: partial(quantized.write_stored, format=name) for name in TRANSPOSED},
    "mxfp4": quantized.write_gpt_oss,
    **{f"GGUF {kind}": partial(quantized.write_gguf, kind=kind) for kind in LAYOUTS
       if kind in quantized.GGUF_TYPES},
}  # fmt: skip


def write_small_adapter(folder: Path, name: str) -> Path:
    if name == "mxfp4":
        return quantized.gpt_oss_adapter(folder)
    if name.startswith("GGUF"):
        return plain.llama_lora(folder, sizes=quantized.GGUF_SIZES, share=2.0**-7)
    return plain.llama_lora(folder, sizes=plain.EVEN, share=2.0**-7)


def folder_of(base: Path) -> Path:
    return base if base.is_dir() else base.parent


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What writes the base of a name on first use; tests only read it."""
    return cache(lambda name: BASES[name](tmp_path_factory.mktemp("made") / "base"))


@pytest.fixture
def base(name: str, made: Callable[[str], Path]) -> Path:
    return made(name)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}], ids=str)
def test_the_base_comes_back_whatever_the_dtype(
    tmp_path: Path, name: str, base: Path, options: dict[str, Any]
) -> None:
    adapter = write_small_adapter(tmp_path / "adapter", name)
    regraft.merge(base, adapter, tmp_path / "out", **options)
    assert_restores(folder_of(base), tmp_path / "out", tmp_path)


def test_a_swap_is_a_merge_of_the_base(tmp_path: Path, name: str, base: Path) -> None:
    adapter = write_small_adapter(tmp_path / "adapter", name)
    regraft.merge(base, [(adapter, 0.5)], tmp_path / "out")
    regraft.swap(tmp_path / "out", adapter, tmp_path / "swapped")
    regraft.merge(base, adapter, tmp_path / "fresh")
    assert comparable(tmp_path / "swapped") == comparable(tmp_path / "fresh")


def test_a_patch_of_layout_1_is_read(
    tmp_path: Path, name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions kept these codes whole."""
    adapter = write_small_adapter(tmp_path / "adapter", name)
    with monkeypatch.context() as older:
        of_old = partial(corrections.corrections_of, layout=1)
        older.setattr(building, "corrections_of", of_old)
        regraft.merge(base, adapter, tmp_path / "out")
    manifest = (tmp_path / "out/regraft/undo/undo.json").read_text()
    assert '"format": 1' in manifest
    assert_restores(folder_of(base), tmp_path / "out", tmp_path)
    regraft.swap(tmp_path / "out", adapter, tmp_path / "swapped")
    regraft.merge(base, adapter, tmp_path / "fresh")
    assert comparable(tmp_path / "swapped") == comparable(tmp_path / "fresh")
    assert '"format": 2' in (tmp_path / "fresh/regraft/undo/undo.json").read_text()


@pytest.mark.parametrize("kind", ["pack-quantized-4", "fp8", "nvfp4"])
def test_what_layout_1_can_tell_is_written_in_it(tmp_path: Path, kind: str) -> None:
    base = quantized.write_stored(tmp_path / "base", kind)
    adapter = plain.llama_lora(tmp_path / "adapter", sizes=plain.EVEN)
    regraft.merge(base, adapter, tmp_path / "out")
    assert '"format": 1' in (tmp_path / "out/regraft/undo/undo.json").read_text()


@pytest.mark.parametrize("layout", [0, 4, True, "2", None])
def test_a_layout_that_is_not_known_is_refused(layout: Any) -> None:
    from regraft.merging.undo.manifest import _manifest

    with pytest.raises(ValueError, match="layout"):
        _manifest({"format": layout})


# -- the sign of zero ------------------------------------------------------------------------------

STACK = "model.layers.0.mlp.experts"


def write_adapter_of_two_experts(folder: Path, *, rows_of_zeros: bool) -> Path:
    tensors = {}
    for expert in (0, 2):
        of_one = lora(f"{STACK}.gate_up_projs.{expert}", 70, 64, seed=expert, share=2.0**-8)
        for key, value in of_one.items():
            if rows_of_zeros and "lora_B" in key:
                value[::3] = 0
        tensors |= of_one
    targets = [f"experts.gate_up_projs.{i}" for i in (0, 2)]
    return write_adapter(folder, tensors, target_modules=targets)


@pytest.mark.parametrize("rows_of_zeros", [False, True])
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_what_is_merged_does_not_hang_on_how_signs_of_zero_are_kept(
    tmp_path: Path, rows_of_zeros: bool, weight: float
) -> None:
    """The base has many codes of -0, which stays -0 where nothing, or -0, is added."""
    base = quantized.write_gpt_oss(tmp_path / "base")
    adapter = write_adapter_of_two_experts(tmp_path / "a", rows_of_zeros=rows_of_zeros)
    receipts = [
        regraft.merge(base, [(adapter, weight)], tmp_path / f"out{undo}", undo=undo)
        for undo in (True, False)
    ]
    regraft.dequantize(base, tmp_path / "plain")
    regraft.merge(tmp_path / "plain", [(adapter, weight)], tmp_path / "later")
    files = [tmp_path / each / "model.safetensors" for each in ("outTrue", "outFalse", "later")]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    assert [r.changed for r in receipts[0].tensors] == [r.changed for r in receipts[1].tensors]
    assert_restores(base, tmp_path / "outTrue", tmp_path)


def test_codes_of_negative_zero_take_a_bit(tmp_path: Path) -> None:
    base = quantized.write_gpt_oss(tmp_path / "base")
    adapter = write_adapter_of_two_experts(tmp_path / "a", rows_of_zeros=False)
    regraft.merge(base, adapter, tmp_path / "out")
    kept = read_header(tmp_path / "out/regraft/undo/patch.safetensors").tensors
    blocks = np.fromfile(base / "model.safetensors", np.uint8)
    spec = read_header(base / "model.safetensors").tensors[f"{STACK}.gate_up_proj_blocks"]
    codes = blocks[spec.start : spec.start + spec.nbytes]
    zeros = int(np.sum(codes & 7 == 0) + np.sum(codes & 0x70 == 0))
    assert zeros > 1000
    signs = -(-zeros // 8)
    assert signs < kept[f"{STACK}.gate_up_proj_blocks/planes"].nbytes < signs + 100
