"""The names, shapes and files of Kimi K2, as moonshotai/Kimi-K2-Instruct is published.

139,644 tensors in 61 files, one for each layer; 1,026,470,731,056 values (scales counted too), most
of them E4M3 with a scale for each block of 128 by 128. The classes are those of DeepSeek-V3, and so
are the names. ``bf16`` is the same model dequantized: the layout of the copies in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from regraft.tensors import DTYPES, nbytes_of

Shape = tuple[int, ...]

BLOCK = 128
"""Rows and columns that share a scale."""

ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FORMATS = ("fp8", "bf16")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint: name, dtype as safetensors has it, and shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    @property
    def is_merged(self) -> bool:
        """Whether the adapter changes it: a weight of an attention layer."""
        module, _, kind = self.name.rpartition(".")
        return kind == "weight" and module.endswith(ATTENTION)


@dataclass(frozen=True)
class Kimi:
    """The sizes of the model; ``format`` is one of :data:`FORMATS`."""

    format: str
    layers: int = 61
    hidden: int = 7168
    experts: int = 384
    expert_width: int = 2048
    dense_layers: int = 1
    dense_width: int = 18432
    vocabulary: int = 163840
    heads: int = 64
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128

    def attention(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of multi-head latent attention: name -> (out, in)."""
        return {
            "q_a_proj": (self.q_rank, self.hidden),
            "q_b_proj": (self.heads * (self.nope + self.rope), self.q_rank),
            "kv_a_proj_with_mqa": (self.kv_rank + self.rope, self.hidden),
            "kv_b_proj": (self.heads * (self.nope + self.value), self.kv_rank),
            "o_proj": (self.hidden, self.heads * self.value),
        }

    def files(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each file, in the order that the safetensors library gives them."""
        names = [
            f"model-{number + 1}-of-{self.layers}.safetensors" for number in range(self.layers)
        ]
        files = {name: list(self._layer(number)) for number, name in enumerate(names)}
        table = (self.vocabulary, self.hidden)
        files[names[0]].append(Tensor("model.embed_tokens.weight", "BF16", table))
        files[names[-1]].append(Tensor("model.norm.weight", "BF16", (self.hidden,)))
        files[names[-1]].append(Tensor("lm_head.weight", "BF16", table))
        return {name: sorted(tensors, key=_order) for name, tensors in files.items()}

    def _layer(self, number: int) -> Iterator[Tensor]:
        prefix = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(f"{prefix}.{norm}.weight", "BF16", (self.hidden,))
        yield Tensor(f"{prefix}.self_attn.q_a_layernorm.weight", "BF16", (self.q_rank,))
        yield Tensor(f"{prefix}.self_attn.kv_a_layernorm.weight", "BF16", (self.kv_rank,))
        yield Tensor(f"{prefix}.self_attn.rotary_emb.inv_freq", "BF16", (56,))
        for name, shape in self.attention().items():
            yield from self._linear(f"{prefix}.self_attn.{name}", shape)
        if number < self.dense_layers:
            yield from self._mlp(f"{prefix}.mlp", self.dense_width)
            return
        yield Tensor(f"{prefix}.mlp.gate.weight", "BF16", (self.experts, self.hidden))
        yield Tensor(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (self.experts,))
        yield from self._mlp(f"{prefix}.mlp.shared_experts", self.expert_width)
        for expert in range(self.experts):
            yield from self._mlp(f"{prefix}.mlp.experts.{expert}", self.expert_width)

    def _mlp(self, prefix: str, width: int) -> Iterator[Tensor]:
        yield from self._linear(f"{prefix}.gate_proj", (width, self.hidden))
        yield from self._linear(f"{prefix}.up_proj", (width, self.hidden))
        yield from self._linear(f"{prefix}.down_proj", (self.hidden, width))

    def _linear(self, module: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        dtype = {"fp8": "F8_E4M3", "bf16": "BF16"}[self.format]
        yield Tensor(f"{module}.weight", dtype, shape)
        if self.format == "fp8":
            scales = tuple(-(-size // BLOCK) for size in shape)
            yield Tensor(f"{module}.weight_scale_inv", "F32", scales)

    def adapter(self, rank: int) -> list[Tensor]:
        """Return the tensors of a LoRA adapter on all attention layers: A (r, in), B (out, r)."""
        found = []
        for layer in range(self.layers):
            for name, (rows, columns) in self.attention().items():
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                found.append(Tensor(f"{prefix}.lora_A.weight", "BF16", (rank, columns)))
                found.append(Tensor(f"{prefix}.lora_B.weight", "BF16", (rows, rank)))
        return sorted(found, key=_order)

    def config(self) -> dict[str, Any]:
        """Return what of the published ``config.json`` says how the model is built."""
        config: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "kimi_k2",
            "attention_bias": False,
            "bos_token_id": 163584,
            "eos_token_id": 163585,
            "first_k_dense_replace": self.dense_layers,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "kv_lora_rank": self.kv_rank,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": self.expert_width,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 8,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": self.q_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "rms_norm_eps": 1e-06,
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.827,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "v_head_dim": self.value,
            "vocab_size": self.vocabulary,
        }
        if self.format == "fp8":
            config["quantization_config"] = {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
            }  # fmt: skip
        return config


def _order(tensor: Tensor) -> tuple[int, str]:
    """Return where the safetensors library puts a tensor: wide dtypes first, then by name."""
    return -DTYPES[tensor.dtype].bits, tensor.name
