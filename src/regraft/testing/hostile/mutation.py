"""Mutated configs, indexes, and lists of tensors: sound small files, changed at random.

Everything comes from a seed, so a case that fails can be made again. Changes are made to the
structure (a key twice, a number of another kind) and to the bytes (a bit, a length, a piece).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

from regraft.testing.hostile.odd import (
    ODD_TEXTS,
    ODD_VALUES,
    SOUND_VALUES,
    Pairs,
    Raw,
    damaged,
    nested,
    pick,
    to_json,
)
from regraft.testing.hostile.tiny import (
    HIDDEN,
    INNER,
    SHARDS,
    VOCAB,
    TensorShape,
    adapter_config,
    adapter_tensors,
    base_config,
    base_tensors,
    weight_index,
)

Kind = Literal["adapter", "index", "config"]
"""Which JSON file: ``adapter_config.json``, ``model.safetensors.index.json``, ``config.json``."""

_EXPRESSIONS = (
    r"(.*)*x", r"(.|..)+!", r"(\w|\w\w|\.)+!",
    r"(a+)+$", r"(?:.*a){25}b", r"(\w+\.?)+!", r"(a|a)*c", r"(x+x+)+y", "(", "[", "*",
    "a**", r"(?i).*Q_PROJ", r".*\.(q|v)_proj", r"(?P<idx>\d+)", r"\1", r"(?<=a+)b", "a{e<=3}",
    "[[:alpha:]]", "(?R)", r"\p{L}+", "a{1,1000}" * 20, "(" * 200, "(?:" * 300 + "a" + "?)" * 300,
    "|" * 300, "(?x) q # _", "(?s:.*)", "(?:(?:a*)*)*c", r"(?=(a+)+$)", "^", "$", "", ".",
    r"layers\.\d+\..*",
    "a{99999999999}", "(?(1)a|b)", "(?#", r"\N{SPACE}", "[z-a]", "(?P<a>.)(?P=a)", "x" * 20_001,
    r"(?:.*?(?:model|layers).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)",
)  # fmt: skip

_FIELDS: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "adapter": (
        (
            "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
            "modules_to_save", "layers_to_transform", "layers_pattern", "bias", "use_dora",
            "use_rslora", "peft_type", "init_lora_weights", "trainable_token_indices",
            "target_parameters", "auto_mapping", "task_type", "fan_in_fan_out", "lora_bias",
            "ensure_weight_tying", "base_model_name_or_path", "layer_replication", "loftq_config",
            "megatron_config", "runtime_config", "eva_config", "use_qalora", "revision",
        ),
        (
            *({expression: 2} for expression in _EXPRESSIONS), *_EXPRESSIONS,
            *([expression] for expression in _EXPRESSIONS), "all-linear", ["q_proj"], "q_proj",
            {"q_proj": 10**9}, {"q_proj": True}, {"q_proj": 2.0}, {"q_proj": Raw("1e400")},
            {"q_proj": Raw("NaN")}, {"": 1}, {f"m{i}": 1 for i in range(300)},
            {f"(m{i})": 1 for i in range(100)}, [10**9], [-1], [10**400], [0, True], [0, 0], [1.0],
            {"embed_tokens": [3, 10**12]}, {"embed_tokens": [-1]}, {"lm_head": [0, 1]}, [1, 1],
            ["experts.gate_up_proj", "weight", ".", "a."], ["lm_head", "embed_tokens", "norm"],
            {"base_model_class": ["x"]}, {"base_model_class": "LlamaForSequenceClassification"},
            {"base_model_class": 3}, "SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "all", "lora_only",
            "none", "LORA", "IA3", "lora", "PREFIX_TUNING", "pissa", "pissa_niter_4", "olora",
            "loftq", "corda", "eva", "gaussian", "orthogonal",
        ),
    ),
    "index": (
        ("metadata", "weight_map", "total_size", "model.norm.weight", "more.weight"),
        (*SHARDS, "../x.safetensors", "/etc/passwd", "model.safetensors", "x.bin", ".safetensors",
         f"./{SHARDS[0]}", f"{SHARDS[0]}\0", f"a\\{SHARDS[0]}", "CON.safetensors",
         "\u202e.safetensors",          {"a": SHARDS[0]}, [SHARDS[0]], {"total_size": 10**30}),
    ),
    "config": (
        (
            "architectures", "model_type", "hidden_size", "vocab_size", "tie_word_embeddings",
            "dtype", "torch_dtype", "quantization_config", "compression_config", "auto_map",
            "id2label", "num_local_experts", "text_config", "vision_config", "transformers_weights",
            "label2id",
            "num_labels", "num_experts", "is_encoder_decoder", "backbone_config",
        ),
        (
            ["LlamaForCausalLM"], ["MixtralForCausalLM"], ["Qwen3MoeForCausalLM"], ["T5Model"],
            ["GPT2LMHeadModel"], ["LlavaForConditionalGeneration"], [["x"]], [3], ["../x"],
            ["ViTForImageClassification"], ["DetrForObjectDetection"], ["Gemma3ForCausalLM"],
            "llama", "mixtral", "gpt2", "t5", "llava", "qwen3_moe", "no_such_type", "bfloat16",
            {"model_type": "llama"}, {"model_type": ["llama"]}, {"model_type": {"a": 1}},
            {"model_type": "mixtral", "num_local_experts": -1}, {"quant_method": "gptq"},
            {"quant_method": [1]}, {"0": "a"}, {"AutoModel": "x.Y"}, "model.safetensors",
            "../model.safetensors", "pytorch_model.bin", "nowhere.safetensors",
        ),
    ),
}  # fmt: skip


_SOUND: dict[str, Callable[[], dict[str, Any]]] = {
    "adapter": adapter_config,
    "index": weight_index,
    "config": base_config,
}


_KEYS = tuple(text for text in ODD_TEXTS if isinstance(text, str))


def mutated_json(seed: int | str, count: int, kind: Kind) -> Iterator[bytes]:
    """Yield the contents of JSON files of one kind: sound ones, and ones with changes.

    Args:
        seed: the same seed yields the same files.
        count: how many.
        kind: which file of a model or adapter it is.
    """
    rng = random.Random(f"{kind} {seed}")
    names, values = _FIELDS[kind]
    sound = _SOUND[kind]()
    for _ in range(count):
        value: Any = as_pairs(sound)
        chance = rng.random()
        for _ in range(0 if chance > 0.9 else 1 if chance > 0.4 else rng.randint(2, 6)):
            value = changed_json(rng, value, names, values)
        content = to_json(value).encode("utf-8", "surrogatepass")
        yield damaged(rng, content) if rng.random() < 0.1 else content


def as_pairs(value: Any) -> Any:
    """Return a copy whose objects are :class:`Pairs`."""
    if isinstance(value, dict):
        return Pairs((key, as_pairs(item)) for key, item in value.items())
    return [as_pairs(item) for item in value] if isinstance(value, list) else value


def changed_json(
    rng: random.Random, value: Any, names: tuple[str, ...], values: tuple[Any, ...]
) -> Any:
    """Change one thing, most often a field of the object at the top; return the whole."""
    if rng.random() < 0.01:
        return pick(rng, ODD_VALUES)
    node = value
    while isinstance(node, Pairs) and node and rng.random() < 0.4:
        inner = [item for _, item in node if isinstance(item, Pairs)]
        if not inner:
            break
        node = rng.choice(inner)
    if not isinstance(node, Pairs):
        return value
    how = rng.random()
    kind = rng.random()
    new = pick(rng, values if kind < 0.6 else SOUND_VALUES if kind < 0.95 else ODD_VALUES)
    if how < 0.35:
        key = rng.choice(names)
        node[:] = [pair for pair in node if pair[0] != key] + [(key, new)]
    elif node and how < 0.6:
        at = rng.randrange(len(node))
        node[at] = (node[at][0], new)
    elif node and how < 0.7:
        node.pop(rng.randrange(len(node)))
    elif node and how < 0.78:
        at = rng.randrange(len(node))
        node[at] = (pick(rng, (*names, *_KEYS)), node[at][1])
    elif node and how < 0.8:
        node.append(rng.choice(node))
    elif how < 0.82:
        node.append(("deep", nested(rng.choice((5, 60, 64, 65, 1000, 5000)))))
    else:
        node.append((pick(rng, _KEYS), new))
    return value


# Shapes: sound files whose tensors are not what a model has

_DIMENSIONS = (0, 1, 2, 3, 7, HIDDEN, HIDDEN + 1, INNER, VOCAB, VOCAB + 2, 64, 2**20, 10**9)
_SUFFIXES = (
    ".weight", ".bias", ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_B.bias",
    ".lora_embedding_B", ".lora_magnitude_vector", ".base_layer.weight",
    ".base_layer.lora_A.weight", ".base_layer.lora_B.weight", ".modules_to_save.weight",
    ".original_module.weight",
    ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight", "",
)  # fmt: skip
_MODULES = (
    "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts", "model.norm", "score", "model.layers.1.mlp.experts.0.gate_proj",
    "model", "", "0", "a" * 1000,
    "model.layers.0.block_sparse_moe.experts.0.w1", f"model.layers.{'9' * 900}.self_attn.q_proj",
    "model.layers.0.self_attn", "model.layers.0.mlp.experts.gate_up_proj", "." * 40,
)  # fmt: skip


def mutated_tensors(
    seed: int | str, count: int
) -> Iterator[tuple[list[TensorShape], list[TensorShape]]]:
    """Yield the tensors of a base and of an adapter, some with other names, dtypes and shapes.

    What :func:`regraft.formats.safetensors.build_header` makes of them is a sound header.
    """
    rng = random.Random(f"tensors {seed}")
    for _ in range(count):
        yield (
            _other_tensors(rng, base_tensors(), ""),
            _other_tensors(rng, adapter_tensors(), "base_model.model."),
        )


def _other_tensors(
    rng: random.Random, tensors: list[TensorShape], prefix: str
) -> list[TensorShape]:
    made = dict.fromkeys(name for name, _, _ in tensors)
    shapes = {name: (dtype, shape) for name, dtype, shape in tensors}
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        how, name = rng.random(), rng.choice(list(made))
        dtype, shape = shapes[name]
        if how < 0.5:
            shapes[name] = (dtype, _other_shape(rng, shape))
        elif how < 0.6:
            shapes[name] = (rng.choice(("F32", "F16", "I64", "U8", "F8_E4M3", "C64")), shape)
        elif how < 0.7 and len(made) > 1:
            del made[name]
        else:
            new = prefix + rng.choice(_MODULES) + rng.choice(_SUFFIXES)
            made[new] = None
            shapes[new] = (dtype, _other_shape(rng, shape))
    return [(name, *shapes[name]) for name in made]


def _other_shape(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    how = rng.random()
    if how < 0.5 and shape:
        at = rng.randrange(len(shape))
        return (*shape[:at], rng.choice(_DIMENSIONS), *shape[at + 1 :])
    if how < 0.6:
        return shape[::-1]
    return tuple(rng.choice(_DIMENSIONS) for _ in range(rng.randrange(5)))
