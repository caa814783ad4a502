"""Adapters for image models: kohya's layout and diffusers', by values, and in diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import regraft
from merging import toys
from regraft.adapters.dialects.images.sgm_names import sgm_name
from regraft.errors import (
    AdapterError,
    MismatchError,
    UnsupportedError,
    UsageError,
)

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
SHAPES: dict[str, tuple[int, ...]] = {
    f"{BLOCK}.attn1.to_q": (8, 8),
    f"{BLOCK}.attn1.to_out.0": (8, 8),
    f"{BLOCK}.ff.net.0.proj": (16, 8),
    "down_blocks.1.attentions.0.proj_in": (8, 8, 1, 1),
    "down_blocks.1.resnets.0.conv1": (8, 4, 3, 3),
    "conv_in": (4, 4, 3, 3),
}
CONFIG = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2}


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """The UNet of a pipeline, in the folder that it has there."""
    return write_model(tmp_path / "pipeline" / "unet", SHAPES, CONFIG)


def write_model(folder: Path, shapes: dict[str, Any], config: dict[str, Any]) -> Path:
    tensors = {f"{n}.weight": toys.draw(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    return toys.write_base(folder, tensors, config)


def factors(shapes: dict[str, Any] = SHAPES, dtype: Any = np.float32) -> dict[str, Any]:
    """Return PEFT's factors for every module, with ranks that differ."""
    found = {}
    for number, (name, (out, *rest)) in enumerate(shapes.items()):
        rank = 3 + number % 2
        key = f"{toys.PREFIX}{name}"
        found[f"{key}.lora_A.weight"] = toys.draw(rank, *rest, seed=number)
        ones = (1,) * (len(rest) - 1)
        found[f"{key}.lora_B.weight"] = toys.draw(out, rank, *ones, seed=9 + number)
    return {key: value.astype(dtype) for key, value in found.items()}


def write_peft(folder: Path, tensors: Any = None, **config: Any) -> Path:
    usual = {
        "target_modules": list(SHAPES), "r": 3, "lora_alpha": 5, "task_type": None,
        "rank_pattern": dict.fromkeys(list(SHAPES)[1::2], 4),
        "alpha_pattern": {"conv_in": 0.3, "down_blocks.1.attentions.0.proj_in": 7},
    }  # fmt: skip
    return toys.write_adapter(folder, tensors or factors(), **usual | config)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and np.array_equal(one[n], other[n]) for n in one
    )


def merged(base: Path, adapter: Path, out: Path) -> dict[str, np.ndarray]:
    regraft.merge(base, adapter, out)
    return load_file(next(out.glob("*.safetensors")))


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=["plain", "rsLoRA"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, toys.BF16])
def test_every_value_comes_back_and_the_merge_is_the_same(
    unet: Path, tmp_path: Path, to: str, config: dict[str, Any], dtype: Any
) -> None:
    peft = write_peft(tmp_path / "peft", factors(dtype=dtype), **config)
    done = regraft.convert(peft, tmp_path / "there", to=to, base=unet)
    assert not done.uniform
    regraft.convert(tmp_path / "there", tmp_path / "back", base=unet)
    assert same(weights(peft), weights(tmp_path / "back"))
    one = merged(unet, peft, tmp_path / "one")
    other = merged(unet, tmp_path / "there", tmp_path / "other")
    assert same(one, other)
    assert not same(one, load_file(unet / "model.safetensors"))


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_dora_comes_back(unet: Path, tmp_path: Path, to: str) -> None:
    tensors = factors()
    for name, (out, *rest) in SHAPES.items():
        shape = (1, out, 1, 1) if len(rest) > 1 else (out,)
        tensors[f"{toys.PREFIX}{name}.lora_magnitude_vector"] = 4 + toys.draw(*shape)
    peft = write_peft(tmp_path / "peft", tensors, use_dora=True)
    regraft.convert(peft, tmp_path / "there", to=to, base=unet)
    regraft.convert(tmp_path / "there", tmp_path / "back", base=unet)
    assert same(weights(peft), weights(tmp_path / "back"))
    other = merged(unet, tmp_path / "there", tmp_path / "other")
    assert same(merged(unet, peft, tmp_path / "one"), other)


