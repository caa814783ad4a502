"""mistral-finetune's rows of q and k: attention comes out the same in either order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.errors import UnsupportedError
from regraft.translating import convert_adapter

torch = pytest.importorskip("torch")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")

WIDTH, SIZE = 16, 6
HEADS = {"wq": 2, "wk": 1}
CONFIG = {**toys.CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"],
          "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": SIZE}  # fmt: skip
POSITIONS = 5


def turned_as_published(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q or k, turned by position as mistral-inference does: neighbours are one number."""
    pairs = torch.view_as_complex(rows.reshape(POSITIONS, heads, SIZE // 2, 2))
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, SIZE, 2) / SIZE)
    angles = torch.outer(torch.arange(POSITIONS), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(pairs * turns).flatten(-2)


def turned_by_transformers(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q or k, turned as transformers does."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=2, head_dim=SIZE)
    found = rows.reshape(1, POSITIONS, heads, SIZE).transpose(1, 2)
    cosine, sine = llama.LlamaRotaryEmbedding(config)(found, torch.arange(POSITIONS)[None])
    return llama.apply_rotary_pos_emb(found, found, cosine, sine)[0][0].transpose(0, 1)


def scores(turned: object, weights: dict[str, np.ndarray]) -> torch.Tensor:
    """Return how much each position attends to each, by head of q."""
    inputs = torch.from_numpy(toys.draw(POSITIONS, WIDTH, seed=8))
    q, k = (
        turned(inputs @ torch.from_numpy(weights[name]).T, heads)  # type: ignore[operator]
        for name, heads in HEADS.items()
    )
    return torch.einsum("ihd,jd->hij", q, k[:, 0])


def test_attention_of_a_merge_is_that_of_the_own_weights(tmp_path: Path) -> None:
    own = {name: toys.draw(heads * SIZE, WIDTH) for name, heads in HEADS.items()}
    tensors = toys.llama_tensors(np.float32)
    tensors = {name: value for name, value in tensors.items() if ".layers.1." not in name}
    for name, heads in HEADS.items():
        halves = own[name].reshape(heads, SIZE // 2, 2, WIDTH).swapaxes(1, 2)
        key = f"model.layers.0.self_attn.{name[1]}_proj.weight"
        tensors[key] = np.ascontiguousarray(halves.reshape(-1, WIDTH))
    base = toys.write_base(tmp_path / "base", tensors, CONFIG)
    factors = {}
    for name in HEADS:
        a, b = toys.draw(3, WIDTH, seed=4), toys.draw(len(own[name]), 3, seed=5)
        prefix = f"layers.0.attention.{name}.lora_"
        factors |= {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
    folder = tmp_path / "mistral"
    toys.write_json(folder / "params.json", {
        "n_heads": 2, "n_kv_heads": 1, "head_dim": SIZE,
        "lora": {"enable": True, "rank": 3, "scaling": 1.5},
    })  # fmt: skip
    toys.save_file(factors, folder / "lora.safetensors")
    before = scores(turned_as_published, own)
    for name in HEADS:
        prefix = f"layers.0.attention.{name}.lora_"
        own[name] = own[name] + 1.5 * factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
    expected = scores(turned_as_published, own)
    assert not torch.allclose(before, expected, rtol=0.1)
    regraft.merge(base, folder, tmp_path / "merged")
    after = toys.load(tmp_path / "merged")
    found = {name: after[f"model.layers.0.self_attn.{name[1]}_proj.weight"] for name in HEADS}
    assert torch.allclose(scores(turned_by_transformers, found), expected, rtol=1e-3, atol=1e-3)

    convert_adapter(folder, tmp_path / "peft")  # by the heads that params.json says
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="mistral", base=base)
    back = toys.load(tmp_path / "back")
    assert back.keys() == factors.keys()
    assert all(np.array_equal(back[name], factors[name]) for name in back)
    assert toys.read_json(tmp_path / "back" / "params.json")["lora"]["scaling"] == 1.5


def test_an_output_layer_is_refused_as_nobody_would_load_it(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base")
    adapter = toys.write_adapter(
        tmp_path / "peft", toys.lora("lm_head", toys.VOCAB, toys.HIDDEN), target_modules=["lm_head"]
    )
    with pytest.raises(UnsupportedError, match="lm_head"):
        convert_adapter(adapter, tmp_path / "out", to="mistral", base=base)
