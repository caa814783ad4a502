"""``check --for diffusers``: what it takes of its own files, of PEFT's and of kohya's.

`make engines` shows diffusers all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import regraft
from adapters.dialects.test_images import write_model
from merging import toys
from regraft.engines.diffusers import _KNOWN
from regraft.engines.report import EngineReport

RANK = 3
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET: dict[str, tuple[int, ...]] = {
    f"{BLOCK}.attn1.to_q": (8, 8), f"{BLOCK}.attn1.to_k": (8, 8), f"{BLOCK}.attn1.to_v": (8, 8),
    f"{BLOCK}.attn1.to_out.0": (8, 8), f"{BLOCK}.ff.net.2": (8, 8),
    "down_blocks.1.attentions.0.proj_in": (8, 8), "class_embedding.linear_1": (8, 8),
}  # fmt: skip
Q, K, V, OUT, FF, PROJ, ODD = UNET
TEXT: dict[str, tuple[int, ...]] = {
    f"encoder.layers.0.{name}": (8, 8)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")
}
DOUBLE = "transformer_blocks.0"
JOINT: dict[str, tuple[int, ...]] = {
    f"{DOUBLE}.attn.to_q": (8, 8), f"{DOUBLE}.attn.to_k": (8, 8), f"{DOUBLE}.attn.to_v": (8, 8),
    f"{DOUBLE}.ff.net.2": (8, 8), "x_embedder": (8, 8),
}  # fmt: skip
SINGLE = {f"single_{DOUBLE}.proj_mlp": (8, 8)}

CLASSES = {"unet": "UNet2DConditionModel", "flux": "FluxTransformer2DModel",
           "sd3": "SD3Transformer2DModel"}  # fmt: skip


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    config = {"_class_name": CLASSES["unet"], "layers_per_block": 2}
    return write_model(tmp_path / "pipeline" / "unet", UNET, config)


@pytest.fixture
def text_encoder(tmp_path: Path) -> Path:
    config = {"architectures": ["CLIPTextModel"]}
    return write_model(tmp_path / "pipeline" / "text_encoder", TEXT, config)


def transformer(folder: Path, kind: str) -> Path:
    shapes = JOINT | (SINGLE if kind == "flux" else {})
    return write_model(folder / kind / "transformer", shapes, {"_class_name": CLASSES[kind]})


def kohya(file: Path, alphas: dict[str, float | None], prefix: str, **more: Any) -> Path:
    """Write a file of kohya's with factors for modules, by their names, each with its alpha."""
    tensors: dict[str, Any] = {}
    for number, (module, alpha) in enumerate(alphas.items()):
        name = f"{prefix}{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = toys.draw(RANK, 8, seed=number)
        tensors[f"{name}.lora_up.weight"] = toys.draw(8, RANK, seed=number)
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors | more, file)
    return file


def own(file: Path, part: str, modules: list[str], **more: Any) -> Path:
    """Write diffusers' file with factors for modules, whose scale is 1."""
    tensors = {}
    for module in modules:
        tensors[f"{part}.{module}.lora_A.weight"] = toys.draw(RANK, 8)
        tensors[f"{part}.{module}.lora_B.weight"] = toys.draw(8, RANK)
    file.parent.mkdir(exist_ok=True)
    save_file(tensors | more, file)
    return file


def told(base: Path, adapter: Path) -> EngineReport:
    report = regraft.check(base, adapter, engine="diffusers")
    assert not report.problems
    assert report.engine is not None
    return report.engine


def effects(base: Path, adapter: Path) -> dict[str, str]:
    found = told(base, adapter).findings
    assert all(each.because and "regraft" in each.way_out for each in found)
    return {each.where: each.effect for each in found}


# -- its own files, and PEFT's ---------------------------------------------------------------------


def test_its_own_file_is_taken(unet: Path, tmp_path: Path) -> None:
    magnitude = {f"unet.{Q}.lora_magnitude_vector": np.abs(toys.draw(8)) + 1}
    file = own(tmp_path / "a" / "pytorch_lora_weights.safetensors", "unet", [Q, PROJ], **magnitude)
    assert effects(unet, file) == {}


@pytest.mark.parametrize(("kind", "effect"), [("flux", "refuses"), ("sd3", "leaves out")])
def test_a_peft_folder_is_nothing_and_an_error_in_flux(
    tmp_path: Path, kind: str, effect: str
) -> None:
    name = f"{DOUBLE}.attn.to_q"
    adapter = toys.write_adapter(tmp_path / "a", toys.lora(name, 8, 8), target_modules=["to_q"])
    assert effects(transformer(tmp_path, kind), adapter) == {name: effect}


