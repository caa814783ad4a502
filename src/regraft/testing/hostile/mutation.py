"""Sound small files, changed at random: what a hostile or broken file could look like.

Everything comes from a seed, so a case that fails can be made again. Changes are made to the
structure (a key twice, a number of another kind) and to the bytes (a bit, a length, a piece).
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring
from typing import Any, Literal

from regraft.tensors import DTYPES, nbytes_of

Kind = Literal["adapter", "index", "config"]
"""Which JSON file: ``adapter_config.json``, ``model.safetensors.index.json``, ``config.json``."""

TensorShape = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor, in the order the file has them."""

LAYERS, HIDDEN, INNER, VOCAB, RANK = 2, 8, 12, 20, 2
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Raw:
    """A piece of JSON as text."""

    def __init__(self, text: str) -> None:
        """Take the text."""
        self.text = text


class Pairs(list[tuple[Any, Any]]):
    """An object as its pairs, so that a key can be in it twice."""


def to_json(value: Any) -> str:
    """Return JSON for a value that may hold :class:`Raw` and :class:`Pairs`."""
    if type(value) is str:
        return encode_basestring(value)
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, (dict, Pairs)):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{to_json(key)}:{to_json(item)}" for key, item in pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(to_json, value)) + "]"
    return _number(value) if type(value) is int else json.dumps(value, ensure_ascii=False)


def _number(value: int) -> str:
    return str(value) if abs(value) < 10**4000 else f"1{'0' * 5000}"


ODD_NUMBERS: tuple[Any, ...] = (
    -1, -(2**63), 0, 1, 2, 3, 7, 255, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**9, 10**15, 10**30, 10**400, 10**4500, 1.0, 1.5, -0.0, 1e300, True, False, None, "1", "",
    Raw("-0"), Raw("1e0"), Raw("1E2"), Raw("1e400"), Raw("-1e400"), Raw("01"), Raw("+1"),
    Raw("0x10"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1_0"), Raw("1."), Raw(".5"),
    Raw("١"), [], {}, [1], [[1]], ["1"],
)  # fmt: skip

ODD_TEXTS: tuple[Any, ...] = (
    "", " ", "a", "..", "../x", "a/../../b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x1b[2J",
    "\x7f", "\x9b", "a\u202eb", "a\u2028b", "a\u200bb", "\ufeff", "é", "e\u0301", "权重",
    "\U0001f600", "x" * 300, "x" * 1025, "a." * 600, "__metadata__", "__proto__", "%s%n",
    "{0}", "$(id)", "1",
    Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw('"\\u0061"'), Raw('"\\ud83d\\ude00"'),
    Raw('"\\u0000"'), Raw('"\\/"'), Raw('"\\q"'), Raw("'a'"), Raw('"\t"'), Raw("a"),
)  # fmt: skip

SOUND_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**9, 10**15, 10**400, 1.0, 0.5, -0.0, 1e300, True,
    False, None, "1", "", [], {}, [1], ["a"], {"a": 1}, {"a": {"b": []}}, [[]], "../x", "x" * 1025,
    "a\0b", "\x1b[2J", "\u202e", "权重", [None], [True], [10**30], Raw("NaN"), Raw("1e400"),
)  # fmt: skip
"""Values of every kind that are JSON to any reader, for fields that expect another."""

ODD_VALUES: tuple[Any, ...] = (*ODD_NUMBERS, *ODD_TEXTS, [None], {"a": {"a": {}}}, [[], [[]]])


def _pick(rng: random.Random, values: tuple[Any, ...]) -> Any:
    value = values[int(rng.random() * len(values))]
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def _nested(depth: int, how: str = "[]") -> Raw:
    opening = how[0] if how == "[]" else '{"a":'
    return Raw(opening * depth + "1" + how[1] * depth)


# Headers

_NAMES = (
    "a", "b", "weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight",
    "lm_head.weight", "权重", "é", "a/b", "x y", 'odd "quoted"', "a..b", "...", "0", "\U0001f600",
    "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight",
)  # fmt: skip
_BAD_DTYPES = ("f32", "F128", "", "BF16 ", "bf16", "F8", "F8_E4M3FN", "INT8", "U4", "I4", "F6",
               "C128", "float32", "F32\0")  # fmt: skip

Doc = list[tuple[Any, Any]]
Change = Callable[[random.Random, Pairs], None]


