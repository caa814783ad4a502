"""Bases with plain weights, and adapters for them, that between them need every kind of work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from digests.making import (
    BF16,
    DTYPES,
    PREFIX,
    Array,
    Tensors,
    dora,
    draw,
    embedding,
    experts,
    lora,
    write_adapter,
    write_base,
)

WIDE = 16_500
"""More columns than one unit of the undo has."""

VOCAB, LAYERS = 45, 2


@dataclass(frozen=True)
class Sizes:
    """The sizes of a llama's linear layers: ``hidden`` and, inside the MLP, ``inner``."""

    hidden: int
    inner: int


ODD = Sizes(71, 137)
"""Blocks of 64 elements and of 128 by 128 end in the middle."""

EVEN = Sizes(96, 160)
"""As formats need them that pack rows and columns into words."""


WHOLE = Sizes(128, 256)
"""As fp8 needs them when it is made."""


def llama_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """Return the config of a llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner, "vocab_size": VOCAB, "num_hidden_layers": LAYERS,
        "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    } | more  # fmt: skip


GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 20, "n_layer": 1,
    "n_head": 2, "vocab_size": 31, "n_positions": 9, "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 3,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 24,
    "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def odd_tensors(dtype: Any) -> Tensors:
    """Return a base of no architecture, with every kind of weight in it."""
    shapes = {
        "a.linear.weight": (37, 53), "a.linear.bias": (37,), "b.wide.weight": (3, WIDE),
        "c.dora.weight": (29, 700), "d.table.weight": (301, 24), "e.dora_table.weight": (60, 700),
        "f.experts": (5, 14, 33), "g.tokens.weight": (50, 31), "h.conv.weight": (9, 4, 3, 5),
        "i.copied": (2000,), "j.saved.weight": (8, 11), "k.factored.weight": (24, 30),
        "l.long.weight": (900, 17),
    }  # fmt: skip
    made = {n: draw(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}
    return made | {"m.counts": np.arange(7), "n.flags": np.arange(9, dtype=np.uint8)}


def special(dtype: Any) -> Array:
    """Return a matrix (41, 67) with zeros of both signs, subnormals, NaN, infinities and powers."""
    width = np.dtype(dtype).itemsize
    bits: Any = np.uint16 if width == 2 else np.uint32
    values = draw(41, 67, seed=5, dtype=dtype)
    exact = np.array([0, -0.0, 1, -1, 2, 0.5, np.inf, -np.inf, 2.0**-14], np.float32).astype(dtype)
    values[1, : len(exact)] = exact
    quiet = np.array([np.nan], np.float32).astype(dtype).view(bits)[0]
    nans = np.array([quiet, quiet | 5, quiet | 1 << (8 * width - 1)], bits)
    values[2, :3] = nans.view(dtype)
    values[3] = np.arange(67).astype(bits).view(dtype)  # subnormals
    values[4] = np.ldexp(np.float32(1), np.arange(67) % 12 - 6).astype(dtype)
    values[5] = -values[4]
    values[6] = 0
    return values


def write_odd(folder: Path, dtype: str) -> Path:
    """Write the base of :func:`odd_tensors` in two shards."""
    tensors = odd_tensors(DTYPES[dtype]) | {"o.special.weight": special(DTYPES[dtype])}
    names = sorted(tensors)
    return write_base(folder, tensors, None, (names[::2], names[1::2]))


def write_mixed(folder: Path) -> Path:
    """Write the same with the three dtypes beside each other."""
    kinds = list(DTYPES.values())
    tensors = {n: odd_tensors(kinds[i % 3])[n] for i, n in enumerate(odd_tensors(BF16))}
    return write_base(folder, tensors, None)


def odd_lora(folder: Path, rank: int = 3, seed: int = 1, **config: Any) -> Path:
    """Write LoRA on linear layers, an embedding, experts and a convolution."""
    conv = {
        f"{PREFIX}h.conv.lora_A.weight": draw(rank, 4, 3, 5, seed=seed) / 4,
        f"{PREFIX}h.conv.lora_B.weight": draw(9, rank, 1, 1, seed=seed + 1) / 4,
    }
    tensors = {
        **lora("a.linear", 37, 53, rank, seed), **lora("b.wide", 3, WIDE, rank, seed),
        **embedding("d.table", 301, 24, rank, seed), **experts("f", 5, 14, 33, rank, seed),
        **lora("l.long", 900, 17, rank, seed), **conv,
    }  # fmt: skip
    chosen = {"target_modules": ["a.linear", "b.wide", "d.table", "h.conv", "l.long"],
              "target_parameters": ["f.experts"]}  # fmt: skip
    return write_adapter(folder, tensors, r=rank, **chosen | config)


def odd_dora(folder: Path) -> Path:
    """Write DoRA on a linear layer and an embedding."""
    tensors = {
        **dora("c.dora", 29, 700, 4), **embedding("e.dora_table", 60, 700, 4),
        f"{PREFIX}e.dora_table.lora_magnitude_vector": 20 + draw(700),
    }  # fmt: skip
    targets = ["c.dora", "e.dora_table"]
    return write_adapter(folder, tensors, r=4, use_dora=True, target_modules=targets)


def odd_saved(folder: Path) -> Path:
    """Write token rows, and a module of its own."""
    tensors = {
        **lora("c.dora", 29, 700), f"{PREFIX}j.saved.weight": draw(8, 11, seed=9),
        f"{PREFIX}g.tokens.token_adapter.trainable_tokens_delta": draw(3, 31),
    }  # fmt: skip
    return write_adapter(
        folder, tensors, target_modules=["c.dora"], modules_to_save=["j.saved"],
        trainable_token_indices={"g.tokens": [48, 0, 7]},
    )  # fmt: skip


def odd_bias(folder: Path) -> Path:
    """Write an adapter with biases, ranks and scales by pattern, in bfloat16."""
    tensors = {**lora("a.linear", 37, 53, 5), **lora("l.long", 900, 17, 2),
               f"{PREFIX}a.linear.bias": draw(37, seed=4)}  # fmt: skip
    tensors = {name: value.astype(BF16) for name, value in tensors.items()}
    return write_adapter(
        folder, tensors, r=2, bias="lora_only", target_modules=["a.linear", "l.long"],
        rank_pattern={"a.linear": 5}, alpha_pattern={"^l.long": 7},
    )  # fmt: skip


def odd_lora_bias(folder: Path) -> Path:
    """Write an adapter whose B has a bias."""
    tensors = lora("a.linear", 37, 53) | {f"{PREFIX}a.linear.lora_B.bias": draw(37, seed=4)}
    return write_adapter(folder, tensors, lora_bias=True, target_modules=["a.linear"])


def odd_special(folder: Path, share: float) -> Path:
    """Write an adapter for the odd values alone, small or large against them."""
    tensors = lora("o.special", 41, 67, 2, share=share)
    return write_adapter(folder, tensors, r=2, target_modules=["o.special"])


def odd_factored(folder: Path, kind: str) -> Path:
    """Write an adapter that was begun from factors of the base (PiSSA or OLoRA)."""
    tensors = lora("k.factored", 24, 30, 5, share=0.5)
    return write_adapter(
        folder, tensors, r=5, init_lora_weights=kind, target_modules=["k.factored"]
    )


def llama_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return every tensor of a llama without an output layer of its own."""
    hidden, inner = sizes.hidden, sizes.inner
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for layer in range(LAYERS):
        within = f"model.layers.{layer}."
        shapes |= {f"{within}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{within}mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes[f"{within}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{within}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def llama_tensors(sizes: Sizes, dtype: Any = BF16) -> Tensors:
    """Return every tensor of a llama, with an output layer."""
    shapes = llama_shapes(sizes) | {"lm_head.weight": (VOCAB, sizes.hidden)}
    return {n: draw(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


def write_llama(folder: Path, sizes: Sizes = ODD, dtype: str = "bfloat16") -> Path:
    """Write a llama with plain weights."""
    config = llama_config(sizes, dtype=dtype)
    return write_base(folder, llama_tensors(sizes, DTYPES[dtype]), config)


def write_tied_llama(folder: Path) -> Path:
    """Write a llama whose output layer is its embedding."""
    tensors = llama_tensors(ODD)
    del tensors["lm_head.weight"]
    return write_base(folder, tensors, llama_config(ODD, tie_word_embeddings=True))


def llama_lora(
    folder: Path, sizes: Sizes = ODD, seed: int = 1, share: float = 0.25, **config: Any
) -> Path:
    """Write LoRA on queries, gates and outputs of the MLP, of all layers."""
    tensors: Tensors = {}
    for layer in range(LAYERS):
        within = f"model.layers.{layer}."
        tensors |= lora(f"{within}self_attn.q_proj", sizes.hidden, sizes.hidden, 3, seed, share)
        tensors |= lora(f"{within}mlp.gate_proj", sizes.inner, sizes.hidden, 3, seed + 2, share)
        tensors |= lora(f"{within}mlp.down_proj", sizes.hidden, sizes.inner, 3, seed + 4, share)
    targets = ["q_proj", "gate_proj", "down_proj"]
    return write_adapter(folder, tensors, target_modules=targets, **config)


def llama_dora(folder: Path, sizes: Sizes = ODD) -> Path:
    """Write DoRA on values and outputs of the MLP of one layer."""
    within = "model.layers.1."
    tensors = {**dora(f"{within}self_attn.v_proj", sizes.hidden, sizes.hidden),
               **dora(f"{within}mlp.down_proj", sizes.hidden, sizes.inner)}  # fmt: skip
    targets = ["layers.1.self_attn.v_proj", "layers.1.mlp.down_proj"]
    return write_adapter(folder, tensors, use_dora=True, target_modules=targets)


def llama_embedding(folder: Path) -> Path:
    """Write LoRA on the embedding."""
    tensors = embedding("model.embed_tokens", VOCAB, ODD.hidden)
    return write_adapter(folder, tensors, target_modules=["embed_tokens"])


def write_gpt2(folder: Path) -> Path:
    """Write a block of GPT-2, whose Conv1D weights lie (in, out)."""
    block = "transformer.h.0."
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (31, 20), "transformer.wpe.weight": (9, 20),
        f"{block}attn.c_attn.weight": (20, 60), f"{block}attn.c_attn.bias": (60,),
        f"{block}attn.c_proj.weight": (20, 20), f"{block}mlp.c_fc.weight": (20, 600),
        f"{block}mlp.c_proj.weight": (600, 20),
    }  # fmt: skip
    tensors = {n: draw(*s, seed=i, dtype=BF16) for i, (n, s) in enumerate(shapes.items())}
    return write_base(folder, tensors, GPT2)


def gpt2_adapter(folder: Path, *, use_dora: bool) -> Path:
    """Write an adapter for Conv1D layers."""
    make = dora if use_dora else lora
    block = "transformer.h.0."
    tensors = {**make(f"{block}attn.c_attn", 60, 20), **make(f"{block}mlp.c_fc", 600, 20),
               **make(f"{block}mlp.c_proj", 20, 600)}  # fmt: skip
    targets = ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]
    return write_adapter(
        folder, tensors, use_dora=use_dora, fan_in_fan_out=True, target_modules=targets
    )


MOE = "model.layers.0.block_sparse_moe.experts"


def write_mixtral(folder: Path) -> Path:
    """Write experts as Mixtral stores them, one by one."""
    sizes = {"w1": (10, 14), "w3": (10, 14), "w2": (14, 10)}
    tensors = {
        f"{MOE}.{i}.{name}.weight": draw(*size, seed=10 * i + number, dtype=BF16)
        for i in range(3)
        for number, (name, size) in enumerate(sizes.items())
    }
    return write_base(folder, tensors, MIXTRAL)


def mixtral_adapter(folder: Path) -> Path:
    """Write an adapter for the stacks that transformers makes of these experts."""
    stack = "model.layers.0.mlp.experts"
    outer = lora(stack, 14, 10, 9, 3)
    inner = lora(f"{stack}.base_layer", 20, 14, 9, 5)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return write_adapter(folder, inner | outer, target_parameters=names, peft_version="0.21.0")


def write_phi3(folder: Path) -> Path:
    """Write fused queries, keys and values."""
    tensors = {"model.layers.0.self_attn.qkv_proj.weight": draw(48, 24, dtype=BF16),
               "model.layers.0.self_attn.o_proj.weight": draw(24, 24, dtype=BF16)}  # fmt: skip
    return write_base(folder, tensors, PHI3)


def phi3_adapter(folder: Path) -> Path:
    """Write an adapter on the fused weight."""
    tensors = {**lora("model.layers.0.self_attn.qkv_proj", 48, 24),
               **lora("model.layers.0.self_attn.o_proj", 24, 24)}  # fmt: skip
    return write_adapter(folder, tensors, target_modules=["qkv_proj", "o_proj"])