def test_a_text_encoders_own_file_needs_attention(text_encoder: Path, tmp_path: Path) -> None:
    q, _, _, fc1 = TEXT
    file = tmp_path / "a" / "pytorch_lora_weights.safetensors"
    assert effects(text_encoder, own(file, "text_encoder", [q, fc1])) == {}
    assert effects(text_encoder, own(file, "text_encoder", [fc1])) == {fc1: "refuses"}


def test_a_text_encoder_loses_magnitudes(text_encoder: Path, tmp_path: Path) -> None:
    q = next(iter(TEXT))
    magnitude = {f"text_encoder.{q}.lora_magnitude_vector": np.abs(toys.draw(8)) + 1}
    file = own(tmp_path / "a" / "pytorch_lora_weights.safetensors", "text_encoder", [q],
               **magnitude)  # fmt: skip
    assert effects(text_encoder, file) == {q: "leaves out"}


@pytest.mark.parametrize("part", ["text_encoder_2", "text_encoder_3"])
def test_t5_is_left_out(tmp_path: Path, part: str) -> None:
    q, config = next(iter(TEXT)), {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    base = write_model(tmp_path / "pipeline" / part, TEXT, config)
    file = own(tmp_path / "a" / "pytorch_lora_weights.safetensors", part, [q])
    assert effects(base, file) == {q: "leaves out"}


# -- kohya's files for UNets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alphas", "applied"),
    [
        ({Q: 6.0, V: 6.0, PROJ: 6.0}, {}),
        ({Q: 2.0, V: 6.0, PROJ: 6.0}, {Q: 2.0}),
        ({Q: 6.0, V: 6.0, PROJ: 1.5, FF: 9.0}, {}),
        ({Q: 6.0, V: 6.0, PROJ: None}, {PROJ: 2.0}),
        ({Q: None, PROJ: None}, {}),
        ({OUT: 2.0, K: 6.0, FF: 6.0}, {OUT: 2.0}),
    ],
    ids=["one", "of attention", "of others", "none of some", "none", "of the output"],
)
def test_alphas_of_attention_are_the_common_one(
    unet: Path, tmp_path: Path, alphas: dict[str, float | None], applied: dict[str, float]
) -> None:
    found = told(unet, kohya(tmp_path / "x.safetensors", alphas, "lora_unet_")).findings
    assert {each.where: each.applied for each in found} == applied
    assert all(each.effect == "other scale" for each in found)


def test_of_several_common_alphas_the_first_of_the_file_counts(unet: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "x.safetensors", {Q: 2.0, V: 6.0}, "lora_unet_")
    assert {each.where: each.applied for each in told(unet, file).findings} == {V: 2.0 / RANK}


def test_magnitudes_of_a_kohya_file_are_left_out(unet: Path, tmp_path: Path) -> None:
    scale = {f"lora_unet_{Q.replace('.', '_')}.dora_scale": np.abs(toys.draw(8, 1)) + 1}
    file = kohya(tmp_path / "x.safetensors", {Q: 6.0, V: 6.0}, "lora_unet_", **scale)
    assert effects(unet, file) == {Q: "leaves out"}


def test_a_name_whose_underscores_become_dots_is_left_out(unet: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "x.safetensors", {Q: 6.0, ODD: 6.0}, "lora_unet_")
    assert effects(unet, file) == {ODD: "leaves out"}
    file = kohya(tmp_path / "y.safetensors", {ODD: 6.0}, "lora_unet_")
    assert effects(unet, file) == {ODD: "refuses"}


@pytest.mark.parametrize(
    ("pipeline", "others", "effect"),
    [
        ("StableDiffusionPipeline", {}, "refuses"),
        ("StableDiffusionPipeline", {V: 6.0}, "leaves out"),
        ("StableDiffusionXLPipeline", {}, None),
        ("StableDiffusionXLPipeline", {V: 6.0}, "leaves out"),
    ],
)
def test_stabilitys_names_are_known_for_sdxl_where_no_others_are(
    unet: Path, tmp_path: Path, pipeline: str, others: dict[str, float], effect: str | None
) -> None:
    toys.write_json(unet.parent / "model_index.json", {"_class_name": pipeline})
    name = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    file = kohya(tmp_path / "x.safetensors", {name: 6.0, **others}, "lora_unet_")
    assert effects(unet, file) == ({Q: effect} if effect else {})


