"""MLX's dialect against mlx-lm: what it answers with an adapter, the merged model answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regraft
from regraft.errors import UnsupportedError
from regraft.translating import convert_adapter

mx = pytest.importorskip("mlx.core", reason="mlx-lm runs in an environment of its own")
tuner = pytest.importorskip("mlx_lm.tuner.utils")
peft = pytest.importorskip("peft")

from regraft.testing import zoo  # noqa: E402
from regraft.testing.adapters import make_adapter  # noqa: E402

IDS = [[5, 9, 33, 14, 58, 21, 7, 40, 3, 11]]
FORM = {"rank": 3, "scale": 1.7, "dropout": 0.0}


def load(folder: Path) -> Any:
    """Return a model in mlx-lm, with the rotary base where published configs have it."""
    from mlx_lm.utils import load_model

    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    text = config.get("text_config") or {}
    text.setdefault("rope_theta", 10000.0)
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    config.setdefault("num_experts", config.get("num_local_experts"))
    config.setdefault("n_ctx", config.get("n_positions"))
    config.setdefault("rotary_emb_base", 10000)
    config.setdefault("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    path.write_text(json.dumps(config))
    return load_model(folder)[0]


def make_base(name: str, folder: Path) -> Path:
    """Write a base as mlx-lm reads it, in float32: the only dtype of its experts on a CPU."""
    if name not in BUILT_HERE:
        return zoo.make_base(name, folder, "float32")
    import transformers

    config = transformers.AutoConfig.for_model(name, vocab_size=61, **BUILT_HERE[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    zoo.randomize(model)
    model.save_pretrained(folder)
    if name == "gpt2":  # whose names begin with nothing, as they were published
        file = folder / "model.safetensors"
        tensors = {n.removeprefix("transformer."): v for n, v in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


BUILT_HERE: dict[str, dict[str, int]] = {
    "mixtral": {
        "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 3,
    },
}  # fmt: skip
"""Models whose sizes mlx-lm takes for granted: heads as large as the width says, an inner width of
four times the outer one."""


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def train(
    base: Path, folder: Path, keys: list[str], kind: str = "lora", model: Any = None
) -> np.ndarray:
    """Write an adapter as mlx-lm saves one, with random values; return what it answers with it."""
    from mlx.utils import tree_flatten, tree_unflatten

    model = load(base) if model is None else model
    model.freeze()
    parameters = {**FORM, "keys": keys}
    tuner.linear_to_lora_layers(model, -1, parameters, use_dora=kind == "dora")
    mx.random.seed(3)
    found = tree_flatten(model.trainable_parameters())
    assert found, "no module has such a name"
    noisy = [
        (name, v * 1.2 if name.endswith(".m") else v + 0.2 * mx.random.normal(v.shape, v.dtype))
        for name, v in found
    ]
    model.update(tree_unflatten(noisy))
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return logits(model)


ATTENTION = [f"self_attn.{n}_proj" for n in "qkvo"]
GATED = [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
STACKS = [f"mlp.switch_mlp.{n}_proj" for n in ("gate", "up", "down")]
CASES = {
    "llama": ("llama", [*ATTENTION, *GATED, "lm_head"], "lora"),
    "embedding of an untied llama": ("llama", ["model.embed_tokens", "lm_head"], "lora"),
    "embedding alone, untied": ("llama", ["model.embed_tokens"], "lora"),
    "tied embedding": ("qwen2_tied", [*ATTENTION, "model.embed_tokens"], "lora"),
    "DoRA": ("llama", [*ATTENTION, *GATED], "dora"),
    "experts": ("qwen3_moe", [*ATTENTION, *STACKS, "mlp.gate"], "lora"),
    "experts of Mixtral": (
        "mixtral", [key.replace("mlp", "block_sparse_moe", 1) for key in STACKS], "lora"),
    "names of GPT-2": ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "lora"),
    "tied embedding of GPT-2": ("gpt2", ["model.wte", "attn.c_attn"], "lora"),
    "names of GPT-NeoX": ("gpt_neox", ["attention.query_key_value", "mlp.dense_h_to_4h"], "lora"),
}  # fmt: skip


def close(one: np.ndarray, other: np.ndarray) -> bool:
    assert np.abs(one).max() > 0.1
    return bool(np.abs(one - other).max() < 2e-4 * np.abs(one).max())


@pytest.mark.parametrize("case", CASES)
def test_a_merge_answers_as_mlx_lm_with_the_adapter(tmp_path: Path, case: str) -> None:
    name, keys, kind = CASES[case]
    base = make_base(name, tmp_path / "base")
    before = logits(load(base))
    expected = train(base, tmp_path / "mlx", keys, kind)
    assert not close(before, expected)
    regraft.merge(base, tmp_path / "mlx", tmp_path / "merged")
    assert close(expected, logits(load(tmp_path / "merged")))
    # And through PEFT's files and back into mlx-lm.
    convert_adapter(tmp_path / "mlx", tmp_path / "peft", to="peft", base=base)
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="mlx", base=base)
    assert np.array_equal(expected, logits(tuner.load_adapters(load(base), str(tmp_path / "back"))))


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=5, **fields)


MADE_BY_PEFT = {
    "plain": ("llama", lora(target_modules=["q_proj", "down_proj", "lm_head"])),
    "patterns": ("llama", lora(target_modules=["q_proj", "down_proj"], use_rslora=True,
                               rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 9})),
    "DoRA": ("llama", lora(target_modules=["q_proj", "up_proj"], use_dora=True)),
    "both sides of a tie": ("qwen2_tied", lora(target_modules=["q_proj", "embed_tokens"],
                                               ensure_weight_tying=True)),
    "embedding": ("llama", lora(target_modules=["q_proj", "embed_tokens"])),
    "stacks of experts": ("qwen3_moe", lora(target_modules=["q_proj"], target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "stacks of Mixtral": ("mixtral", lora(target_modules=["q_proj"], target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "GPT-2": ("gpt2", lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "positions of GPT-2": ("gpt2", lora(target_modules=["wpe"])),
    "embedding and head of GPT-NeoX": ("gpt_neox", lora(target_modules=["embed_in", "lm_head"])),
    "router of Mixtral": ("mixtral", lora(target_parameters=["mlp.gate.weight"])),
    "head of a model that sees": ("llava", lora(target_modules=["lm_head"])),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_mlx_lm_answers_with_pefts_adapter_as_the_merged_model(tmp_path: Path, case: str) -> None:
    name, config = MADE_BY_PEFT[case]
    base = make_base(name, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", config)
    regraft.merge(base, adapter, tmp_path / "merged")
    convert_adapter(adapter, tmp_path / "mlx", to="mlx", base=base)
    expected = logits(load(tmp_path / "merged"))
    assert not close(expected, logits(load(base)))
    assert close(expected, logits(tuner.load_adapters(load(base), str(tmp_path / "mlx"))))


def test_one_side_of_a_tie_is_refused(tmp_path: Path) -> None:
    base = make_base("qwen2_tied", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", lora(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(UnsupportedError, match=r"embed_tokens.*ensure_weight_tying"):
        convert_adapter(adapter, tmp_path / "mlx", to="mlx", base=base)


def test_an_adapter_of_a_quantized_model_is_one_of_the_plain_model(tmp_path: Path) -> None:
    """Its factors are as wide as the plain weights are, which a merge takes for its base."""
    import mlx.nn as nn
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    zoo.randomize(model)
    model.save_pretrained(tmp_path / "base")
    quantized = load(tmp_path / "base")
    nn.quantize(quantized, group_size=64, bits=4)
    expected = train(tmp_path / "base", tmp_path / "mlx", ATTENTION, model=quantized)
    for name, module in quantized.named_modules():
        if name.endswith(tuple(ATTENTION)):
            assert isinstance(module.linear, nn.QuantizedLinear)
    regraft.merge(tmp_path / "base", tmp_path / "mlx", tmp_path / "merged")
    merged = logits(load(tmp_path / "merged"))
    assert np.abs(merged - expected).max() < 0.5 * np.abs(expected).max()  # of four bits a base
