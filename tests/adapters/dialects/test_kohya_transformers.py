"""kohya's files for Flux and Stable Diffusion 3, in their makers' names; and what is no LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regraft
from adapters.dialects.test_images import write_model
from merging import toys
from regraft.adapters.dialects.images.mmdit_names import OF_TRANSFORMERS, places
from regraft.errors import AdapterError, MismatchError, UnsupportedError

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
FLUX: dict[str, tuple[int, ...]] = {
    f"{DOUBLE}.attn.to_q": (8, 8), f"{DOUBLE}.attn.to_k": (4, 8), f"{DOUBLE}.attn.to_v": (6, 8),
    f"{DOUBLE}.attn.to_out.0": (8, 8), f"{DOUBLE}.ff.net.0.proj": (12, 8),
    f"{SINGLE}.attn.to_q": (8, 8), f"{SINGLE}.attn.to_k": (8, 8), f"{SINGLE}.attn.to_v": (8, 8),
    f"{SINGLE}.proj_mlp": (20, 8), f"{SINGLE}.proj_out": (8, 28),
    "norm_out.linear": (16, 8), "x_embedder": (8, 4),
}  # fmt: skip
THEIRS = {
    "double_blocks_0_img_attn_qkv": [f"{DOUBLE}.attn.to_{n}" for n in "qkv"],
    "double_blocks_0_img_attn_proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks_0_img_mlp_0": [f"{DOUBLE}.ff.net.0.proj"],
    "single_blocks_0_linear1": [*(f"{SINGLE}.attn.to_{n}" for n in "qkv"), f"{SINGLE}.proj_mlp"],
    "single_blocks_0_linear2": [f"{SINGLE}.proj_out"],
    "img_in": ["x_embedder"],
}
RANK, ALPHA = 3, 6.0


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    config = {"_class_name": "FluxTransformer2DModel"}
    return write_model(tmp_path / "pipeline" / "transformer", FLUX, config)


def kohya(file: Path, shapes: dict[str, tuple[int, ...]], **more: Any) -> Path:
    """Write a file of kohya's with factors for modules of some shapes, by the names they have."""
    tensors: dict[str, Any] = {}
    for seed, (name, (out, *rest)) in enumerate(shapes.items()):
        ones = (1,) * (len(rest) - 1)
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": toys.draw(RANK, *rest, seed=seed),
            f"lora_unet_{name}.lora_up.weight": toys.draw(out, RANK, *ones, seed=seed + 99),
            f"lora_unet_{name}.alpha": np.array(ALPHA, np.float32),
        }
    save_file(tensors | more, file)
    return file