def sound_header(rng: random.Random) -> tuple[Pairs, int]:
    """Return the pairs of a sound header, and how many bytes of data it describes."""
    entries, offset = Pairs(), 0
    for name in rng.sample(_NAMES, rng.choice((0, 1, 1, 2, 2, 3, 4))):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice((0, 1, 2, 3, 4, 8)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
        if math.prod(shape) * DTYPES[dtype].bits % 8:
            shape.append(4)
        end = offset + nbytes_of(dtype, tuple(shape))
        fields = Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", [offset, end])])
        entries.append((name, fields))
        offset = end
    rng.shuffle(entries)
    if rng.random() < 0.4:
        metadata = {"format": "pt", "note": 'é "x" \n'}
        entries.insert(rng.randint(0, len(entries)), ("__metadata__", metadata))
    return entries, offset


def _tensor(rng: random.Random, entries: Pairs) -> tuple[int, Pairs] | None:
    """Return the place and the fields of one entry, None where there is none left."""
    places = [i for i, (_, fields) in enumerate(entries) if isinstance(fields, Pairs)]
    if not places:
        return None
    at = rng.choice(places)
    return at, entries[at][1]


def _on_fields(change: Callable[[random.Random, Pairs], None]) -> Change:
    def changed(rng: random.Random, entries: Pairs) -> None:
        if found := _tensor(rng, entries):
            change(rng, found[1])

    return changed


def _on_list(key: str, change: Callable[[random.Random, list[Any]], None]) -> Change:
    def changed(rng: random.Random, fields: Pairs) -> None:
        for at, (name, value) in enumerate(fields):
            if name == key and isinstance(value, list):
                fields[at] = (name, values := list(value))
                change(rng, values)

    return _on_fields(changed)


def _odd_item(rng: random.Random, values: list[Any]) -> None:
    value = _pick(rng, ODD_NUMBERS)
    at = rng.randint(0, len(values))
    if at == len(values) or rng.random() < 0.2:
        values.insert(at, value)
    else:
        values[at] = value


def _shifted(rng: random.Random, values: list[Any]) -> None:
    by = rng.choice((-8, -4, -1, 1, 4, 8, 2**31, 2**62, 2**63, 2**64, -(2**63)))
    for at in rng.choice(((0,), (1,), (0, 1))):
        if at < len(values) and type(values[at]) is int:
            values[at] += by


def _swapped(_: random.Random, values: list[Any]) -> None:
    values.reverse()


def _shorter(rng: random.Random, values: list[Any]) -> None:
    if values:
        values.pop(rng.randrange(len(values)))


def _odd_dtype(rng: random.Random, fields: Pairs) -> None:
    known = tuple(DTYPES)
    value = rng.choice(known) if rng.random() < 0.4 else _pick(rng, (*_BAD_DTYPES, *ODD_VALUES))
    _put(fields, "dtype", value)


def _put(fields: Pairs, key: str, value: Any) -> None:
    for at, (name, _) in enumerate(fields):
        if name == key:
            fields[at] = (key, value)


def _odd_field(rng: random.Random, fields: Pairs) -> None:
    if fields:
        at = rng.randrange(len(fields))
        fields[at] = (fields[at][0], _pick(rng, ODD_VALUES))


def _field_twice(rng: random.Random, fields: Pairs) -> None:
    if fields:
        fields.insert(rng.randint(0, len(fields)), rng.choice(fields))


def _fewer_fields(rng: random.Random, fields: Pairs) -> None:
    if fields:
        fields.pop(rng.randrange(len(fields)))


def _more_fields(rng: random.Random, fields: Pairs) -> None:
    key = rng.choice(("x", "Dtype", "offsets", "", "data_offsets ", "strides"))
    fields.append((key, _pick(rng, ODD_VALUES)))


def _field_renamed(rng: random.Random, fields: Pairs) -> None:
    if fields:
        at = rng.randrange(len(fields))
        fields[at] = (_pick(rng, (*ODD_TEXTS, "Shape", "DTYPE")), fields[at][1])


def _fields_shuffled(rng: random.Random, fields: Pairs) -> None:
    rng.shuffle(fields)


def _deep(rng: random.Random, fields: Pairs) -> None:
    if fields:
        at = rng.randrange(len(fields))
        depth = rng.choice((2, 60, 127, 128, 129, 500, 3000))
        fields[at] = (fields[at][0], _nested(depth, rng.choice(("[]", "{}"))))


def _huge_but_empty(_: random.Random, fields: Pairs) -> None:
    _put(fields, "shape", [10**5, 0, 10**10])
    for at, (name, value) in enumerate(fields):
        if name == "data_offsets" and isinstance(value, list) and value:
            fields[at] = (name, [value[0], value[0]])


def _tensor_twice(rng: random.Random, entries: Pairs) -> None:
    if entries:
        entries.insert(rng.randint(0, len(entries)), rng.choice(entries))


def _tensor_renamed(rng: random.Random, entries: Pairs) -> None:
    if entries:
        at = rng.randrange(len(entries))
        others = tuple(name for name, _ in entries)
        entries[at] = (_pick(rng, (*ODD_TEXTS, *others)), entries[at][1])


def _tensor_gone(rng: random.Random, entries: Pairs) -> None:
    if entries:
        entries.pop(rng.randrange(len(entries)))


def _tensor_replaced(rng: random.Random, entries: Pairs) -> None:
    if entries:
        at = rng.randrange(len(entries))
        entries[at] = (entries[at][0], _pick(rng, ODD_VALUES))


def _more_tensors(rng: random.Random, entries: Pairs) -> None:
    begin = rng.choice((0, 1, 4, 8, 2**63, 2**64 - 1))
    size = rng.choice((0, 1, 4, 8, 2**62))
    fields = [("dtype", "U8"), ("shape", [size]), ("data_offsets", [begin, begin + size])]
    entries.append((rng.choice(_NAMES), Pairs(fields)))


def _odd_metadata(rng: random.Random, entries: Pairs) -> None:
    texts = Pairs((_pick(rng, ODD_TEXTS), _pick(rng, ODD_VALUES)) for _ in range(2))
    twice = Pairs([("a", "1"), ("a", "1")])
    entries.append(("__metadata__", _pick(rng, (texts, twice, *ODD_VALUES))))


_HEADER_CHANGES: tuple[Change, ...] = (
    _on_list("shape", _odd_item), _on_list("shape", _swapped), _on_list("shape", _shorter),
    _on_list("data_offsets", _odd_item), _on_list("data_offsets", _shifted),
    _on_list("data_offsets", _swapped), _on_list("data_offsets", _shorter),
    _on_list("data_offsets", _shifted), _on_list("shape", _odd_item),
    _on_fields(_odd_dtype), _on_fields(_odd_field), _on_fields(_field_twice),
    _on_fields(_fewer_fields), _on_fields(_more_fields), _on_fields(_field_renamed),
    _on_fields(_fields_shuffled), _on_fields(_deep), _on_fields(_huge_but_empty),
    _tensor_twice, _tensor_renamed, _tensor_renamed, _tensor_gone, _tensor_replaced,
    _more_tensors, _odd_metadata,
)  # fmt: skip

_CORPUS = 512


def mutated_headers(seed: int | str, count: int) -> Iterator[bytes]:
    """Yield the contents of small safetensors files: sound ones, and ones with changes.

    Args:
        seed: the same seed yields the same files.
        count: how many.
    """
    rng = random.Random(f"headers {seed}")
    corpus = [sound_header(rng) for _ in range(_CORPUS)]
    data = rng.randbytes(1 << 16)
    for _ in range(count):
        entries, size = corpus[int(rng.random() * _CORPUS)]
        chance = rng.random()
        if chance < 0.85:
            entries = Pairs((n, Pairs(f) if isinstance(f, Pairs) else f) for n, f in entries)
        for _ in range(0 if chance > 0.7 else 1 if chance > 0.25 else rng.randint(2, 4)):
            rng.choice(_HEADER_CHANGES)(rng, entries)
        raw = to_json(entries).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            raw += b" " * rng.randrange(9)
        if chance > 0.95:
            yield _file(raw, data[:size])  # as it was
        elif chance > 0.6 or rng.random() < 0.2:
            yield _damaged_file(rng, raw, data[:size])
        else:
            yield _file(raw, data[: max(0, size + rng.choice((0, 0, 0, 0, 0, 1, -1, 8)))])


def _file(raw: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw + data


def _damaged_file(rng: random.Random, raw: bytes, data: bytes) -> bytes:
    """Return a file with something done to its bytes: of the header, of the length, or of all."""
    how = rng.random()
    if how < 0.6:
        return _file(damaged(rng, raw), data)
    if how < 0.75:
        return damaged(rng, _file(raw, data))
    if how < 0.85:
        lengths = (0, 1, 2, len(raw) - 1, len(raw) + 1, len(raw) + len(data), 10**8, 10**8 + 1,
                   2**31, 2**32, 2**63, 2**64 - 1, len(raw) << 8)  # fmt: skip
        return struct.pack("<Q", max(0, rng.choice(lengths))) + raw + data
    if how < 0.92:
        whole = _file(raw, data)
        return whole[: rng.randrange(len(whole) + 1)]
    return _file(raw, data + rng.choice((b"\0", b"x", b"\0" * 8, raw)))


_PIECES = (
    b"\xef\xbb\xbf", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b" ", b"\n", b"\t", b",", b":",
    b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u0000", b"\\ud800", b"-", b"+", b".", b"e9", b"0",
    b"9" * 30, b"null", b"true", b"NaN", b"/*x*/", b"//", b"#", b"'", b"{}", b"[]", b'"a":1,',
)  # fmt: skip


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return ``content`` with one to three small changes to its bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randint(0, len(changed))
        how = rng.randrange(7)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif how == 2:
            changed[at:at] = rng.choice(_PIECES)
        elif how == 3:
            del changed[at : at + rng.choice((1, 1, 2, 8))]
        elif how == 4:
            piece = changed[at : at + rng.randrange(1, 40)]
            to = rng.randint(0, len(changed))
            changed[to:to] = piece
        elif how == 5:
            changed[at : at + 1] = rng.choice(_PIECES)
        else:
            del changed[at:]
    return bytes(changed)


# JSON files

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
        return _pick(rng, ODD_VALUES)
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
    new = _pick(rng, values if kind < 0.6 else SOUND_VALUES if kind < 0.95 else ODD_VALUES)
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
        node[at] = (_pick(rng, (*names, *_KEYS)), node[at][1])
    elif node and how < 0.8:
        node.append(rng.choice(node))
    elif how < 0.82:
        node.append(("deep", _nested(rng.choice((5, 60, 64, 65, 1000, 5000)))))
    else:
        node.append((_pick(rng, _KEYS), new))
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