def test_the_part_is_remembered_without_the_base(unet: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft")
    with pytest.raises(UsageError, match="which part of a pipeline"):
        regraft.convert(peft, tmp_path / "out", to="diffusers")
    regraft.convert(peft, tmp_path / "there", to="diffusers", base=unet)
    regraft.convert(tmp_path / "there", tmp_path / "back")
    regraft.convert(tmp_path / "back", tmp_path / "again", to="diffusers")
    one, other = (
        tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("there", "again")
    )
    assert one.read_bytes() == other.read_bytes()


# -- kohya -----------------------------------------------------------------------------------------


def kohya(file: Path, modules: dict[str, tuple[Any, Any]], **numbers: Any) -> Path:
    """Write a file as kohya's scripts do; ``numbers`` are further tensors by ending."""
    tensors = {}
    for name, (down, up) in modules.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors |= {f"{name}.{end}": value for end, value in numbers.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(value) for name, value in tensors.items()}, file)
    return file


Q = "lora_unet_" + f"{BLOCK}.attn1.to_q".replace(".", "_")
PAIR = (toys.draw(3, 8, seed=1), toys.draw(8, 3, seed=2))


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [({}, 1.0), ({"alpha": np.float32(6)}, 2.0), ({"alpha": np.float16(1.5)}, 0.5),
     ({"alpha": np.int64(3)}, 1.0), ({"alpha": np.array(6, toys.BF16)}, 2.0)],
    ids=["none", "float32", "float16", "int64", "bfloat16"],
)  # fmt: skip
def test_alpha_is_over_the_rank_of_the_module(
    unet: Path, tmp_path: Path, alpha: dict[str, Any], scale: float
) -> None:
    file = kohya(tmp_path / "style.safetensors", {Q: PAIR}, **alpha)
    regraft.convert(file, tmp_path / "out", base=unet)
    config = toys.read_json(tmp_path / "out" / "adapter_config.json")
    assert config["lora_alpha"] / config["r"] == scale


