"""LitGPT's dialect against LitGPT: a merge is what its own merge is, and what it answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from safetensors.torch import save_file

import regraft
from merging import toys
from regraft.translating import convert_adapter

torch = pytest.importorskip("torch")
lora = pytest.importorskip("litgpt.lora", reason="LitGPT runs in an environment of its own")

from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama  # noqa: E402

MODEL = {
    "name": "tiny", "block_size": 32, "vocab_size": 61, "padded_vocab_size": 61, "n_layer": 2,
    "n_head": 4, "n_query_groups": 2, "n_embd": 24, "head_size": 6, "intermediate_size": 40,
    "rotary_percentage": 1.0, "parallel_residual": False, "bias": False,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
}  # fmt: skip
BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24, "head_dim": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 61,
    "intermediate_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {"mlp_class_name": "LLaMAMoE", "n_expert": 3, "n_expert_per_token": 2}
TRAINED = {
    "q and v": {"lora_query": True, "lora_value": True},
    "k alone": {"lora_key": True},
    "all": {"lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": True,
            "lora_mlp": True, "lora_head": True},
}  # fmt: skip
IDS = torch.tensor([[5, 9, 33, 14, 58, 21, 7, 40]])


def model_of(model: dict[str, Any], **trained: Any) -> Any:
    config = lora.Config(**model, lora_r=3, lora_alpha=5, lora_dropout=0.0, **trained)
    found = lora.GPT(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in found.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return found.eval()


def as_hf(model: Any) -> dict[str, Any]:
    """Return LitGPT's weights as its own script writes them for transformers."""
    own = {
        name.replace("linear.", ""): tensor
        for name, tensor in model.state_dict().items() if "lora_" not in name
    }  # fmt: skip
    found: dict[str, Any] = {}
    copy_weights_llama(model.config, found, own)
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def save(model: Any, folder: Path, trained: dict[str, bool]) -> None:
    """Write an adapter as litgpt finetune_lora does."""
    folder.mkdir()
    factors = {name: t for name, t in model.state_dict().items() if "lora_" in name}
    torch.save({"model": factors}, folder / "lit_model.pth.lora")
    said = {f"lora_{n}": False for n in ("query", "key", "value", "projection", "mlp", "head")}
    said |= trained | {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "checkpoint_dir": "x"}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(said))
    config = {name: value for name, value in asdict(model.config).items() if name[:5] != "lora_"}
    (folder / "model_config.yaml").write_text(yaml.dump(config))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("which", TRAINED)
def test_a_merge_is_litgpts_own(tmp_path: Path, which: str, kind: str) -> None:
    model = model_of({**MODEL, **(MIXTRAL if kind == "mixtral" else {})}, **TRAINED[which])
    base = tmp_path / "base"
    base.mkdir()
    save_file(as_hf(model), base / "model.safetensors")
    more = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 3}  # fmt: skip
    (base / "config.json").write_text(json.dumps(BASE | (more if kind == "mixtral" else {})))
    save(model, tmp_path / "lit", TRAINED[which])
    with torch.no_grad():
        answered = model(IDS)
    lora.merge_lora_weights(model)
    with torch.no_grad():
        assert torch.allclose(answered, model(IDS), atol=1e-4)
    expected = {name: tensor.numpy() for name, tensor in as_hf(model).items()}
    regraft.merge(base, tmp_path / "lit", tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), toys.load(tmp_path / "merged")
    assert after.keys() == expected.keys()
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {n for n in expected if not np.array_equal(expected[n], before[n])}
    assert changed
    assert all(np.allclose(after[name], expected[name], atol=1e-5) for name in after)

    convert_adapter(tmp_path / "lit", tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="litgpt", base=base)
    theirs = torch.load(tmp_path / "lit" / "lit_model.pth.lora", weights_only=True)["model"]
    back = torch.load(tmp_path / "back" / "lit_model.pth.lora", weights_only=True)["model"]
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    said = yaml.safe_load((tmp_path / "back" / "hyperparameters.yaml").read_text())
    flags = {n: said[n] for n in TRAINED[which]}
    assert flags == TRAINED[which]
    fresh = lora.GPT(lora.Config(**asdict_without_lora(model), **settings(said)))
    base_weights = {n: t for n, t in model_of(
        {**MODEL, **(MIXTRAL if kind == "mixtral" else {})}, **TRAINED[which]
    ).state_dict().items() if "lora_" not in n}  # fmt: skip
    fresh.load_state_dict({**base_weights, **back})
    with torch.no_grad():
        assert torch.allclose(fresh.eval()(IDS), answered, atol=1e-4)


def asdict_without_lora(model: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(model.config).items() if name[:5] != "lora_"}


def settings(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name.startswith("lora_")}
