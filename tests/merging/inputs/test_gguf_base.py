"""A GGUF model as a base: the same weights and config that transformers gets from the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from regraft.demo.steps.model import _dense
from regraft.errors import FormatError, InputError, MismatchError, UnsupportedError
from regraft.formats.files.reading import FilePool
from regraft.merging.inputs.gguf import GgufBase, open_gguf_base
from regraft.names.gguf import FAMILIES, REFUSED
from regraft.numerics.arrays import Bytes
from regraft.quant.weight import Block, Decoder
from regraft.tensors import TensorSpec
from regraft.testing.codecs import check_codec
from regraft.testing.gguf_files import Array, converted, permuted, write

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "rope_theta": 5e4, "tie_word_embeddings": False},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "rope_theta": 1e6, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 16, "sliding_window": 32},
    "gemma3": {"head_dim": 16, "sliding_window": 32},
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {"tie_word_embeddings": True, "rope_theta": 10000.0},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {},
}
BASE = {
    "context_length": 128, "block_count": 2, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2,
}  # fmt: skip
EPS = {"attention.layer_norm_rms_epsilon": 1e-6}
ALSO: dict[str, dict[str, Any]] = {
    "llama": EPS | {"rope.dimension_count": 16, "rope.freq_base": 5e4},
    "qwen2": EPS | {"rope.freq_base": 1e6},
    "qwen3": EPS | {"rope.freq_base": 1e6, "attention.key_length": 32},
    "gemma2": EPS | {"attention.key_length": 16, "attention.sliding_window": 32},
    "gemma3": EPS
    | {"attention.key_length": 16, "attention.sliding_window": 32, "rope.freq_base": 1e6},
    "phi3": EPS | {"rope.dimension_count": 16, "rope.freq_base": 1e4},
    "starcoder2": {"attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 1e4},
    "stablelm": {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4},
    "nemotron": {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8},
}
MORE_RIGHT = {
    "qwen3": {"head_dim"}, "nemotron": {"norm_eps"}, "phi3": {"partial_rotary_factor"},
}  # fmt: skip
"""Keys that transformers leaves at a default although the file says them."""


def metadata(architecture: str, **changes: Any) -> dict[str, Any]:
    own = BASE | ALSO[architecture] | changes
    tokens = {f"tokenizer.ggml.{k}_token_id": i for i, k in enumerate(("padding", "bos", "eos"))}
    named = {f"{architecture}.{key}": value for key, value in own.items()}
    words = {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(96)]}
    return {"general.name": "tiny"} | named | tokens | words


def tiny(architecture: str, **changes: Any) -> Any:
    """Return a small model of transformers."""
    family = FAMILIES[architecture]
    config = AutoConfig.for_model(family.model_type, **SIZES | OWN[architecture] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save(folder: Path, architecture: str, kind: str = "F32", **changes: Any) -> Path:
    tensors = converted(tiny(architecture), architecture, kind)
    return write(folder / "m.gguf", architecture, metadata(architecture, **changes), tensors)


def values(base: GgufBase) -> dict[str, Array]:
    """Return all weights as float32, by name."""
    return dict(decoded(base))


def decoded(base: GgufBase) -> Iterator[tuple[str, Array]]:
    """Yield one weight after the other as float32."""
    with FilePool() as files:

        def read(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
            files.read_into(spec, offset, buffer.data)

        for name, weight in base.weights.items():
            assert isinstance(weight.codec, Decoder)
            rows, columns = weight.matrix
            whole = weight.codec.values(weight, Block((0, rows), (0, columns)), read)
            yield name, whole.reshape(weight.shape)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """Return what transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **_dense()
    )
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def assert_same_bits(base: GgufBase, expected: dict[str, torch.Tensor]) -> None:
    assert expected.keys() - base.weights.keys() <= {"lm_head.weight"}
    for name, tensor in decoded(base):
        wanted = expected[name].numpy()
        assert tensor.shape == wanted.shape, name
        assert np.array_equal(tensor.view(np.uint32), wanted.view(np.uint32)), name


