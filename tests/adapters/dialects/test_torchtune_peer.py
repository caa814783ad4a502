"""torchtune's dialect against torchtune: what it answers with an adapter, a merge answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import save_file

import regraft
from merging import toys
from regraft.errors import AdapterError
from regraft.translating import convert_adapter

torch = pytest.importorskip("torch")
tune = pytest.importorskip("torchtune", reason="torchtune runs in an environment of its own")

from torchtune.models import convert_weights, llama3, qwen2  # noqa: E402
from torchtune.models.qwen2 import _convert_weights as of_qwen2  # noqa: E402
from torchtune.modules.peft import get_adapter_params, get_lora_module_names  # noqa: E402

SIZES = {"vocab_size": 61, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 24,
         "max_seq_len": 32, "intermediate_dim": 40}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
LORA = {"apply_lora_to_mlp": True, "apply_lora_to_output": True, "lora_rank": 3, "lora_alpha": 5}
CONFIG = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
          "intermediate_size": 40, "num_hidden_layers": 2, "tie_word_embeddings": False,
          }  # fmt: skip
IDS = torch.tensor([[5, 9, 33, 14, 58, 21, 7, 40]])


class Llama:
    """Tiny models of torchtune's Llama 3, and its conversion."""

    config: ClassVar = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}

    @staticmethod
    def plain() -> Any:
        return llama3.llama3(**SIZES)

    @staticmethod
    def lora(**fields: Any) -> Any:
        return llama3.lora_llama3(ATTENTION, **LORA, **SIZES, **fields)

    to_hf = staticmethod(convert_weights.tune_to_hf)
    from_hf = staticmethod(convert_weights.hf_to_tune)


class Qwen2:
    """Tiny models of its Qwen 2, whose rows it leaves as they are."""

    config: ClassVar = {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}

    @staticmethod
    def plain() -> Any:
        return qwen2.qwen2(**SIZES)

    @staticmethod
    def lora(**fields: Any) -> Any:
        return qwen2.lora_qwen2(ATTENTION, **LORA, **SIZES, **fields)

    to_hf = staticmethod(of_qwen2.qwen2_tune_to_hf)
    from_hf = staticmethod(of_qwen2.qwen2_hf_to_tune)


HEADS = {"num_heads": 4, "num_kv_heads": 2, "dim": 24}


def randomize(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def base_of(family: Any, folder: Path) -> Any:
    """Write a base for transformers, and return torchtune's own weights of it."""
    model = family.plain()
    randomize(model, 1)
    folder.mkdir()
    found = family.to_hf(model.state_dict(), **HEADS)
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family.config))
    return model.state_dict()


def merged(family: Any, folder: Path) -> np.ndarray:
    tensors = {k: torch.from_numpy(v) for k, v in load_file(folder / "model.safetensors").items()}
    model = family.plain()
    model.load_state_dict(family.from_hf(tensors, **HEADS))
    return answer(model)


def answer(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.eval()(IDS).float().numpy())


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() < 1e-4 * np.abs(one).max())


@pytest.mark.parametrize(("family", "use_dora"), [(Llama, False), (Llama, True), (Qwen2, False)])
def test_a_merge_answers_as_torchtune_with_the_adapter(
    tmp_path: Path, family: Any, use_dora: bool
) -> None:
    own = base_of(family, tmp_path / "base")
    model = family.lora(use_dora=use_dora)
    randomize(model, 2)
    model.load_state_dict(own, strict=False)
    adapter = get_adapter_params(model)
    (tmp_path / "tune").mkdir()
    torch.save(adapter, tmp_path / "tune" / "adapter_model.pt")
    config = {"r": 3, "lora_alpha": 5, "peft_type": "LORA",
              "target_modules": get_lora_module_names(list(ATTENTION), True, True)}  # fmt: skip
    (tmp_path / "tune" / "adapter_config.json").write_text(json.dumps(config))
    regraft.merge(tmp_path / "base", tmp_path / "tune", tmp_path / "merged")
    expected = answer(model)
    plain = family.plain()
    plain.load_state_dict(own)
    assert not close(expected, answer(plain))
    assert close(expected, merged(family, tmp_path / "merged"))

    convert_adapter(tmp_path / "tune", tmp_path / "peft", base=tmp_path / "base")
    if family is Llama and not use_dora:  # where torchtune's own export is right
        theirs = convert_weights.tune_to_peft_adapter_weights(adapter, **HEADS)
        ours = load_file(tmp_path / "peft" / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[k], theirs[k].detach().numpy()) for k in ours)
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="torchtune", base=tmp_path / "base")
    back = torch.load(tmp_path / "back" / "adapter_model.pt", weights_only=True)
    assert back.keys() == adapter.keys()
    assert all(torch.equal(back[name], adapter[name]) for name in back)


def test_torchtune_answers_with_pefts_adapter_as_the_merged_model(tmp_path: Path) -> None:
    own = base_of(Llama, tmp_path / "base")
    shapes = {"self_attn.q_proj": (24, 24), "self_attn.k_proj": (12, 24),
              "self_attn.v_proj": (12, 24), "self_attn.o_proj": (24, 24),
              "mlp.gate_proj": (40, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40),
              }  # fmt: skip
    tensors = toys.lora("lm_head", 61, 24)
    for layer in range(2):
        for seed, (name, shape) in enumerate(shapes.items()):
            tensors |= toys.lora(f"model.layers.{layer}.{name}", *shape, seed=seed)
    targets = [name.rpartition(".")[2] for name in shapes] + ["lm_head"]
    adapter = toys.write_adapter(
        tmp_path / "peft", tensors, target_modules=targets, alpha_pattern={"q_proj": 4.5}
    )
    convert_adapter(adapter, tmp_path / "tune", to="torchtune", base=tmp_path / "base")
    config = json.loads((tmp_path / "tune" / "adapter_config.json").read_text())
    model = llama3.lora_llama3(
        ATTENTION, **{**LORA, "lora_rank": config["r"], "lora_alpha": config["lora_alpha"]}, **SIZES
    )
    model.load_state_dict(own, strict=False)
    found = torch.load(tmp_path / "tune" / "adapter_model.pt", weights_only=True)
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora" in name]
    regraft.merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert close(answer(model), merged(Llama, tmp_path / "merged"))


def test_torchtunes_dora_of_a_layer_with_a_bias_is_refused(tmp_path: Path) -> None:
    base_of(Qwen2, tmp_path / "base")
    model = Qwen2.lora(use_dora=True)
    randomize(model, 2)
    (tmp_path / "tune").mkdir()
    torch.save(get_adapter_params(model), tmp_path / "tune" / "adapter_model.pt")
    toys.write_json(tmp_path / "tune" / "adapter_config.json", {"r": 3, "lora_alpha": 5})
    with pytest.raises(AdapterError, match="scales the layer's bias") as caught:
        regraft.merge(tmp_path / "base", tmp_path / "tune", tmp_path / "merged")
    assert len(caught.value.problems) == 6  # q, k and v of two layers
