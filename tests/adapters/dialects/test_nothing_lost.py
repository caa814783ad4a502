"""Nothing of an adapter is lost in silence: embeddings beside LoRA, one thing under two names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regraft
from regraft.adapters.dialects.shared.peft_config import short_names
from regraft.errors import AdapterError, FormatError, UnsupportedError

P = "base_model.model."
_RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


def write(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def on_embeddings(folder: Path) -> Path:
    """Write an adapter as PEFT saves it where embedding and head are targets."""
    return write(
        folder,
        {
            f"{P}model.embed_tokens.base_layer.weight": draw(16, 8),
            f"{P}model.embed_tokens.lora_embedding_A": draw(2, 16),
            f"{P}model.embed_tokens.lora_embedding_B": draw(8, 2),
            f"{P}lm_head.base_layer.weight": draw(16, 8),
            f"{P}lm_head.lora_A.weight": draw(2, 8),
            f"{P}lm_head.lora_B.weight": draw(16, 2),
        },
        target_modules=["embed_tokens", "lm_head"], lora_dropout=0.1, peft_version="0.17.0",
    )  # fmt: skip


def test_lora_on_embeddings_stays_beside_their_copies(tmp_path: Path) -> None:
    before = on_embeddings(tmp_path / "before")
    regraft.convert(before, tmp_path / "after", uniform=True)
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (before, tmp_path / "after")
    )
    assert one.keys() == other.keys()
    for name in one:
        scaled = name.endswith(("lora_B.weight", "lora_embedding_B"))
        assert np.array_equal(one[name] * (2 if scaled else 1), other[name])
    config = json.loads((tmp_path / "after/adapter_config.json").read_text())
    assert not config.get("modules_to_save")
    assert config["target_modules"] == ["embed_tokens", "lm_head"]
    assert (config["lora_dropout"], config["peft_version"]) == (0.1, "0.17.0")


def test_biases_of_adapted_modules_keep_peft_s_place(tmp_path: Path) -> None:
    name = f"{P}model.layers.0.self_attn.q_proj"
    before = write(
        tmp_path / "before",
        {f"{name}.lora_A.weight": draw(2, 8), f"{name}.lora_B.weight": draw(8, 2),
         f"{name}.base_layer.bias": draw(8)},
        target_modules=["q_proj"], bias="lora_only",
    )  # fmt: skip
    regraft.convert(before, tmp_path / "after", uniform=True)
    assert f"{name}.base_layer.bias" in load_file(tmp_path / "after/adapter_model.safetensors")
    config = json.loads((tmp_path / "after/adapter_config.json").read_text())
    assert config["bias"] == "lora_only"
    assert not config.get("modules_to_save")


@pytest.mark.parametrize("second", ["model.unembed_tokens", f"{P}model._orig_mod.unembed_tokens"])
def test_tensors_that_become_one_are_refused_by_both_names(tmp_path: Path, second: str) -> None:
    first = f"{P}model.unembed_tokens"
    tensors = {f"{name}.lora_A.weight": draw(2, 8) for name in (first, second)}
    tensors |= {f"{name}.lora_B.weight": draw(16, 2) for name in (first, second)}
    tinker = write(tmp_path / "tinker", tensors, target_modules="all-linear")
    with pytest.raises(AdapterError, match="one of the adapter") as caught:
        regraft.convert(tinker, tmp_path / "out", dialect="tinker")
    assert first in str(caught.value)
    assert f"'{second}.lora_A.weight'" in str(caught.value)


def test_two_heads_are_refused_by_both_names(tmp_path: Path) -> None:
    names = (f"{P}model.unembed_tokens", f"{P}lm_head")
    tensors = {f"{name}.lora_A.weight": draw(2, 8) for name in names}
    tensors |= {f"{name}.lora_B.weight": draw(16, 2) for name in names}
    tinker = write(tmp_path / "tinker", tensors, target_modules="all-linear")
    with pytest.raises(AdapterError, match="one of the model") as caught:
        regraft.convert(tinker, tmp_path / "out", dialect="tinker")
    assert all(name in str(caught.value) for name in names)


def test_two_names_of_kohya_for_one_module_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "text_encoder"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"]}))
    save_file({"encoder.layers.0.self_attn.q_proj.weight": draw(8, 8)}, base / "model.safetensors")
    names = [
        f"lora_te{n}_text_model_encoder_layers_0_self_attn_q_proj" for n in ("", "1")
    ]  # fmt: skip
    tensors = {f"{name}.lora_down.weight": draw(2, 8) for name in names}
    tensors |= {f"{name}.lora_up.weight": draw(8, 2) for name in names}
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(AdapterError, match="one of the model") as caught:
        regraft.convert(tmp_path / "k.safetensors", tmp_path / "out", base=base)
    assert all(name in str(caught.value) for name in names)


def test_a_config_nested_deeply_in_a_header_is_refused(tmp_path: Path) -> None:
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": draw(2, 8), f"{name}.lora_B.weight": draw(8, 2)}
    file = tmp_path / "d.safetensors"
    deep = "[" * 100_000 + "]" * 100_000
    save_file(tensors, file, metadata={"lora_adapter_metadata": deep})
    with pytest.raises(FormatError, match="lora_adapter_metadata: cannot be read as JSON"):
        regraft.convert(file, tmp_path / "out", dialect="diffusers")


@pytest.mark.parametrize("alpha", [1e-42, 1e-200])
def test_a_scale_that_leaves_nothing_of_b_is_refused(tmp_path: Path, alpha: float) -> None:
    name = f"{P}model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": draw(2, 8), f"{name}.lora_B.weight": draw(8, 2)}
    small = write(tmp_path / "a", tensors, target_modules=["q_proj"], lora_alpha=alpha)
    with pytest.raises(UnsupportedError, match="below what float32 holds"):
        regraft.convert(small, tmp_path / "out", uniform=True)


def test_both_sides_of_a_tie_stay_alike_in_the_uniform_form(tmp_path: Path) -> None:
    a, b = draw(2, 16), draw(8, 2)
    tied = write(
        tmp_path / "a",
        {f"{P}model.embed_tokens.lora_embedding_A": a,
         f"{P}model.embed_tokens.lora_embedding_B": b,
         f"{P}lm_head.lora_A.weight": np.ascontiguousarray(b.T),
         f"{P}lm_head.lora_B.weight": np.ascontiguousarray(a.T)},
        target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True,
    )  # fmt: skip
    regraft.convert(tied, tmp_path / "out", uniform=True)
    new = load_file(tmp_path / "out/adapter_model.safetensors")
    assert np.array_equal(new[f"{P}model.embed_tokens.lora_embedding_B"], 2 * b)
    assert np.array_equal(new[f"{P}lm_head.lora_A.weight"], 2 * b.T)
    assert np.array_equal(new[f"{P}lm_head.lora_B.weight"], a.T)


def test_short_names_select_the_same_modules() -> None:
    known = [f"model.layers.{n}.{m}" for n in (0, 1) for m in ("attn.q", "mlp.q", "attn.k")]
    meant = {name for name in known if name.endswith(("attn.q", "0.attn.k"))}
    assert short_names(meant, known) == ["0.attn.k", "attn.q"]


def test_the_config_of_peft_comes_back_from_another_dialect(tmp_path: Path) -> None:
    name = f"{P}model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": draw(2, 8), f"{name}.lora_B.weight": draw(8, 2)}
    before = write(tmp_path / "a", tensors, target_modules=["q_proj"], lora_dropout=0.1)
    regraft.convert(before, tmp_path / "mlx", to="mlx")
    regraft.convert(tmp_path / "mlx", tmp_path / "back")
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert (config["target_modules"], config["lora_dropout"]) == (["q_proj"], 0.1)
    assert "peft_version" not in config
