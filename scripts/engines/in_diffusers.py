"""Runs in diffusers' environment: makes small pipelines and adapters, and answers with them.

``python in_diffusers.py make WANTED.json FOLDER`` writes the pipelines, below ``pipelines``, and
each adapter as diffusers saves it and as PEFT does, with what the live PEFT model answers.
``python in_diffusers.py JOBS.json ANSWERS.json`` answers with adapters that a pipeline loads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Job = dict[str, Any]


# -- models ----------------------------------------------------------------------------------------


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    usual = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**usual | more)


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                       num_attention_heads=2, max_position_embeddings=16, projection_dim=16)
    )  # fmt: skip


def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip


@dataclass(frozen=True)
class Pipeline:
    """A pipeline: its class in diffusers, and what makes each of its parts."""

    name: str
    parts: Mapping[str, Callable[[], Any]]


PIPELINES: Mapping[str, Pipeline] = {
    "sd": Pipeline("StableDiffusionPipeline", {"unet": _unet, "text_encoder": _text_encoder}),
    "sdxl": Pipeline("StableDiffusionXLPipeline", {
        "unet": lambda: _unet(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        ),
    }),
    "flux": Pipeline("FluxPipeline", {"transformer": _flux}),
    "sd3": Pipeline("StableDiffusion3Pipeline", {"transformer": _sd3}),
}  # fmt: skip


def make_pipeline(name: str, folder: Path) -> None:
    """Write the parts of a pipeline, each in the folder that it has there; weights are random."""
    import torch

    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[name].name}))
    for part, make in PIPELINES[name].parts.items():
        torch.manual_seed(7)
        model = make()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(folder / part)


def load_part(folder: Path) -> Any:
    """Return a part of a pipeline, from its folder."""
    import diffusers
    import transformers

    config = json.loads((folder / "config.json").read_text())
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_pretrained(folder).eval()
    return transformers.CLIPTextModel.from_pretrained(folder).eval()


def answer_of(model: Any) -> list[float]:
    """Return what a part answers, as one list of numbers."""
    import torch

    drawn = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=drawn)

    kind = type(model).__name__
    with torch.no_grad():
        if kind == "CLIPTextModel":
            found = model(input_ids=torch.tensor([[5, 17, 3, 44, 9, 60]])).last_hidden_state
        elif kind == "UNet2DConditionModel":
            found = model(draw(1, 4, 8, 8), 5, draw(1, 3, 16)).sample
        elif kind == "FluxTransformer2DModel":
            found = model(
                hidden_states=draw(1, 6, 4), encoder_hidden_states=draw(1, 3, 32),
                pooled_projections=draw(1, 32), timestep=torch.tensor([0.5]),
                img_ids=torch.arange(18).reshape(6, 3) % 3, txt_ids=torch.zeros(3, 3),
            ).sample  # fmt: skip
        else:
            found = model(
                hidden_states=draw(1, 4, 8, 8), encoder_hidden_states=draw(1, 3, 32),
                pooled_projections=draw(1, 64), timestep=torch.tensor([5]),
            ).sample  # fmt: skip
    numbers: list[float] = found.double().flatten().tolist()
    return numbers


# -- adapters --------------------------------------------------------------------------------------


def make_adapter(wanted: Job, folder: Path) -> list[float]:
    """Write an adapter of a part as diffusers and as PEFT save it; return the live answer."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    model = load_part(folder / "pipelines" / wanted["pipeline"] / wanted["part"])
    config = LoraConfig(**wanted["config"])
    model.add_adapter(config)
    drawn = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=drawn)
            moved = parameter.data * (1 + noise / 4)  # of DoRA's magnitudes, which are norms
            parameter.data = moved if "magnitude" in name else noise / 4
    own, peft = folder / wanted["folder"] / "own", folder / wanted["folder"] / "peft"
    state = get_peft_model_state_dict(model)
    save_lora(wanted, state, model.peft_config["default"].to_dict(), own)
    config.save_pretrained(str(peft))
    named = {f"base_model.model.{name}": t.contiguous() for name, t in state.items()}
    save_file(named, peft / "adapter_model.safetensors", {"format": "pt"})
    return answer_of(model)


def save_lora(wanted: Job, state: Any, config: Any, own: Path) -> None:
    """Write diffusers' own file, with PEFT's config in its header if that is wanted."""
    import diffusers

    part = wanted["part"]
    more = {f"{part}_lora_adapter_metadata": config} if wanted["header"] else {}
    pipeline = getattr(diffusers, PIPELINES[wanted["pipeline"]].name)
    pipeline.save_lora_weights(own, **{f"{part}_lora_layers": state}, **more)


def make(wanted: list[Job], folder: Path) -> None:
    """Write all pipelines and adapters, and what is answered with and without each."""
    for name in sorted({each["pipeline"] for each in wanted}):
        make_pipeline(name, folder / "pipelines" / name)
    told = []
    for each in wanted:
        bare = answer_of(load_part(folder / "pipelines" / each["pipeline"] / each["part"]))
        told.append({"trained": make_adapter(each, folder), "untrained": bare})
    (folder / "made.json").write_text(json.dumps(told))


# -- answers ---------------------------------------------------------------------------------------


def pipeline_of(job: Job) -> Any:
    """Return a pipeline with the parts that it has here, and none of the others."""
    import diffusers

    folder = Path(job["base"])
    kind = PIPELINES[job["pipeline"]]
    parts = {part: load_part(folder / part) for part in kind.parts}
    wanted = {
        "StableDiffusionPipeline": ("vae", "text_encoder", "tokenizer", "unet", "scheduler",
                                    "safety_checker", "feature_extractor"),
        "StableDiffusionXLPipeline": ("vae", "text_encoder", "text_encoder_2", "tokenizer",
                                      "tokenizer_2", "unet", "scheduler"),
        "FluxPipeline": ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2",
                         "tokenizer_2", "transformer"),
        "StableDiffusion3Pipeline": ("transformer", "scheduler", "vae", "text_encoder", "tokenizer",
                                     "text_encoder_2", "tokenizer_2", "text_encoder_3",
                                     "tokenizer_3"),
    }[kind.name]  # fmt: skip
    more = {"requires_safety_checker": False} if "safety_checker" in wanted else {}
    given = dict.fromkeys(wanted) | parts | more
    if kind.name.startswith("StableDiffusion") and "unet" in wanted:
        given["scheduler"] = diffusers.DDIMScheduler()
    return getattr(diffusers, kind.name)(**given)


def answer(job: Job) -> dict[str, Any]:
    """Return what a part answers; or what diffusers said when it refused the adapter."""
    if not job.get("adapter"):
        return {"answer": answer_of(load_part(Path(job["base"])))}
    pipeline = pipeline_of(job)
    path = Path(job["adapter"])
    try:
        if path.is_dir():
            pipeline.load_lora_weights(path)
        else:
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
    except Exception as error:  # diffusers has none of its own for this
        return {"refused": f"{type(error).__name__}: {error}"[:300]}
    return {"answer": answer_of(getattr(pipeline, job["part"]))}


def main() -> None:
    """Make what is wanted, or answer all jobs."""
    if sys.argv[1] == "make":
        make(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
        return
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))


if __name__ == "__main__":
    main()
