"""llama.cpp's dialect: rows, names and the one alpha; and what llama.cpp itself answers with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import regraft
from adapters.dialects import llama_cpp
from engine_python import LLAMA_CPP, python_of
from merging import toys
from regraft.errors import AdapterError, MismatchError, UnsupportedError, UsageError

gguf = pytest.importorskip("gguf")

HIDDEN, INTER, HEADS, GROUPS, LAYERS = 32, 48, 4, 2, 2
VOCAB = 272
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTER),
}  # fmt: skip
PROMPTS = [[1, 5, 9, 77, 30], [1, 260, 261], [1, 100, 101, 102, 103, 104, 105]]
MODULES = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in SIZES]


def llama(*, tied: bool = False) -> Any:
    """Return a small llama with groups of keys, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=128,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 3  # answers that differ from token to token
    return model


def write_gguf(folder: Path, path: Path) -> Path:
    """Write a saved model as llama.cpp's converter does, with a tokenizer of bytes."""
    from transformers import AutoModelForCausalLM

    from regraft.testing.gguf_files import converted, write

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    sizes = {
        "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": INTER,
        "block_count": LAYERS, "attention.head_count": HEADS, "attention.head_count_kv": GROUPS,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
        "rope.dimension_count": HIDDEN // HEADS, "vocab_size": VOCAB,
    }  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{number}" for number in range(VOCAB - len(tokens))]
    words = {
        "model": "llama", "tokens": tokens, "scores": [0.0] * VOCAB,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)],
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    metadata = {f"llama.{key}": value for key, value in sizes.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    return write(path, "llama", metadata, converted(model, "llama", "F32"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "base"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "base"
    llama(tied=True).save_pretrained(folder)
    return folder


TARGETS = [*(name.rpartition(".")[2] for name in SIZES), "embed_tokens", "lm_head"]


def write_adapter(folder: Path, tensors: Any, **config: Any) -> Path:
    return toys.write_adapter(folder, tensors, target_modules=TARGETS, **config)


def factors(dtype: Any = np.float32, ranks: dict[str, int] | None = None) -> dict[str, Any]:
    """Return factors for every linear layer."""
    found: dict[str, Any] = {}
    for number, module in enumerate(MODULES):
        name = module.partition(f"layers.{number // 7}.")[2]
        rank = next((r for end, r in (ranks or {}).items() if name.endswith(end)), toys.RANK)
        found |= toys.lora(module, *SIZES[name], rank, 10 + 2 * number)
    return {key: value.astype(dtype) for key, value in found.items()}


def with_ends(**more: Any) -> dict[str, Any]:
    head = toys.lora("lm_head", VOCAB, HIDDEN, seed=80)
    return {**factors(), **toys.embedding("model.embed_tokens", VOCAB, HIDDEN), **head, **more}


CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "plain": (factors, {}, False),
    "embedding and head": (with_ends, {}, False),
    "rsLoRA": (factors, {"use_rslora": True}, True),
    "an alpha of its own": (factors, {"alpha_pattern": {"q_proj": 2, "down_proj": 11}}, True),
    "a rank of its own": (
        lambda: factors(ranks={"v_proj": 5}), {"rank_pattern": {"v_proj": 5}}, False,
    ),
    "both": (
        lambda: factors(ranks={"v_proj": 5}),
        {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 7}}, True,
    ),
    "bfloat16": (lambda: factors(toys.BF16), {}, False),
    "bfloat16, widened": (lambda: factors(toys.BF16), {"use_rslora": True}, True),
    "float16": (lambda: factors(np.float16), {}, False),
}  # fmt: skip
"""Tensors and config by name, and whether they take the uniform form."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bool]:
    tensors, config, uniform = CASES[request.param]
    return write_adapter(tmp_path / "peft", tensors(), **config), uniform


def test_llama_cpp_answers_with_the_adapter_as_with_the_merge(
    base: Path, case: tuple[Path, bool], tmp_path: Path
) -> None:
    python_of(LLAMA_CPP)
    peft, uniform = case
    done = regraft.convert(peft, tmp_path / "out", to="gguf", base=base)
    assert done.uniform == uniform
    regraft.merge(base, peft, tmp_path / "merged")
    served = write_gguf(base, tmp_path / "base.gguf")
    merged = write_gguf(tmp_path / "merged", tmp_path / "merged.gguf")
    plain = llama_cpp.answers(tmp_path, served, PROMPTS, VOCAB)
    there = llama_cpp.answers(tmp_path, merged, PROMPTS, VOCAB)
    got = llama_cpp.answers(tmp_path, served, PROMPTS, VOCAB, tmp_path / "out" / "adapter.gguf")
    span = np.ptp(there)
    assert np.abs(plain - there).max() > 0.05 * span
    factor = next(iter(load_file(tmp_path / "peft" / "adapter_model.safetensors").values()))
    # llama.cpp rounds activations to the dtype of 16-bit factors before it multiplies.
    near = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}[factor.dtype.name]
    assert np.abs(got - there).max() < near * span


@pytest.mark.parametrize("case_name", CASES)
def test_there_and_back_keeps_every_value(base: Path, tmp_path: Path, case_name: str) -> None:
    tensors, config, uniform = CASES[case_name]
    peft = write_adapter(tmp_path / "peft", tensors(), **config)
    source = peft
    if uniform:
        source = tmp_path / "uniform"
        regraft.convert(peft, source, uniform=True)
    regraft.convert(source, tmp_path / "gguf", to="gguf", base=base)
    regraft.convert(tmp_path / "gguf", tmp_path / "back", base=base)
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    regraft.merge(base, source, tmp_path / "one")
    regraft.merge(base, tmp_path / "gguf" / "adapter.gguf", tmp_path / "other")
    one, other = toys.load(tmp_path / "one"), toys.load(tmp_path / "other")
    assert all(np.array_equal(one[name], other[name]) for name in one)


# -- what llama.cpp does, on which all this rests --------------------------------------------------


def by_hand(path: Path, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    """Write a GGUF adapter of a llama without regraft."""
    from regraft.testing.gguf_files import write

    stored = {name: (np.ascontiguousarray(array), "F32") for name, array in tensors.items()}
    kind = {"general.type": "adapter", "adapter.type": "lora"}
    return write(path, "llama", kind | metadata, stored)


def one_module(name: str = "blk.0.attn_output") -> dict[str, np.ndarray]:
    a, b = toys.lora("any", HIDDEN, HIDDEN).values()
    return {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}


def test_an_adapter_of_two_scales_as_llama_cpp_converts_it_answers_wrong(
    base: Path, tmp_path: Path
) -> None:
    """The fault that the uniform form is for: the config's alpha, over the rank of each tensor."""
    python_of(LLAMA_CPP)
    peft = write_adapter(tmp_path / "peft", factors(), use_rslora=True)
    plain = write_adapter(tmp_path / "as-if-plain", factors())  # what its converter makes of it
    for adapter in (peft, plain):
        regraft.convert(adapter, tmp_path / f"{adapter.name}-gguf", to="gguf", base=base)
    served = write_gguf(base, tmp_path / "base.gguf")
    regraft.merge(base, peft, tmp_path / "merged")
    merged = write_gguf(tmp_path / "merged", tmp_path / "merged.gguf")
    there = llama_cpp.answers(tmp_path, merged, PROMPTS, VOCAB)
    right, wrong = (
        llama_cpp.answers(tmp_path, served, PROMPTS, VOCAB, tmp_path / name / "adapter.gguf")
        for name in ("peft-gguf", "as-if-plain-gguf")
    )
    assert np.abs(wrong - there).max() > 0.1 * np.ptp(there)
    assert np.abs(right - there).max() < 1e-4 * np.ptp(there)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_an_alpha_the_scale_is_one(base: Path, tmp_path: Path, alpha: float | None) -> None:
    said = {} if alpha is None else {"adapter.lora.alpha": alpha}
    file = by_hand(tmp_path / "lora.gguf", one_module(), **said)
    facts = regraft.inspect(file).adapter
    assert facts is not None
    assert (facts.scale, facts.dialect) == (1.0, "gguf")
    as_rank = {"adapter.lora.alpha": float(toys.RANK)}
    other = by_hand(tmp_path / "other.gguf", one_module(), **as_rank)
    python_of(LLAMA_CPP)
    served = write_gguf(base, tmp_path / "base.gguf")
    one, same = (llama_cpp.answers(tmp_path, served, PROMPTS, VOCAB, f) for f in (file, other))
    assert np.array_equal(one, same)


def test_llama_cpp_stops_at_an_adapter_of_a_tied_embedding(tied: Path, tmp_path: Path) -> None:
    peft = write_adapter(tmp_path / "peft", toys.embedding("model.embed_tokens", VOCAB, HIDDEN))
    with pytest.raises(UnsupportedError, match="one tensor for the embedding and the head"):
        regraft.convert(peft, tmp_path / "out", to="gguf", base=tied)
    python_of(LLAMA_CPP)
    a, b = toys.embedding("model.embed_tokens", VOCAB, HIDDEN).values()
    tensors = {"token_embd.weight.lora_a": a.T, "token_embd.weight.lora_b": b}
    file = by_hand(tmp_path / "lora.gguf", tensors, **{"adapter.lora.alpha": 6.0})
    served = write_gguf(tied, tmp_path / "base.gguf")
    with pytest.raises(AssertionError):
        llama_cpp.answers(tmp_path, served, PROMPTS, VOCAB, file)


def test_the_tensors_are_those_of_llama_cpps_converter(base: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    sources = os.environ.get("REGRAFT_LLAMA_CPP_SOURCE")
    if not sources:
        pytest.skip("needs llama.cpp's sources: REGRAFT_LLAMA_CPP_SOURCE names their folder")
    peft = write_adapter(tmp_path / "peft", with_ends())
    theirs = tmp_path / "theirs.gguf"
    script = [sys.executable, f"{sources}/convert_lora_to_gguf.py", "--base", str(base)]
    run = subprocess.run(
        [*script, "--outfile", str(theirs), str(peft)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    regraft.convert(peft, tmp_path / "out", to="gguf", base=base)
    expected, found = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        for file in (theirs, tmp_path / "out" / "adapter.gguf")
    )
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


# -- reading ---------------------------------------------------------------------------------------


def test_blocks_are_read_as_the_values_they_stand_for(base: Path, tmp_path: Path) -> None:
    from regraft.testing.gguf_files import write

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(32, HIDDEN)), rng.normal(size=(HIDDEN, 32))
    blocks = {
        f"blk.0.attn_v.weight.lora_{n}": (gguf.quants.quantize(x.astype(np.float32), kind), "Q8_0")
        for n, x in (("a", a), ("b", b[: HIDDEN // 2]))
        for kind in [gguf.GGMLQuantizationType.Q8_0]
    }
    said = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 32.0}
    file = write(tmp_path / "lora.gguf", "llama", said, blocks)
    regraft.convert(file, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, (stored, _) in blocks.items():
        key = f"{toys.PREFIX}model.layers.0.self_attn.v_proj.lora_{name[-1].upper()}.weight"
        expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(found[key], expected)


def test_norms_that_mergekit_extracts_are_read_as_replaced(base: Path, tmp_path: Path) -> None:
    norm = toys.draw(HIDDEN)
    file = by_hand(tmp_path / "lora.gguf", {**one_module(), "blk.1.attn_norm.weight": norm})
    regraft.merge(base, file, tmp_path / "out")
    merged = toys.load(tmp_path / "out")
    assert np.array_equal(merged["model.layers.1.input_layernorm.weight"], norm)


def test_the_base_is_asked_for_where_rows_are_rearranged(base: Path, tmp_path: Path) -> None:
    turned = by_hand(tmp_path / "q.gguf", one_module("blk.0.attn_q"))
    plain = by_hand(tmp_path / "o.gguf", one_module())
    with pytest.raises(UsageError, match="heads the model has"):
        regraft.convert(turned, tmp_path / "out")
    assert regraft.inspect(turned).kind == "adapter"
    regraft.convert(plain, tmp_path / "out")
    regraft.convert(turned, tmp_path / "with-base", base=base)
    with pytest.raises(UsageError, match="cannot be written without the model"):
        regraft.convert(tmp_path / "out", tmp_path / "again", to="gguf")


def test_a_live_model_tells_the_order_of_rows(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    peft = write_adapter(tmp_path / "peft", factors())
    regraft.convert(peft, tmp_path / "gguf", to="gguf", base=base)
    ids, answers = torch.tensor([[1, 5, 7, 9]]), []
    for adapter in (peft, tmp_path / "gguf" / "adapter.gguf"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        regraft.attach(model, adapter)
        answers.append(model(ids).logits)
    assert torch.equal(*answers)


def test_verbs_without_a_base_of_their_own_find_one(base: Path, tmp_path: Path) -> None:
    peft = write_adapter(tmp_path / "peft", factors())
    regraft.convert(peft, tmp_path / "gguf", to="gguf", base=base)
    adapter = tmp_path / "gguf"
    other = write_adapter(tmp_path / "other", factors(ranks={"q_proj": 4}), r=4)
    del other
    regraft.merge(base, adapter, tmp_path / "first", keep_adapter=False)
    regraft.merge(base, peft, tmp_path / "expected")
    one, two = toys.load(tmp_path / "first"), toys.load(tmp_path / "expected")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert regraft.verify(tmp_path / "first").tensors
    assert regraft.verify(tmp_path / "first", base=base, adapters=adapter).ok
    regraft.swap(tmp_path / "first", adapter, tmp_path / "again", merged_adapters=adapter)
    regraft.unmerge(tmp_path / "first", tmp_path / "back", adapters=adapter)
    again, back = toys.load(tmp_path / "again"), toys.load(tmp_path / "back")
    assert all(np.array_equal(again[name], two[name]) for name in two)
    assert all(np.array_equal(back[n], tensor) for n, tensor in toys.load(base).items())
    regraft.shrink(adapter, tmp_path / "small", base=base, dtype="float32")


def test_diff_compares_deltas_where_it_takes_no_base(base: Path, tmp_path: Path) -> None:
    tensors = {key: value for key, value in factors().items() if "o_proj" in key}
    peft = write_adapter(tmp_path / "peft", tensors)
    regraft.convert(peft, tmp_path / "gguf", to="gguf", base=base)
    report = regraft.diff(peft, tmp_path / "gguf" / "adapter.gguf")
    assert (report.same_deltas, report.deltas) == (LAYERS, ())
    whole = write_adapter(tmp_path / "whole", factors())
    regraft.convert(whole, tmp_path / "turned", to="gguf", base=base)
    with pytest.raises(UsageError, match="regraft convert ADAPTER -o OUT --base BASE"):
        regraft.diff(whole, tmp_path / "turned")


def test_a_gguf_base_will_do(base: Path, tmp_path: Path) -> None:
    model = write_gguf(base, tmp_path / "base.gguf")
    peft = write_adapter(tmp_path / "peft", factors())
    for name, model_of in (("one", base), ("two", model)):
        regraft.convert(peft, tmp_path / name, to="gguf", base=model_of)
    one, two = ((tmp_path / name / "adapter.gguf").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"blk.0.attn_output.weight.lora_a": np.ones((3, HIDDEN), np.float32)}, "lacks a factor"),
        ({"blk.0.ffn_gate_exps.weight.lora_a": np.ones((2, 3, 8), np.float32)}, "not a tensor"),
        ({"blk.0.attn_output.weight.lora_a": np.ones((3, 4), np.float32),
          "blk.0.attn_output.weight.lora_b": np.ones((4, 2), np.float32)}, "do not fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_damaged_adapter_is_refused(
    base: Path, tmp_path: Path, tensors: dict[str, np.ndarray], error: str
) -> None:
    file = by_hand(tmp_path / "lora.gguf", tensors)
    with pytest.raises(AdapterError, match=error):
        regraft.convert(file, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_heads_or_of_another_kind_is_refused(base: Path, tmp_path: Path) -> None:
    b = np.ones((HIDDEN // 4 + 1, toys.RANK), np.float32)
    tensors = {**one_module("blk.0.attn_q"), "blk.0.attn_q.weight.lora_b": b}
    file = by_hand(tmp_path / "lora.gguf", tensors)
    with pytest.raises(MismatchError, match="heads"):
        regraft.convert(file, tmp_path / "out", base=base)
    gpt = toys.write_base(tmp_path / "gpt", config={**toys.CONFIG, "model_type": "qwen2"})
    with pytest.raises(MismatchError, match="another kind of model"):
        regraft.convert(by_hand(tmp_path / "o.gguf", one_module()), tmp_path / "out", base=gpt)


# -- what cannot be said ---------------------------------------------------------------------------


def test_what_llama_cpp_cannot_do_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    saved = {f"{toys.PREFIX}model.norm.weight": np.ones(HIDDEN, np.float32)}
    adapters = {
        "magnitudes": write_adapter(tmp_path / "dora", toys.dora(q, HIDDEN, HIDDEN), use_dora=True),
        "replaces no tensor": write_adapter(
            tmp_path / "saved", {**factors(), **saved}, modules_to_save=["norm"]
        ),
        "no tensor of its own": write_adapter(tmp_path / "odd", toys.lora("odd.q_proj", 32, 32)),
        "a bias of B": write_adapter(
            tmp_path / "bias",
            {**toys.lora(q, 32, 32), f"{toys.PREFIX}{q}.lora_B.bias": np.ones(32, np.float32)},
            lora_bias=True,
        ),
    }
    for said, adapter in adapters.items():
        with pytest.raises(UnsupportedError, match=said) as caught:
            regraft.convert(adapter, tmp_path / "out", to="gguf", base=base)
        assert "regraft merge" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_gguf_adapter_may_be_replaced(base: Path, tmp_path: Path) -> None:
    peft = write_adapter(tmp_path / "peft", factors())
    for _ in range(2):
        regraft.convert(peft, tmp_path / "out", to="gguf", base=base, overwrite=True)
    assert regraft.inspect(tmp_path / "out").kind == "adapter"


def test_what_travels_with_an_adapter_comes_back(base: Path, tmp_path: Path) -> None:
    peft = write_adapter(tmp_path / "peft", factors(), base_model_name_or_path="org/base")
    tensors = load_file(peft / "adapter_model.safetensors")
    from safetensors.numpy import save_file

    said = {"format": "pt", "regraft_base": "some fingerprint"}
    save_file(tensors, peft / "adapter_model.safetensors", said)
    regraft.convert(peft, tmp_path / "gguf", to="gguf", base=base)
    regraft.convert(tmp_path / "gguf", tmp_path / "back", base=base)
    from safetensors import safe_open

    with safe_open(tmp_path / "back" / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == said
    config = toys.read_json(tmp_path / "back" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "org/base"