def delta_of(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return what a module's factors in a file add."""
    key = f"lora_unet_{name}.lora_"
    up, down = tensors[f"{key}up.weight"], tensors[f"{key}down.weight"]
    flat = up.reshape(len(up), RANK).astype(np.float64) @ down.reshape(RANK, -1)
    return ALPHA / RANK * flat


def written_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of Flux's own modules: rows of all that one is, and the width of each."""
    return {
        name: (sum(FLUX[m][0] for m in modules), FLUX[modules[0]][1])
        for name, modules in THEIRS.items()
    }


def merged(base: Path, adapter: Path, out: Path) -> dict[str, np.ndarray]:
    regraft.merge(base, adapter, out)
    return load_file(out / "model.safetensors")


def test_rows_of_one_matrix_are_those_of_its_modules(flux: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "flux.safetensors", written_shapes())
    tensors, before = load_file(file), load_file(flux / "model.safetensors")
    after = merged(flux, file, tmp_path / "out")
    for name, modules in THEIRS.items():
        found = np.concatenate([after[f"{m}.weight"] - before[f"{m}.weight"] for m in modules])
        assert np.allclose(found, delta_of(tensors, name), atol=1e-5)
    untouched = f"{'norm_out.linear'}.weight"
    assert np.array_equal(after[untouched], before[untouched])
    assert regraft.verify(tmp_path / "out", base=flux, adapters=file).ok


def test_halves_of_the_last_modulation_are_exchanged(flux: Path, tmp_path: Path) -> None:
    name = "final_layer_adaLN_modulation_1"
    file = kohya(tmp_path / "flux.safetensors", {name: (16, 8)})
    delta = delta_of(load_file(file), name)
    after = merged(flux, file, tmp_path / "out")["norm_out.linear.weight"]
    before = load_file(flux / "model.safetensors")["norm_out.linear.weight"]
    assert np.allclose(after - before, np.concatenate([delta[8:], delta[:8]]), atol=1e-5)


def test_dora_of_one_matrix_is_that_of_its_rows(flux: Path, tmp_path: Path) -> None:
    name = "double_blocks_0_img_attn_qkv"
    scale = {f"lora_unet_{name}.dora_scale": np.abs(toys.draw(18, 1)) + 1}
    file = kohya(tmp_path / "flux.safetensors", {name: (18, 8)}, **scale)
    delta, before = delta_of(load_file(file), name), load_file(flux / "model.safetensors")
    whole = np.concatenate([before[f"{m}.weight"] for m in THEIRS[name]]).astype(np.float64) + delta
    wanted = next(iter(scale.values())) * whole / np.linalg.norm(whole, axis=1, keepdims=True)
    after = merged(flux, file, tmp_path / "out")
    found = np.concatenate([after[f"{m}.weight"] for m in THEIRS[name]])
    assert np.allclose(found, wanted, atol=1e-4)


def test_there_and_back_in_diffusers_dialect_is_the_same_merge(flux: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "flux.safetensors", written_shapes())
    expected = merged(flux, file, tmp_path / "expected")
    regraft.convert(file, tmp_path / "there", to="diffusers", base=flux)
    found = merged(flux, tmp_path / "there", tmp_path / "found")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_rows_that_do_not_fit_are_refused_with_what_would(flux: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "x.safetensors", {"double_blocks_0_img_attn_qkv": (17, 8)})
    with pytest.raises(AdapterError, match=r"8 \(transformer_blocks\.0\.attn\.to_q\).*found 17"):
        regraft.merge(flux, file, tmp_path / "out")


def test_a_block_that_the_base_lacks_is_refused(flux: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "x.safetensors", {"double_blocks_7_img_attn_qkv": (18, 8)})
    with pytest.raises(MismatchError, match="double_blocks_7_img_attn_qkv"):
        regraft.merge(flux, file, tmp_path / "out")


def test_a_base_in_their_own_names_is_a_base(tmp_path: Path) -> None:
    module = "double_blocks.0.img_attn.qkv"
    base = write_model(tmp_path / "flux1", {module: (18, 8)}, {})
    file = kohya(tmp_path / "x.safetensors", {"double_blocks_0_img_attn_qkv": (18, 8)})
    before = load_file(base / "model.safetensors")[f"{module}.weight"]
    after = merged(base, file, tmp_path / "out")[f"{module}.weight"]
    delta = delta_of(load_file(file), "double_blocks_0_img_attn_qkv")
    assert np.allclose(after - before, delta, atol=1e-5)


def test_t5_of_flux_is_its_second_text_encoder(flux: Path, tmp_path: Path) -> None:
    module = "encoder.block.0.layer.0.SelfAttention.q"
    base = write_model(flux.parent / "text_encoder_2", {module: (8, 8)}, {})
    name = f"lora_te3_{module.replace('.', '_')}"
    more = {f"{name}.lora_down.weight": toys.draw(RANK, 8),
            f"{name}.lora_up.weight": toys.draw(8, RANK)}  # fmt: skip
    file = kohya(tmp_path / "x.safetensors", {"double_blocks_0_img_attn_qkv": (18, 8)}, **more)
    before = load_file(base / "model.safetensors")[f"{module}.weight"]
    assert not np.array_equal(merged(base, file, tmp_path / "out")[f"{module}.weight"], before)
    assert regraft.check(flux, file).ok


def test_the_names_are_those_of_a_transformer_of_diffusers_alone() -> None:
    assert not places(["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"])
    assert not places(["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"])
    assert set(THEIRS) <= set(places(FLUX))
    assert all(OF_TRANSFORMERS.fullmatch(name) for name in places(FLUX))
    assert not OF_TRANSFORMERS.fullmatch("down_blocks_0_resnets_0_conv1")
    assert not OF_TRANSFORMERS.fullmatch("input_blocks_4_1_proj_in")


# -- against what diffusers makes of their checkpoints ---------------------------------------------


class Grown(dict[str, Any]):
    """A checkpoint that holds zeros for whatever else is asked of it."""

    def pop(self, name: str, *default: Any) -> Any:  # noqa: ARG002
        import torch

        rows = 21504 if "linear1.bias" in name else 6
        return self[name] if name in self else torch.zeros(rows)


OF_SD3 = {
    "x_embedder.proj": (8, 4, 2, 2), "context_embedder": (8, 6), "t_embedder.mlp.0": (8, 5),
    "t_embedder.mlp.2": (8, 7), "y_embedder.mlp.0": (8, 9), "y_embedder.mlp.2": (8, 3),
    "final_layer.linear": (6, 8), "final_layer.adaLN_modulation.1": (16, 8),
    **{f"joint_blocks.{n}.{side}_block.{name}": shape for n in range(2)
       for side in ("x", "context")
       for name, shape in {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (32, 8),
                           "mlp.fc2": (8, 32), "adaLN_modulation.1": (48, 8)}.items()
       if not (n == 1 and side == "context" and name.split(".")[-1] in ("proj", "fc1", "fc2"))},
    "joint_blocks.0.x_block.attn2.qkv": (24, 8), "joint_blocks.0.x_block.attn2.proj": (8, 8),
}  # fmt: skip
OF_FLUX = {
    "img_in": (8, 4), "txt_in": (8, 5), "final_layer.linear": (4, 8),
    "final_layer.adaLN_modulation.1": (16, 8), "single_blocks.0.linear1": (21504, 8),
    "single_blocks.0.linear2": (8, 40), "single_blocks.0.modulation.lin": (24, 8),
    **{f"{name}_in.{leaf}_layer": (8, 7) for name in ("time", "vector", "guidance")
       for leaf in ("in", "out")},
    **{f"double_blocks.0.{side}_{name}": shape for side in ("img", "txt")
       for name, shape in {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.0": (32, 8),
                           "mlp.2": (8, 32), "mod.lin": (48, 8)}.items()},
}  # fmt: skip
CHECKPOINTS = {
    "flux": (OF_FLUX, "convert_flux_transformer_checkpoint_to_diffusers"),
    "sd3": (OF_SD3, "convert_sd3_transformer_checkpoint_to_diffusers"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_merge_is_what_diffusers_makes_of_their_merged_checkpoint(
    tmp_path: Path, name: str
) -> None:
    torch = pytest.importorskip("torch")
    made = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="needs diffusers in this environment"
    )
    shapes, function = CHECKPOINTS[name]

    def converted(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {f"{n}.weight": torch.from_numpy(w) for n, w in weights.items()}
        found = getattr(made, function)(Grown(tensors))
        return {n: t.numpy() for n, t in found.items() if n.endswith("weight") and t.ndim > 1}

    theirs = {n: toys.draw(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    base = tmp_path / "pipeline" / "transformer"
    toys.write_base(base, converted(theirs), {"_class_name": "Transformer2DModel"})
    file = kohya(tmp_path / "x.safetensors", {n.replace(".", "_"): s for n, s in shapes.items()})
    tensors = load_file(file)
    expected = converted({
        n: (w + delta_of(tensors, n.replace(".", "_")).reshape(w.shape)).astype(np.float32)
        for n, w in theirs.items()
    })  # fmt: skip
    found = merged(base, file, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(np.allclose(found[n], expected[n], atol=1e-4) for n in found)


# -- what is no LoRA -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "what"),
    [
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoHa"),
        (("lokr_w1", "lokr_w2_a", "lokr_w2_b"), "LoKr"),
        (("oft_blocks",), "OFT"),
        (("diff",), "whole difference"),
    ],
)
def test_another_method_is_named_with_what_merges_it(
    flux: Path, tmp_path: Path, ends: tuple[str, ...], what: str
) -> None:
    tensors = {f"lora_unet_img_in.{end}": toys.draw(3, 3) for end in ends}
    save_file(
        tensors | {"lora_unet_img_in.alpha": np.array(1, np.float32)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UnsupportedError, match=what) as caught:
        regraft.merge(flux, tmp_path / "x.safetensors", tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert "LyCORIS" in caught.value.problems[0].hint
