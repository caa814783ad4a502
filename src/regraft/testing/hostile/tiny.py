"""The tiny base and adapter, sound yet, that files are made and mutated of."""

from __future__ import annotations

from typing import Any

from regraft.tensors import nbytes_of

TensorShape = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor, in the order the file has them."""

LAYERS, HIDDEN, INNER, VOCAB, RANK = 2, 8, 12, 20, 2
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def base_tensors() -> list[TensorShape]:
    """Return the tensors of a tiny Llama with untied embeddings."""
    tensors: list[TensorShape] = [("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))]
    for layer in range(LAYERS):
        within = f"model.layers.{layer}."
        tensors += [
            (f"{within}self_attn.{n}_proj.weight", "BF16", (HIDDEN, HIDDEN)) for n in "qkvo"
        ]
        tensors += [
            (f"{within}mlp.{n}_proj.weight", "BF16", (INNER, HIDDEN)) for n in ("gate", "up")
        ]
        tensors += [(f"{within}mlp.down_proj.weight", "BF16", (HIDDEN, INNER))]
        tensors += [(f"{within}input_layernorm.weight", "BF16", (HIDDEN,))]
    tensors += [("model.norm.weight", "BF16", (HIDDEN,))]
    return [*tensors, ("lm_head.weight", "BF16", (VOCAB, HIDDEN))]


def adapter_tensors() -> list[TensorShape]:
    """Return the tensors of an adapter on it, with a head of its own and a few token rows."""
    tensors: list[TensorShape] = []
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors.append((f"{key}.lora_A.weight", "F32", (RANK, HIDDEN)))
            tensors.append((f"{key}.lora_B.weight", "F32", (HIDDEN, RANK)))
    tensors.append(("base_model.model.lm_head.weight", "BF16", (VOCAB, HIDDEN)))
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    return [*tensors, (rows, "F32", (2, HIDDEN))]


def adapter_config() -> dict[str, Any]:
    """Return the config of that adapter, with the fields that PEFT writes."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
        "auto_mapping": None, "base_model_name_or_path": "org/base", "bias": "none",
        "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 2 * RANK,
        "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": ["lm_head"], "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "r": RANK, "rank_pattern": {},
        "revision": None, "target_modules": ["q_proj", "v_proj"], "target_parameters": None,
        "task_type": "CAUSAL_LM", "trainable_token_indices": {"embed_tokens": [3, 5]},
        "use_dora": False, "use_qalora": False, "use_rslora": False,
    }  # fmt: skip


def base_config() -> dict[str, Any]:
    """Return the config of the tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
        "eos_token_id": [2, 3], "hidden_act": "silu", "hidden_size": HIDDEN,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "intermediate_size": INNER,
        "model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "vocab_size": VOCAB,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False, "dtype": "bfloat16", "transformers_version": "5.23.0",
        "text_config": {"model_type": "llama", "vocab_size": VOCAB}, "use_cache": True,
    }  # fmt: skip


def weight_index() -> dict[str, Any]:
    """Return the index of the tiny Llama in two files."""
    names = [name for name, _, _ in base_tensors()]
    size = sum(nbytes_of(dtype, shape) for _, dtype, shape in base_tensors())
    return {
        "metadata": {"total_parameters": size // 2, "total_size": size},
        "weight_map": {name: SHARDS[i % 2] for i, name in enumerate(names)},
    }