def test_the_names_that_come_back_are_those_of_diffusers() -> None:
    made = pytest.importorskip(
        "diffusers.loaders.lora_conversion_utils", reason="needs diffusers in this environment"
    )
    names = [*UNET, "mid_block.resnets.0.time_emb_proj", "conv_in", "conv_out",
             "up_blocks.0.resnets.1.conv_shortcut", "up_blocks.0.upsamplers.0.conv",
             "down_blocks.0.downsamplers.0.conv", "time_embedding.linear_1",
             "add_embedding.linear_1", f"{BLOCK}.attn2.add_k_proj",
             "encoder_hid_proj"]  # fmt: skip
    for module in names:
        key = f"lora_unet_{module.replace('.', '_')}.lora_down.weight"
        found = made._convert_unet_lora_key(key).replace(".processor.", ".")
        found = found.removesuffix(".lora.down.weight")
        for leaf in ("to_q", "to_k", "to_v", "to_out"):
            whole = leaf + (".0" if leaf == "to_out" else "")
            found = found.replace(f"{leaf}_lora.down.weight", whole)
        assert (found == module) == all(map(_KNOWN.fullmatch, module.split("."))), module


# -- kohya's files for text encoders and transformers ----------------------------------------------


@pytest.mark.parametrize(
    ("modules", "lost"),
    [
        (["q_proj", "v_proj", "out_proj", "fc1"], {}),
        (["q_proj", "v_proj"], dict.fromkeys(["q_proj", "v_proj"], "refuses")),
        (["q_proj", "v_proj", "fc1"], dict.fromkeys(["q_proj", "v_proj"], "leaves out")),
        (["fc1"], {}),
    ],
)
def test_attention_of_a_text_encoder_is_told_by_its_output(
    text_encoder: Path, tmp_path: Path, modules: list[str], lost: dict[str, str]
) -> None:
    alphas: dict[str, float | None] = {
        f"text_model.{name}": 6.0 for name in TEXT if name.endswith(tuple(modules))
    }
    found = effects(text_encoder, kohya(tmp_path / "x.safetensors", alphas, "lora_te_"))
    assert {name.rpartition(".")[2]: effect for name, effect in found.items()} == lost


def test_all_alphas_of_a_text_encoder_are_the_common_one(
    text_encoder: Path, tmp_path: Path
) -> None:
    q, v, out, fc1 = TEXT
    alphas: dict[str, float | None] = {q: 6.0, v: 6.0, out: 6.0, fc1: 1.5}
    written = {f"text_model.{name}": alpha for name, alpha in alphas.items()}
    found = told(text_encoder, kohya(tmp_path / "x.safetensors", written, "lora_te1_")).findings
    assert [(each.where, each.applied, each.scale) for each in found] == [(fc1, 2.0, 0.5)]


def test_stable_diffusion_3_reads_no_kohya_files(tmp_path: Path) -> None:
    name = f"{DOUBLE}.attn.to_q"
    file = kohya(tmp_path / "x.safetensors", {name: 6.0}, "lora_transformer_")
    assert effects(transformer(tmp_path, "sd3"), file) == {name: "leaves out"}


def test_flux_knows_attention_by_diffusers_names(tmp_path: Path) -> None:
    q, mlp, single = f"{DOUBLE}.attn.to_q", f"{DOUBLE}.ff.net.2", next(iter(SINGLE))
    alphas: dict[str, float | None] = {q: 6.0, mlp: 6.0, single: 6.0, "x_embedder": 1.5}
    file = kohya(tmp_path / "x.safetensors", alphas, "lora_transformer_")
    found = effects(transformer(tmp_path, "flux"), file)
    assert found == {mlp: "refuses", single: "refuses"}
    file = kohya(tmp_path / "y.safetensors", {q: None}, "lora_transformer_")
    assert effects(transformer(tmp_path, "flux"), file) == {q: "refuses"}


def test_flux_knows_its_makers_names_in_blocks(tmp_path: Path) -> None:
    alphas: dict[str, float | None] = {"double_blocks.0.img_mlp.2": 1.5, "img_in": 6.0}
    file = kohya(tmp_path / "x.safetensors", alphas, "lora_unet_")
    assert effects(transformer(tmp_path, "flux"), file) == {"x_embedder": "leaves out"}