def assert_same_config(base: GgufBase, path: Path, but: set[str]) -> None:
    folder = path.parent / "made"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(base.config))
    ours = AutoConfig.from_pretrained(folder).to_dict()
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    apart = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert apart <= {"architectures", "dtype", "_name_or_path", "_model_name_or_path"} | but
    assert ours["architectures"] == [FAMILIES[base.architecture].model_class]


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_weights_and_config_are_what_transformers_loads(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    path = save(tmp_path, architecture, kind)
    base = open_gguf_base(path)
    assert base.config_is_made
    assert base.types == tuple(sorted({"F32", kind}))
    assert_same_config(base, path, MORE_RIGHT.get(architecture, set()))
    if architecture != "qwen3":  # transformers expects a head of 128 in it
        assert_same_bits(base, loaded(path))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_converted_model_comes_back(tmp_path: Path, architecture: str) -> None:
    original = tiny(architecture).state_dict()
    base = open_gguf_base(save(tmp_path, architecture))
    found = values(base)
    assert original.keys() - found.keys() <= {"lm_head.weight"}
    for name, tensor in found.items():
        if FAMILIES[architecture].centered and name.endswith("norm.weight"):
            wanted = (original[name] + 1).numpy() - np.float32(1)
            assert np.array_equal(tensor, wanted), name
        else:
            assert np.array_equal(tensor, original[name].numpy()), name


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_dequantized_model_loads_with_the_config(tmp_path: Path, architecture: str) -> None:
    from safetensors.numpy import save_file

    base = open_gguf_base(save(tmp_path, architecture), "F32")
    out = tmp_path / "out"
    out.mkdir()
    save_file(values(base), out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(base.config))
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    ids = torch.arange(12)[None]
    original = tiny(architecture).eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-3)


def test_biases_come_back_and_the_config_says_so(tmp_path: Path) -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    tensors = converted(model, "llama", "F32")
    write(tmp_path / "m.gguf", "llama", metadata("llama"), tensors)
    base = open_gguf_base(tmp_path)
    assert base.config["attention_bias"]
    assert base.config["mlp_bias"]
    assert_same_bits(base, model.state_dict())


