"""Small models and adapters with all that engines are known to leave out or scale otherwise.

Everything is made here, by PEFT and by code: nothing is downloaded. Each fixture has the answer of
PEFT's live model, as log-probabilities after a few tokens, to hold an engine's against.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.seeing import seeing

VOCAB, HIDDEN, HEADS, LAYERS, INTER = 320, 64, 2, 2, 96
TOKENS = (5, 17, 3, 201, 44, 90, 8, 131)
"""What every model is asked: the next token after these."""

Change = Callable[[str, Any], tuple[str, Any] | None]


@dataclass(frozen=True)
class Fixture:
    """An adapter of some feature, and the model it is for.

    Attributes:
        name: what it shows.
        base: which base it is for, a key of :data:`BASES`.
        config: fields of PEFT's ``LoraConfig``.
        rename: changes the names of its tensors, as another program would have written them.
        options: options that an engine's server is started with, by the engine's name.
        engines: the engines that are shown it; all that run the base where there are none.
        form: ``adapter``; or ``uniform`` or ``merged``: what regraft makes of it is served.
    """

    name: str
    base: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    rename: Change | None = None
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    engines: tuple[str, ...] = ()
    form: str = "adapter"
    grown: int = 0
    """Rows that training added to the embeddings; vocabularies are resized by them."""


PATTERNS = {"alpha_pattern": {"q_proj": 3, "down_proj": 20}, "rank_pattern": {"v_proj": 8}}
LANGUAGE = {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*(vision|visual).*"}


def _as_text(name: str, tensor: Any) -> tuple[str, Any]:
    """Call a tensor of the language model as its text model, trained alone, would."""
    return name.replace(".language_model.layers", ".layers"), tensor


FIXTURES: tuple[Fixture, ...] = (
    Fixture("as PEFT saves it"),
    Fixture("attention alone", config={"target_modules": ["q_proj", "k_proj", "v_proj"]}),
    Fixture("rsLoRA", config={"use_rslora": True}),
    Fixture("rsLoRA, uniform", config={"use_rslora": True}, form="uniform"),
    Fixture("rsLoRA, merged", config={"use_rslora": True}, form="merged"),
    Fixture("alpha pattern", config={"alpha_pattern": {"q_proj": 3, "down_proj": 20}}),
    Fixture("rank pattern", config={"rank_pattern": {"v_proj": 8}}),
    Fixture("both patterns", config=PATTERNS),
    Fixture("both patterns, uniform", config=PATTERNS, form="uniform"),
    Fixture("both patterns, merged", config=PATTERNS, form="merged"),
    Fixture("alpha 0", config={"lora_alpha": 0}),
    Fixture("DoRA", config={"use_dora": True}),
    Fixture("DoRA, merged", config={"use_dora": True}, form="merged"),
    Fixture("a norm that is saved", config={"modules_to_save": ["input_layernorm"]}),
    Fixture("a head that is saved", config={"modules_to_save": ["lm_head"]}),
    Fixture("the head", config={"target_modules": ["q_proj", "v_proj", "lm_head"]}),
    Fixture("the embedding", config={"target_modules": ["q_proj", "v_proj", "embed_tokens"]}),
    Fixture("the head of a tied model", "llama_tied",
            config={"target_modules": ["q_proj", "v_proj", "lm_head"]}),
    Fixture("token rows", config={"trainable_token_indices": {"embed_tokens": [5, 44]}}),
    Fixture("rank 20", config={"r": 20}, engines=("vllm",)),
    Fixture("rank 20, allowed", config={"r": 20}, engines=("vllm",),
            options={"vllm": {"max_lora_rank": "32"}}),
    Fixture("rank 20 in the config alone", engines=("vllm",), config={
        "r": 20, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"]}),
    Fixture("modules that the server leaves out", config={"target_modules": ["down_proj"]},
            engines=("vllm",), options={"vllm": {"lora_target_modules": "qkv_proj"}}),
    Fixture("names of another class", engines=("vllm",),
            rename=lambda name, tensor: (name.replace("model.layers", "text.layers"), tensor)),
    Fixture("a square transposed weight", "gpt2", config={"target_modules": ["attn.c_proj"]}),
    Fixture("a transposed weight", "gpt2", config={"target_modules": ["c_attn"]}),
    Fixture("latent attention's kv_b_proj", "deepseek", engines=("vllm",),
            config={"target_modules": ["kv_b_proj"]}),
    Fixture("latent attention's kv_b_proj, not taken apart", "deepseek", engines=("vllm",),
            config={"target_modules": ["kv_b_proj"]},
            options={"vllm": {"VLLM_MLA_DISABLE": "1"}}),
    Fixture("latent attention", "deepseek", engines=("vllm",), config={
        "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}),
    Fixture("LoRA biases", config={"lora_bias": True}, engines=("vllm",)),
    Fixture("biases", "qwen2", config={"bias": "lora_only"}, engines=("vllm",)),
    Fixture("PiSSA", config={"init_lora_weights": "pissa"}, engines=("vllm",)),
    Fixture("an embedding that the class does not adapt", "qwen2", engines=("vllm",),
            config={"target_modules": ["q_proj", "embed_tokens"]}),
    Fixture("a grown vocabulary", grown=6, engines=("vllm",)),
    Fixture("a grown vocabulary, its embedding adapted", grown=6, engines=("vllm",),
            config={"target_modules": ["q_proj", "embed_tokens"]}),
    Fixture("a grown vocabulary, its head adapted", grown=6, engines=("vllm",),
            config={"target_modules": ["q_proj", "lm_head"]}),
    Fixture("stacks of experts", "qwen3_moe", engines=("vllm",), config={
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    Fixture("one stack of experts", "qwen3_moe", engines=("vllm",), config={
        "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    Fixture("the language model of Gemma 3", "gemma3", engines=("vllm",), config=LANGUAGE),
    *(Fixture(f"{shown}, by the names of its text model", base, engines=("vllm",), config=LANGUAGE,
              rename=_as_text)
      for shown, base in (("Gemma 3", "gemma3"), ("Gemma 4", "gemma4"), ("Mistral 3", "mistral3"),
                          ("Qwen3-VL", "qwen3_vl"))),
    Fixture("keys that are values too", "gemma4", engines=("vllm",),
            config=LANGUAGE | {"target_modules": ["k_proj"]}),
    Fixture("keys that are not", "gemma4", engines=("vllm",),
            config=LANGUAGE | {"target_modules": ["k_proj"], "layers_to_transform": [0]}),
)  # fmt: skip


# -- bases -----------------------------------------------------------------------------------------

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTER,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def _llama(tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTER, head_dim=32,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
            max_position_embeddings=128, tie_word_embeddings=tied,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=128,
                   bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def _deepseek() -> Any:
    """Return a model with latent attention, of the sizes that vLLM has a kernel for on CPUs."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=512, q_lora_rank=24,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=LAYERS,
            max_position_embeddings=128, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _qwen2() -> Any:
    """Return a model whose projections have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_SIZES))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, head_dim=32, moe_intermediate_size=32, num_experts=4,
                       num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[])
    )  # fmt: skip


BASES: Mapping[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama_tied": lambda: _llama(tied=True),
    "gpt2": _gpt2,
    "deepseek": _deepseek,
    "qwen2": _qwen2,
    "qwen3_moe": _qwen3_moe,
    **seeing(_SIZES),
}
"""Makers of the small models, by name; their weights are random, and large enough to tell."""


def make_base(name: str, folder: Path) -> Path:
    """Write a base in float32 and return its folder."""
    import torch

    torch.manual_seed(7)
    model = BASES[name]()
    for parameter in model.parameters():
        parameter.data += 0.08 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


# -- adapters --------------------------------------------------------------------------------------


def make(fixture: Fixture, base: Path, folder: Path) -> Path:
    """Write a fixture's adapter, and what is served of it; return the folder that is served."""
    from peft import LoraConfig

    import regraft
    from regraft.testing.adapters import make_adapter, rewrite_adapter
    from regraft.translating import convert_adapter

    usual = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    config = LoraConfig(**(usual | dict(fixture.config)))
    made = make_adapter(base, folder / "adapter", config, prepare=_growing(fixture.grown))
    if fixture.rename is not None:
        made = rewrite_adapter(made, folder / "renamed", fixture.rename)
    if fixture.form == "uniform":
        convert_adapter(made, folder / "uniform", to="peft", uniform=True)
        return folder / "uniform"
    if fixture.form == "merged":
        regraft.merge(base, made, folder / "merged")
        return folder / "merged"
    return made


def _growing(rows: int) -> Callable[[Any], None] | None:
    """Return what adds rows to a model's embeddings, as for new tokens; None for none."""
    if not rows:
        return None

    def grow(model: Any) -> None:
        import torch

        torch.manual_seed(3)
        model.resize_token_embeddings(VOCAB + rows, mean_resizing=False)

    return grow


def answers(base: Path, adapter: Path | None, grown: int = 0) -> list[float]:
    """Return the log-probabilities of the next token by PEFT's live model, or by the base."""
    import torch

    from regraft.testing.adapters import live_model
    from regraft.testing.zoo import load_base

    model = (
        load_base(base) if adapter is None else live_model(base, adapter, prepare=_growing(grown))
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0, -1].double()
    found: list[float] = torch.log_softmax(logits, -1).tolist()
    return found


def write_json(path: Path, value: Any) -> Path:
    """Write JSON and return its path."""
    path.write_text(json.dumps(value))
    return path