@pytest.mark.parametrize(
    ("module", "down", "up"),
    [
        (f"{BLOCK}.attn1.to_q", (3, 8, 1, 1), (8, 3, 1, 1)),
        ("down_blocks.1.attentions.0.proj_in", (3, 8), (8, 3)),
    ],
    ids=["as a 1x1 convolution", "as a linear layer"],
)
def test_factors_lie_as_the_bases_weight_does(
    unet: Path, tmp_path: Path, module: str, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    name = "lora_unet_" + module.replace(".", "_")
    a, b = toys.draw(*down), toys.draw(*up)
    file = kohya(tmp_path / "style.safetensors", {name: (a, b)})
    found = merged(unet, file, tmp_path / "out")[f"{module}.weight"]
    before = load_file(unet / "model.safetensors")[f"{module}.weight"]
    delta = b.reshape(8, 3).astype(np.float64) @ a.reshape(3, 8)
    assert np.allclose(found - before, delta.reshape(before.shape), atol=1e-5)


def test_a_name_that_fits_two_modules_is_refused_with_both(tmp_path: Path) -> None:
    shapes = {"a.b_c": (8, 8), "a_b.c": (8, 8), "d": (8, 8)}
    base = write_model(tmp_path / "unet", shapes, CONFIG)
    file = kohya(tmp_path / "style.safetensors", {"lora_unet_a_b_c": PAIR})
    with pytest.raises(MismatchError, match=r"a\.b_c.*a_b\.c"):
        regraft.convert(file, tmp_path / "out", base=base)
    peft = write_peft(tmp_path / "peft", factors({"a_b.c": (8, 8)}), target_modules=["a_b.c"])
    with pytest.raises(UnsupportedError, match=r"a\.b_c, a_b\.c"):
        regraft.convert(peft, tmp_path / "out", to="kohya", base=base)


def test_a_name_that_no_module_has_is_refused(unet: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "style.safetensors", {Q: PAIR, "lora_unet_nothing": PAIR})
    with pytest.raises(MismatchError, match="lora_unet_nothing"):
        regraft.check(unet, file)
    with pytest.raises(UsageError, match="underscores"):
        regraft.convert(file, tmp_path / "out")
    facts = regraft.inspect(file).adapter
    assert facts is not None
    assert (facts.dialect, facts.modules) == ("kohya", 2)


@pytest.mark.parametrize("end", ["hada_w1_a", "lokr_w1", "lora_mid.weight"])
def test_what_is_no_lora_is_refused_by_name(unet: Path, tmp_path: Path, end: str) -> None:
    file = kohya(tmp_path / "style.safetensors", {Q: PAIR}, **{end: toys.draw(3, 3)})
    with pytest.raises(UnsupportedError, match=end):
        regraft.convert(file, tmp_path / "out", base=unet)


def test_magnitudes_of_inputs_are_refused(unet: Path, tmp_path: Path) -> None:
    file = kohya(tmp_path / "style.safetensors", {Q: PAIR}, dora_scale=toys.draw(1, 8))
    with pytest.raises(AdapterError, match="not those of outputs"):
        regraft.convert(file, tmp_path / "out", base=unet)


def test_stabilitys_names_of_a_unet_are_known(unet: Path, tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    one = kohya(tmp_path / "one.safetensors", {name: PAIR})
    other = kohya(tmp_path / "other.safetensors", {Q: PAIR})
    expected = merged(unet, other, tmp_path / "expected")
    assert same(merged(unet, one, tmp_path / "out"), expected)


def test_a_file_of_a_whole_pipeline_is_a_base(tmp_path: Path) -> None:
    module = "model.diffusion_model.input_blocks.4.1.proj_in"
    base = write_model(tmp_path / "sdxl", {module: (8, 8)}, {})
    file = kohya(tmp_path / "x.safetensors", {"lora_unet_input_blocks_4_1_proj_in": PAIR})
    found = merged(base, file, tmp_path / "out")
    before = load_file(base / "model.safetensors")
    assert not np.array_equal(found[f"{module}.weight"], before[f"{module}.weight"])


def test_a_text_encoder_has_a_number_where_there_are_two(tmp_path: Path) -> None:
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    peft = write_peft(tmp_path / "peft", factors({module: (8, 8)}), target_modules=["q_proj"])
    base = write_model(tmp_path / "sd" / "text_encoder", {module: (8, 8)}, {})
    regraft.convert(peft, tmp_path / "one", to="kohya", base=base)
    write_model(tmp_path / "sd" / "text_encoder_2", {module: (8, 8)}, {})
    regraft.convert(peft, tmp_path / "two", to="kohya", base=base)
    names = [next(iter(load_file(tmp_path / n / "lora.safetensors"))) for n in ("one", "two")]
    assert [name.partition("_text")[0] for name in names] == ["lora_te", "lora_te1"]


@pytest.mark.parametrize("saved_as", ["text_model.encoder", "encoder"])
def test_text_models_are_found_as_any_transformers_saves_them(
    tmp_path: Path, saved_as: str
) -> None:
    module = f"{saved_as}.layers.0.self_attn.q_proj"
    base = write_model(tmp_path / "sd" / "text_encoder", {module: (8, 8)}, {})
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    file = kohya(tmp_path / "x.safetensors", {name: PAIR})
    found = merged(base, file, tmp_path / "out")
    before = load_file(base / "model.safetensors")
    assert not np.array_equal(found[f"{module}.weight"], before[f"{module}.weight"])
    regraft.convert(file, tmp_path / "peft", base=base)
    regraft.convert(tmp_path / "peft", tmp_path / "again", to="kohya", base=base)
    assert f"{name}.alpha" in load_file(tmp_path / "again" / "lora.safetensors")


# -- diffusers -------------------------------------------------------------------------------------


def in_diffusers(file: Path, tensors: dict[str, Any], said: dict[str, Any] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"}
    if said is not None:
        header["lora_adapter_metadata"] = json.dumps(said)
    save_file(tensors, file, header)
    return file


@pytest.mark.parametrize(
    ("module", "written"),
    [
        (f"{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn1.to_q.lora.{{}}.weight"),
        (f"{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn1.processor.to_q_lora.{{}}.weight"),
        (f"{BLOCK}.attn1.to_out.0", f"unet.{BLOCK}.attn1.processor.to_out_lora.{{}}.weight"),
        (f"{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn1.to_q.lora_linear_layer.{{}}.weight"),
    ],
)
def test_names_of_older_releases(unet: Path, tmp_path: Path, module: str, written: str) -> None:
    old = {written.format("down"): PAIR[0], written.format("up"): PAIR[1]}
    new = {f"unet.{module}.lora_A.weight": PAIR[0], f"unet.{module}.lora_B.weight": PAIR[1]}
    file = in_diffusers(tmp_path / "a" / "pytorch_lora_weights.safetensors", old)
    other = in_diffusers(tmp_path / "b" / "pytorch_lora_weights.safetensors", new)
    expected = merged(unet, other, tmp_path / "expected")
    assert same(merged(unet, file, tmp_path / "out"), expected)


def test_the_scale_is_one_without_a_config_and_the_configs_with_one(tmp_path: Path) -> None:
    q = f"unet.{BLOCK}.attn1.to_q"
    tensors = {f"{q}.lora_A.weight": PAIR[0], f"{q}.lora_B.weight": PAIR[1]}
    said = {"unet.r": 3, "unet.lora_alpha": 3, "unet.alpha_pattern": {f"{BLOCK}.attn1.to_q": 12}}
    for name, config, scale in (("without", None, 1.0), ("with", said, 4.0)):
        file = in_diffusers(tmp_path / name / "pytorch_lora_weights.safetensors", tensors, config)
        facts = regraft.inspect(file).adapter
        assert facts is not None
        assert facts.scale == scale


def test_one_part_of_several_is_taken_by_the_base_and_the_others_are_said(
    unet: Path, tmp_path: Path
) -> None:
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    q = f"unet.{BLOCK}.attn1.to_q"
    tensors = {
        f"{owner}.lora_{n}.weight": value
        for owner in (text, q)
        for n, value in zip("AB", PAIR, strict=True)
    }
    file = in_diffusers(tmp_path / "a" / "pytorch_lora_weights.safetensors", tensors)
    receipt = regraft.merge(unet, file, tmp_path / "out")
    assert any("text_encoder of it is for other parts" in each for each in receipt.warnings)
    with pytest.raises(UsageError, match="which part is meant"):
        regraft.convert(file, tmp_path / "peft")
    assert regraft.inspect(file).kind == "adapter"
    other = write_model(tmp_path / "pipeline" / "transformer", SHAPES, {})
    with pytest.raises(MismatchError, match="nothing for this part"):
        regraft.check(other, file)
    odd = write_model(tmp_path / "odd", SHAPES, {})
    with pytest.raises(UsageError, match="which part of the pipeline"):
        regraft.check(odd, file)


def test_what_cannot_be_said_is_refused_by_name(unet: Path, tmp_path: Path) -> None:
    bias = {f"{toys.PREFIX}conv_in.lora_B.bias": np.ones(4, np.float32)}
    peft = write_peft(tmp_path / "peft", {**factors(), **bias}, lora_bias=True)
    with pytest.raises(UnsupportedError, match="conv_in"):
        regraft.convert(peft, tmp_path / "out", to="kohya", base=unet)
    regraft.convert(peft, tmp_path / "biased", to="diffusers", base=unet)
    saved = {f"{toys.PREFIX}conv_in.weight": np.ones((4, 4, 3, 3), np.float32)}
    peft = write_peft(tmp_path / "saved", {**factors({}), **saved}, modules_to_save=["conv_in"])
    for to in ("kohya", "diffusers"):
        with pytest.raises(UnsupportedError, match=r"conv_in\.weight"):
            regraft.convert(peft, tmp_path / "out", to=to, base=unet)


# -- in diffusers itself ---------------------------------------------------------------------------


def live_unet(**config: Any) -> Any:
    """Return a small UNet of diffusers, of two blocks with attention and convolutions."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers in this environment")
    torch = pytest.importorskip("torch")

    torch.manual_seed(0)
    usual = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**usual | config).eval()


def answer(unet: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        return unet(sample, 5, text).sample


def trained(unet: Any, **config: Any) -> Any:
    """Add an adapter to a live UNet whose factors are random, with patterns."""
    import torch
    from peft import LoraConfig

    targets = ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj", "conv_in", "conv"]
    usual = {"rank_pattern": {"to_v": 5}, "alpha_pattern": {"to_q": 2, "conv1": 9}}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, **usual | config))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn.abs() / 2 if "magnitude" in name else drawn / 8
    return unet


def saved_by_diffusers(unet: Any, folder: Path) -> Path:
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )  # fmt: skip
    return folder


def near(one: Any, other: Any) -> bool:
    return float((one - other).abs().max()) < 1e-4 * float(other.abs().max())


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline" / "unet"
    live_unet().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=["plain", "rsLoRA"])
def test_a_merge_of_what_diffusers_saved_answers_as_the_live_adapter(
    pipeline: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    from diffusers import UNet2DConditionModel

    live = trained(live_unet(), **config)
    adapter = saved_by_diffusers(live, tmp_path / "lora")
    regraft.merge(pipeline, adapter, tmp_path / "merged")
    found = answer(UNet2DConditionModel.from_pretrained(tmp_path / "merged"))
    assert near(found, answer(live))
    assert not near(found, answer(live_unet()))


@pytest.mark.parametrize(
    ("to", "uniform", "right"),
    [("diffusers", False, True), ("kohya", True, True), ("kohya", False, False)],
    ids=["diffusers", "kohya, uniform", "kohya, several alphas"],
)
def test_diffusers_answers_with_what_is_written_as_the_live_adapter(
    pipeline: Path, tmp_path: Path, to: str, uniform: bool, right: bool
) -> None:
    """Of kohya's files diffusers 0.42 leaves out alphas of attention where there are several."""
    from diffusers import StableDiffusionPipeline

    live = trained(live_unet())
    peft = tmp_path / "peft"
    regraft.convert(saved_by_diffusers(live, tmp_path / "lora"), peft, base=pipeline)
    done = regraft.convert(peft, tmp_path / "out", to=to, base=pipeline, uniform=uniform)
    again = live_unet()
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        tmp_path / "out", weight_name=done.files[0], unet_config=again.config,
        return_lora_metadata=True,
    )  # fmt: skip
    more = {"metadata": metadata} if metadata else {"network_alphas": alphas}
    again.load_lora_adapter(state, prefix="unet", **more)
    assert near(answer(again), answer(live)) == right
    found = merged(pipeline, tmp_path / "out", tmp_path / "merged")
    assert merge_is_near(found, merged(pipeline, peft, tmp_path / "expected"))


def merge_is_near(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.allclose(one[name], other[name], atol=1e-5) for name in other)


def test_names_as_stability_has_them_are_those_diffusers_reads() -> None:
    """Every module of a UNet like SDXL's, under the name that kohya's scripts give it."""
    pytest.importorskip("diffusers", reason="needs diffusers in this environment")
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    unet = live_unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    )  # fmt: skip
    modules = {
        name.removesuffix(".weight"): value
        for name, value in unet.state_dict().items()
        if name.endswith(".weight") and value.ndim > 1
    }
    inside = [name for name in modules if ".attentions." in name and "attn1.to_q" in name]
    inside += [name for name in modules if name.endswith(("conv1", "conv2", "conv_shortcut"))]
    state = {}
    for number, module in enumerate(inside):
        stability = sgm_name(module, modules, 2)
        assert stability is not None
        key = "lora_unet_" + stability.replace(".", "_")
        import torch

        state[f"{key}.lora_down.weight"] = torch.full((1, 1), float(number))
        state[f"{key}.lora_up.weight"] = torch.full((1, 1), float(number))
    found, _ = _convert_non_diffusers_lora_to_diffusers(
        _maybe_map_sgm_blocks_to_diffusers(dict(state), unet.config)
    )
    meant = {
        int(value.item()): key.replace(".processor.", ".").replace("to_q_lora", "to_q.lora")
        for key, value in found.items()
        if "down.weight" in key
    }
    for number, module in enumerate(inside):
        assert meant[number] == f"unet.{module}.lora.down.weight"


def test_the_header_of_diffusers_is_read_back_by_it(unet: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft")
    regraft.convert(peft, tmp_path / "out", to="diffusers", base=unet)
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "np") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {said["unet.r"], *said["unet.rank_pattern"].values()} == {3, 4}
    assert said["unet.alpha_pattern"]["conv_in"] == 0.3
