"""torchtune's, LitGPT's and mistral-finetune's dialects: there and back, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import regraft
from merging import toys
from regraft.errors import InputError, MissingExtraError, UnsupportedError, UsageError
from regraft.translating import convert_adapter

torch = pytest.importorskip("torch")

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
SHAPES = {
    "self_attn.q_proj": (12, 16), "self_attn.k_proj": (6, 16), "self_attn.v_proj": (6, 16),
    "self_attn.o_proj": (16, 12), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}  # fmt: skip
WRITTEN = {
    "torchtune": {"adapter_config.json", "adapter_model.pt"},
    "litgpt": {"hyperparameters.yaml", "lit_model.pth.lora"},
    "mistral": {"params.json", "lora.safetensors"},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = toys.llama_tensors()
    for layer in range(toys.LAYERS):
        for name, shape in SHAPES.items():
            key = f"model.layers.{layer}.{name}.weight"
            tensors[key] = toys.draw(*shape, seed=layer, dtype=toys.BF16)
    return toys.write_base(tmp_path / "base", tensors, {**toys.CONFIG, **HEADS})


def tensors_of(names: list[str], head: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer in range(toys.LAYERS):
        for number, name in enumerate(names):
            found |= toys.lora(f"model.layers.{layer}.{name}", *SHAPES[name], seed=9 * number)
    return found | (toys.lora("lm_head", toys.VOCAB, toys.HIDDEN) if head else {})


def peft(folder: Path, names: list[str] | None = None, head: bool = True, **config: Any) -> Path:
    names = list(SHAPES) if names is None else names
    targets = [name.rpartition(".")[2] for name in names] + (["lm_head"] if head else [])
    return toys.write_adapter(folder, tensors_of(names, head), target_modules=targets, **config)


def same(one: Path, other: Path) -> bool:
    before, after = toys.load(one), toys.load(other)
    return before.keys() == after.keys() and all(
        np.array_equal(before[name], after[name]) for name in before
    )


@pytest.mark.parametrize("to", WRITTEN)
def test_there_and_back_keeps_every_byte_and_a_merge_is_the_same(
    base: Path, tmp_path: Path, to: str
) -> None:
    adapter = peft(tmp_path / "peft", head=to != "mistral")
    convert_adapter(adapter, tmp_path / "there", to=to, base=base)
    assert {p.name for p in (tmp_path / "there").iterdir()} == WRITTEN[to]
    convert_adapter(tmp_path / "there", tmp_path / "back", base=base)
    assert same(adapter, tmp_path / "back")
    regraft.merge(base, adapter, tmp_path / "one")
    regraft.merge(base, tmp_path / "there", tmp_path / "other")
    assert same(tmp_path / "one", tmp_path / "other")
    assert regraft.verify(tmp_path / "other", base=base, adapters=tmp_path / "there").ok


@pytest.mark.parametrize("to", WRITTEN)
def test_what_has_no_name_there_is_refused_by_name(base: Path, tmp_path: Path, to: str) -> None:
    tensors = {**tensors_of(["self_attn.q_proj"], head=False),
               **toys.embedding(toys.EMBED, toys.VOCAB, toys.HIDDEN)}  # fmt: skip
    adapter = toys.write_adapter(
        tmp_path / "peft", tensors, target_modules=["q_proj", "embed_tokens"]
    )
    with pytest.raises(UnsupportedError, match=r"embed_tokens"):
        convert_adapter(adapter, tmp_path / "out", to=to, base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["litgpt", "mistral"])
def test_dora_is_refused_by_name_where_there_is_none(base: Path, tmp_path: Path, to: str) -> None:
    tensors = toys.dora("model.layers.0.self_attn.v_proj", 6, 16)
    adapter = toys.write_adapter(tmp_path / "peft", tensors, use_dora=True)
    with pytest.raises(UnsupportedError, match=r"DoRA.*|v_proj"):
        convert_adapter(adapter, tmp_path / "out", to=to, base=base)


def test_torchtunes_magnitudes_lie_as_its_rows_do(base: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {}
    for layer in range(toys.LAYERS):
        for name in ("q", "k", "v"):
            tensors |= toys.dora(f"model.layers.{layer}.self_attn.{name}_proj",
                                 *SHAPES[f"self_attn.{name}_proj"])  # fmt: skip
    adapter = toys.write_adapter(
        tmp_path / "peft", tensors, target_modules=["q_proj", "k_proj", "v_proj"], use_dora=True
    )
    convert_adapter(adapter, tmp_path / "there", to="torchtune", base=base)
    found = torch.load(tmp_path / "there" / "adapter_model.pt", weights_only=True)
    m = tensors[f"{toys.PREFIX}{toys.Q0}.lora_magnitude_vector"]
    turned = m.reshape(2, 2, 3).transpose(0, 2, 1).ravel()  # heads, halves, pairs
    assert np.array_equal(found["layers.0.attn.q_proj.magnitude"].numpy(), turned)
    convert_adapter(tmp_path / "there", tmp_path / "back", base=base)
    assert same(adapter, tmp_path / "back")


@pytest.mark.parametrize("to", ["torchtune", "mistral", "litgpt"])
def test_the_base_is_asked_for(tmp_path: Path, to: str) -> None:
    with pytest.raises(UsageError, match="base is needed"):
        convert_adapter(peft(tmp_path / "peft"), tmp_path / "out", to=to)


def test_torchtune_needs_the_base_to_be_read_too(base: Path, tmp_path: Path) -> None:
    convert_adapter(peft(tmp_path / "peft"), tmp_path / "there", to="torchtune", base=base)
    with pytest.raises(UsageError, match="base is needed"):
        convert_adapter(tmp_path / "there", tmp_path / "out")


def test_a_part_of_q_k_and_v_that_some_layers_lack_is_zero(base: Path, tmp_path: Path) -> None:
    tensors = {
        **toys.lora("model.layers.0.self_attn.q_proj", 12, 16),
        **toys.lora("model.layers.1.self_attn.v_proj", 6, 16),
    }
    adapter = toys.write_adapter(tmp_path / "peft", tensors)
    convert_adapter(adapter, tmp_path / "there", to="litgpt", base=base)
    found = torch.load(tmp_path / "there" / "lit_model.pth.lora", weights_only=True)["model"]
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert shapes == {f"transformer.h.{n}.attn.qkv.lora_{f}": s for n in range(2)
                      for f, s in (("A", (6, 16)), ("B", (18, 3)))}  # fmt: skip
    regraft.merge(base, adapter, tmp_path / "one")
    regraft.merge(base, tmp_path / "there", tmp_path / "other")
    assert same(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("parts", ["qv", "k", "qkv"])
def test_litgpts_old_name_of_q_k_and_v(base: Path, tmp_path: Path, parts: str) -> None:
    """Its rows were interleaved up to 0.4; which only shows where all three are trained."""
    adapter = peft(tmp_path / "peft", [f"self_attn.{part}_proj" for part in parts], head=False)
    convert_adapter(adapter, tmp_path / "there", to="litgpt", base=base)
    path = tmp_path / "there" / "lit_model.pth.lora"
    found = torch.load(path, weights_only=True)["model"]
    torch.save({"model": {n.replace(".qkv.", ".attn."): t for n, t in found.items()}}, path)
    if parts == "qkv":
        with pytest.raises(InputError, match=r"before LitGPT 0\.5"):
            convert_adapter(tmp_path / "there", tmp_path / "back", base=base)
        return
    convert_adapter(tmp_path / "there", tmp_path / "back", base=base)
    assert same(adapter, tmp_path / "back")


def test_litgpt_lacks_no_layer(base: Path, tmp_path: Path) -> None:
    tensors = toys.lora("model.layers.1.self_attn.o_proj", 16, 12)
    adapter = toys.write_adapter(tmp_path / "peft", tensors, target_modules=["o_proj"])
    with pytest.raises(UnsupportedError, match=r"transformer\.h\.0\.attn\.proj"):
        convert_adapter(adapter, tmp_path / "out", to="litgpt", base=base)


def test_litgpts_own_config_says_the_heads(base: Path, tmp_path: Path) -> None:
    adapter = peft(tmp_path / "peft")
    convert_adapter(adapter, tmp_path / "there", to="litgpt", base=base)
    with pytest.raises(UsageError, match=r"model_config\.yaml"):
        convert_adapter(tmp_path / "there", tmp_path / "back")
    said = {"name": "tiny", "mlp_class_name": "LLaMAMLP", "n_head": 2, "n_query_groups": 1,
            "head_size": 6, "n_embd": 16}  # fmt: skip
    (tmp_path / "there" / "model_config.yaml").write_text(yaml.safe_dump(said))
    convert_adapter(tmp_path / "there", tmp_path / "back")
    assert same(adapter, tmp_path / "back")


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_rows_lie_as_torchtune_has_them_for_the_model(
    base: Path, tmp_path: Path, name: str
) -> None:
    toys.write_json(base / "config.json", {**toys.CONFIG, **HEADS, "model_type": name,
                                           "architectures": []})  # fmt: skip
    adapter = peft(tmp_path / "peft", ["self_attn.q_proj"], head=False)
    if name == "phi3":
        with pytest.raises(UnsupportedError, match="phi3"):
            convert_adapter(adapter, tmp_path / "there", to="torchtune", base=base)
        return
    convert_adapter(adapter, tmp_path / "there", to="torchtune", base=base)
    found = torch.load(tmp_path / "there" / "adapter_model.pt", weights_only=True)
    key = f"{toys.PREFIX}{toys.Q0}.lora_B.weight"
    assert np.array_equal(found["layers.0.attn.q_proj.lora_b.weight"].numpy(),
                          toys.load(adapter)[key])  # fmt: skip


def test_a_recipes_config_says_the_scale_where_no_other_does(base: Path, tmp_path: Path) -> None:
    adapter = peft(tmp_path / "peft")
    epoch = tmp_path / "run" / "epoch_0"
    convert_adapter(adapter, epoch, to="torchtune", base=base)
    (epoch / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="its config is missing"):
        convert_adapter(epoch, tmp_path / "back", base=base)
    recipe = {"model": {"lora_rank": toys.RANK, "lora_alpha": toys.ALPHA}}
    (tmp_path / "run" / "torchtune_config.yaml").write_text(yaml.safe_dump(recipe))
    convert_adapter(epoch, tmp_path / "back", base=base)
    assert same(adapter, tmp_path / "back")


def test_without_torch_a_file_of_its_is_not_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.libraries.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="torch"):
        convert_adapter(peft(tmp_path / "peft"), tmp_path / "out", to="torchtune", base=base)
    assert not (tmp_path / "out").exists()


def _pt(folder: Path, change: Any) -> None:
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".lora", ".safetensors"))
    if path.suffix == ".safetensors":
        found = load_file(path)
        change(found)
        save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, path)
        return
    held = torch.load(path, weights_only=True)
    found = held.get("model", held)
    change(found)
    torch.save(held, path)


def _config(folder: Path, **fields: Any) -> None:
    path = next(p for p in folder.iterdir() if p.suffix in (".json", ".yaml"))
    said = yaml.safe_load(path.read_text()) | fields
    path.write_text(json.dumps(said))


def first(names: Any, ending: str) -> str:
    return next(name for name in names if ending in name)


def _drop(found: dict[str, Any]) -> None:
    del found[first(found, "lora_")]


def _cut(found: dict[str, Any]) -> None:
    name = next(n for n in found if re.search(r"(q_proj|qkv|wq)\.lora_[bB]", n))
    found[name] = found[name][:-1].clone() if hasattr(found[name], "clone") else found[name][:-1]


def _other(found: dict[str, Any]) -> None:
    found["norm.weight"] = next(iter(found.values()))


BAD: dict[str, tuple[Any, str]] = {
    "a factor that is missing": (lambda f: _pt(f, _drop), "lacks a factor"),
    "rows that are missing": (lambda f: _pt(f, _cut), "rows|do not fit"),
    "a tensor of something else": (lambda f: _pt(f, _other), "name that this dialect"),
    "a scale of NaN": (lambda f: _config(
        f, lora_alpha=float("nan"), lora={"scaling": float("nan")}), "alpha|scale"),
    "no rank or scale": (lambda f: _config(f, r=None, lora_r="3", lora=7), "rank|lora_r|scale"),
    "a config cut short": (lambda f: next(
        p for p in f.iterdir() if p.suffix in (".json", ".yaml")).write_text('{"a": '),
        "cannot be read"),
    "weights cut short": (lambda f: next(
        p for p in f.iterdir() if p.suffix in (".pt", ".lora", ".safetensors")
    ).write_bytes(b"PK\x03\x04 and no more"), "zip|header|safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("to", WRITTEN)
@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_refused_and_nothing_is_written(
    base: Path, tmp_path: Path, to: str, what: str
) -> None:
    folder = tmp_path / "there"
    convert_adapter(peft(tmp_path / "peft", head=False), folder, to=to, base=base)
    spoil, said = BAD[what]
    spoil(folder)
    for ask in (
        lambda: regraft.merge(base, folder, tmp_path / "out"),
        lambda: convert_adapter(folder, tmp_path / "out", base=base),
    ):
        with pytest.raises(InputError, match=said):
            ask()
        assert not (tmp_path / "out").exists()