def test_queries_and_keys_are_decoded_by_rows_too(tmp_path: Path) -> None:
    base = open_gguf_base(save(tmp_path, "llama", "Q8_0"), "F32")
    whole = values(base)
    with FilePool() as files:

        def read(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
            files.read_into(spec, offset, buffer.data)

        for name, weight in base.weights.items():
            check_codec(weight, whole[name], read)


def test_a_config_beside_the_file_is_used(tmp_path: Path) -> None:
    path = save(tmp_path, "llama")
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "own": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = open_gguf_base(path)
    assert (base.config, base.config_is_made) == (config, False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(MismatchError, match="model_type llama or mistral; found 'qwen2'"):
        open_gguf_base(path)


def test_without_a_tokenizer_a_warning_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, "qwen2")
    assert "the tokenizer inside the GGUF file" in " ".join(open_gguf_base(path).warnings)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_gguf_base(path).warnings == ()


def test_scaled_rotations_are_warned_of(tmp_path: Path) -> None:
    tensors = converted(tiny("llama"), "llama", "F32")
    tensors["rope_freqs.weight"] = (np.ones(8, np.float32), "F32")
    write(tmp_path / "m.gguf", "llama", metadata("llama"), tensors)
    base = open_gguf_base(tmp_path)
    assert base.unused == ("rope_freqs.weight",)
    assert "scales its rotary embedding" in base.warnings[0]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "rotary" not in " ".join(open_gguf_base(tmp_path).warnings)


@pytest.mark.parametrize("architecture", [*REFUSED, "qwen2moe", "nonsense"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    write(tmp_path / "m.gguf", architecture, {}, {"a.weight": (np.ones(2, np.float32), "F32")})
    with pytest.raises(UnsupportedError, match=f"found '{architecture}'"):
        open_gguf_base(tmp_path)


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a mixture of experts"):
        open_gguf_base(save(tmp_path, "llama", expert_count=8))


def test_unknown_tensors_and_types_are_all_named(tmp_path: Path) -> None:
    tensors = converted(tiny("llama"), "llama", "F32")
    tensors["blk.0.odd.weight"] = (np.ones(2, np.float32), "F32")
    tensors["blk.0.attn_norm.weight"] = (np.ones(64, np.float64), "F64")
    tensors["blk.0.attn_norm.scale"] = (np.ones(64, np.float32), "F32")
    tensors["output.weight"] = (np.ones((2, 2, 64), np.float32), "F32")
    write(tmp_path / "m.gguf", "llama", metadata("llama"), tensors)
    with pytest.raises(UnsupportedError) as caught:
        open_gguf_base(tmp_path)
    named = " ".join(problem.where for problem in caught.value.problems)
    assert len(caught.value.problems) == 4
    for name in ("odd.weight", "attn_norm.weight", "attn_norm.scale", "output.weight"):
        assert name in named


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = converted(tiny("llama"), "llama", "F32")
    del tensors["blk.1.ffn_up.weight"]
    write(tmp_path / "m.gguf", "llama", metadata("llama"), tensors)
    with pytest.raises(FormatError, match=r"'blk.1.ffn_up.weight'.*in none"):
        open_gguf_base(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 2**31, "no more layers than tensors"),
        ("block_count", 0, "llama.block_count: a positive number"),
        ("attention.head_count", "four", "attention.head_count: a positive number; found 'four'"),
        ("attention.head_count_kv", [2, 2], "head_count_kv: a positive number"),
        ("attention.head_count", 7, "rows of 7 heads, each of an even size"),
        ("rope.freq_base", float("inf"), "rope.freq_base: a positive number; found 'inf'"),
        ("feed_forward_length", [96, 64], "feed_forward_length: a positive number"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    path = save(tmp_path, "llama", **{key: value})
    with pytest.raises(FormatError, match=message):
        open_gguf_base(path)


def test_token_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    known = metadata("llama") | {"tokenizer.ggml.bos_token_id": ["<s>"]}
    write(tmp_path / "m.gguf", "llama", known, converted(tiny("llama"), "llama", "F32"))
    config = open_gguf_base(tmp_path).config
    assert "bos_token_id" not in config
    assert config["eos_token_id"] == 2


def test_without_a_number_of_key_heads_there_are_as_many_as_heads(tmp_path: Path) -> None:
    tensors = converted(tiny("llama"), "llama", "F32")
    key = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    tensors["blk.0.attn_k.weight"] = (permuted(key, 4), "F32")
    known = metadata("llama")
    del known["llama.attention.head_count_kv"]
    write(tmp_path / "m.gguf", "llama", known, tensors)
    found = values(open_gguf_base(tmp_path))
    assert np.array_equal(found["model.layers.0.self_attn.k_proj.weight"], key)


def test_a_split_model_is_one_base(tmp_path: Path) -> None:
    whole = save(tmp_path, "llama", "Q8_0")
    expected = values(open_gguf_base(whole))
    items = list(converted(tiny("llama"), "llama", "Q8_0").items())
    folder = tmp_path / "split"
    folder.mkdir()
    for i in range(2):
        keys = {"split.no": i, "split.count": 2, "split.tensors.count": len(items)}
        own = metadata("llama") if i == 0 else {}
        write(folder / f"m-0000{i + 1}-of-00002.gguf", "llama", own | keys, dict(items[i::2]))
    base = open_gguf_base(folder)
    assert len(base.files) == 2
    found = values(base)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="no such file"):
        open_gguf_base(folder / "m-00001-of-00002.gguf")
