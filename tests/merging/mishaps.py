"""A table of bad inputs: how each is made, and what has to be said about it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merging import toys
from merging.toys import (
    BF16,
    EMBED,
    HIDDEN,
    INDEX,
    PREFIX,
    Q0,
    VOCAB,
    attention,
    draw,
    lora,
    write_adapter,
    write_json,
)

BASE, ADAPTER = "base/model.safetensors", "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Mishap:
    """One bad input.

    Attributes:
        spoil: damages the sound base and adapter in a folder.
        error: name of the error's class.
        says: words that have to be in the message, which has what, where, expected and found.
        hint: words that have to be in what to do next.
        count: how many problems are listed.
        exit_code: of the command.
        base, adapter: what is named as such, below the folder.
        checked: whether ``check`` finds it too, from headers.
    """

    spoil: Callable[[Path], Any]
    error: str
    says: tuple[str, ...]
    hint: str = ""
    count: int = 1
    exit_code: int = 3
    base: str = "base"
    adapter: str = "adapter"
    checked: bool = True


# Headers


def rewrite(path: Path, change: Callable[[dict[str, Any], bytes], tuple[str, bytes]]) -> None:
    """Pass a safetensors file's header and data through a function that returns new ones."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text, data = change(json.loads(raw[8 : 8 + size]), raw[8 + size :])
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)


def truncated(path: Path) -> None:
    """Cut off the last bytes, as a download that broke."""
    path.write_bytes(path.read_bytes()[:-7])


def overlapping(path: Path) -> None:
    """Let the second tensor begin inside the first."""

    def change(fields: dict[str, Any], data: bytes) -> tuple[str, bytes]:
        names = sorted(fields.keys() - {"__metadata__"}, key=lambda n: fields[n]["data_offsets"])
        for name in names[1:]:
            fields[name]["data_offsets"] = [at - 2 for at in fields[name]["data_offsets"]]
        return json.dumps(fields), data[:-2]

    rewrite(path, change)


def duplicated(path: Path) -> None:
    """Name the first tensor twice."""

    def change(fields: dict[str, Any], data: bytes) -> tuple[str, bytes]:
        name = next(name for name in fields if name != "__metadata__")
        twice = json.dumps({name: fields[name]})[1:-1]
        return f"{{{twice},{json.dumps(fields)[1:]}", data

    rewrite(path, change)


def out_of_bounds(path: Path) -> None:
    """Let the last tensor end far behind the file's end."""

    def change(fields: dict[str, Any], data: bytes) -> tuple[str, bytes]:
        last = max(fields.keys() - {"__metadata__"}, key=lambda n: fields[n]["data_offsets"])
        entry = fields[last]
        entry["data_offsets"][1] += 4 * 10**12
        entry["dtype"] = "U8"
        entry["shape"] = [entry["data_offsets"][1] - entry["data_offsets"][0]]
        return json.dumps(fields), data

    rewrite(path, change)


def huge_header(path: Path) -> None:
    """Promise a header of half the address space."""
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def traversing(path: Path) -> None:
    """Give a tensor a name that is a path upwards."""

    def change(fields: dict[str, Any], data: bytes) -> tuple[str, bytes]:
        name = next(name for name in fields if name != "__metadata__")
        fields["../../etc/passwd"] = fields.pop(name)
        return json.dumps(fields), data

    rewrite(path, change)


def on(file: str, spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that spoils one file of the folder."""
    return lambda folder: spoil(folder / file)


def put(file: str, content: bytes) -> Callable[[Path], Any]:
    """Return a function that writes a file."""
    return lambda folder: (folder / file).write_bytes(content)


DAMAGE: Mapping[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "truncated": (truncated, ("cut short", "expected", "found"), "Download"),
    "overlapping": (overlapping, ("overlaps",), "Download"),
    "duplicated": (duplicated, ("occurs twice",), "Download"),
    "out of bounds": (out_of_bounds, ("cut short", "bytes"), "Download"),
    "with a huge header": (huge_header, ("4611686018427387904",), "Download"),
    "with a path for a name": (traversing, ("../../etc/passwd", "path upwards"), ""),
    "empty": (lambda path: path.write_bytes(b"") and None, ("0 bytes",), "Download"),
    "a web page": (
        lambda path: path.write_bytes(b"<!DOCTYPE html><html>Not found</html>") and None,
        ("not a whole safetensors file",), "Download",
    ),
}  # fmt: skip

MISHAPS: dict[str, Mishap] = {}

for _what, (_spoil, _says, _hint) in DAMAGE.items():
    for _file in (BASE, ADAPTER):
        _name = f"{_file.partition('/')[0]} {_what}"
        MISHAPS[_name] = Mishap(on(_file, _spoil), "FormatError", (_file, *_says), _hint)


# Numbers and shapes of an adapter


def adapter_with(changes: Mapping[str, Any], **config: Any) -> Callable[[Path], Path]:
    """Return a function that writes the adapter with tensors changed, or left out where None."""

    def spoil(folder: Path) -> Path:
        tensors = {**attention(), **changes}
        held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return write_adapter(folder / "adapter", held, **config)

    return spoil


def spoiled(value: float, *shape: int) -> np.ndarray:
    """Return random numbers, the second of which is ``value``."""
    numbers = draw(*shape)
    numbers.flat[1] = value
    return numbers


KEY = f"{PREFIX}{Q0}"
A, B, R = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight", toys.RANK
HEAD, ROWS = f"{PREFIX}lm_head.weight", f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"
OTHER = {k.replace("self_attn", "attention"): v for k, v in attention().items()}
NAN = ("NaN or infinity", "finite numbers", "1 of ")

MISHAPS |= {
    "NaN in A": Mishap(
        adapter_with({A: spoiled(np.nan, R, HIDDEN)}), "AdapterError", (ADAPTER, A, *NAN),
        "diverged", checked=False),
    "infinity in B": Mishap(
        adapter_with({B: spoiled(-np.inf, HIDDEN, R)}), "AdapterError", (ADAPTER, B, *NAN),
        "diverged", checked=False),
    "NaN in A in bfloat16": Mishap(
        adapter_with({A: spoiled(np.nan, R, HIDDEN).astype(BF16)}), "AdapterError",
        (ADAPTER, A, *NAN), "diverged", checked=False),
    "NaN in a magnitude": Mishap(
        adapter_with({f"{KEY}.lora_magnitude_vector": spoiled(np.nan, HIDDEN)}, use_dora=True),
        "AdapterError", (ADAPTER, "lora_magnitude_vector", *NAN), "diverged", checked=False),
    "NaN in token rows": Mishap(
        adapter_with({ROWS: spoiled(np.nan, 1, HIDDEN)}, trainable_token_indices=[3]),
        "AdapterError", (ADAPTER, ROWS, *NAN), "diverged", checked=False),
    "NaN in a whole module": Mishap(
        adapter_with({HEAD: spoiled(np.nan, VOCAB, HIDDEN)}, modules_to_save=["lm_head"]),
        "AdapterError", (HEAD, "NaN or infinity"), "diverged", checked=False),
    "infinity in a whole module of the base's dtype": Mishap(
        adapter_with({HEAD: spoiled(np.inf, VOCAB, HIDDEN).astype(BF16)},
                     modules_to_save=["lm_head"]),
        "AdapterError", (HEAD, "NaN or infinity"), "diverged", checked=False),
    "A too wide": Mishap(
        adapter_with({A: draw(R, HIDDEN + 1)}), "MismatchError",
        (f"{Q0}.weight", "another shape", "(16, 16) (base)", "(16, 17) (adapter)"),
        "the base the adapter was trained on?"),
    "B too tall": Mishap(
        adapter_with({B: draw(HIDDEN + 8, R)}), "MismatchError",
        (f"{Q0}.weight", "another shape", "(16, 16) (base)", "(24, 16) (adapter)"), ""),
    "A and B of two ranks": Mishap(
        adapter_with({A: draw(R + 1, HIDDEN)}), "MismatchError",
        ("model.layers.0.self_attn.q_proj", "factors do not fit each other", "(4, 16), (16, 3)")),
    "A and B swapped": Mishap(
        adapter_with({A: draw(HIDDEN, R), B: draw(R, HIDDEN)}), "MismatchError",
        ("model.layers.0.self_attn.q_proj", "r = 3", "r = 16")),
    "another rank than the config's": Mishap(
        adapter_with({}, r=5), "MismatchError",
        ("the factors' rank is not the config's", "expected r = 5", "found r = 3"),
        "Fix r or rank_pattern", count=4),
    "A without B": Mishap(
        adapter_with({B: None}), "AdapterError",
        (ADAPTER, "self_attn.q_proj", "no complete pair", "lora_A and lora_B", "found lora_A"),
        "again"),
    "B without A": Mishap(
        adapter_with({A: None}), "AdapterError", ("no complete pair", "found lora_B"), "again"),
    "a magnitude of the wrong size": Mishap(
        adapter_with({f"{KEY}.lora_magnitude_vector": draw(HIDDEN - 1)}, use_dora=True),
        "MismatchError", ("magnitude vector has the wrong size", "16 values", "(15,)")),
    "a module of another shape": Mishap(
        adapter_with({f"{PREFIX}model.norm.weight": draw(HIDDEN + 1)}, modules_to_save=["norm"]),
        "MismatchError", ("model.norm.weight", "(16,) (base)", "(17,) (adapter)"),
        "the base the adapter was trained on?"),
    "factors in float64": Mishap(
        adapter_with({A: draw(R, HIDDEN, dtype=np.float64)}), "AdapterError",
        (A, "a dtype that adapters do not have", "F32 or BF16 or F16", "found F64")),
    "factors of no elements": Mishap(
        adapter_with({A: np.empty((0, HIDDEN), np.float32)}), "AdapterError",
        (A, "is empty", "(0, 16)"), "ZeRO-3"),
    "a tensor that belongs to nothing": Mishap(
        adapter_with({f"{PREFIX}{Q0}.ia3_l": draw(HIDDEN)}), "AdapterError",
        ("q_proj.ia3_l", "belongs to nothing", "modules_to_save (none)"), "modules_to_save"),
    "no tensors": Mishap(
        adapter_with(dict.fromkeys(attention())), "AdapterError", (ADAPTER, "holds no tensors"),
        "stopped before a save"),
    "another base": Mishap(
        lambda folder: write_adapter(folder / "adapter", OTHER), "MismatchError",
        ("no such tensor", *(f"model.layers.{i}.attention.{n}_proj.weight" for i in (0, 1)
                             for n in "qv")),
        "model.layers.0.self_attn.", count=4),
    "a base with fewer layers": Mishap(
        adapter_with(lora("model.layers.7.self_attn.q_proj", HIDDEN, HIDDEN)), "MismatchError",
        ("model.layers.7.self_attn.q_proj.weight", "no such tensor"), "nearest names"),
    "modules that are not targeted": Mishap(
        adapter_with({}, target_modules=["q_proj"]), "MismatchError",
        ("does not target", "self_attn.v_proj", "target_modules='q_proj'"),
        "PEFT would ignore them", count=2),
    "layers that are not transformed": Mishap(
        adapter_with({}, layers_to_transform=[0]), "MismatchError",
        ("does not target", "model.layers.1."), "PEFT would ignore", count=2),
    "a vocabulary that grew": Mishap(
        adapter_with(lora("lm_head", VOCAB + 6, HIDDEN), target_modules=["q_proj", "v_proj",
                                                                         "lm_head"]),
        "MismatchError", ("lm_head.weight", "(40, 16)", "(46, 16)"), "vocabulary grew"),
    "a vocabulary that grew on one side": Mishap(
        adapter_with({HEAD: draw(VOCAB + 6, HIDDEN)}, modules_to_save=["lm_head"]),
        "MismatchError", ("grew on one side", "has 40", "lm_head.weight has 46"),
        "both embeddings"),
    "token rows beyond the table": Mishap(
        adapter_with({ROWS: draw(1, HIDDEN)}, trainable_token_indices=[10**12]), "MismatchError",
        (EMBED, "rows below 40 of width 16", "rows up to 1000000000000"), "Resize"),
    "token rows of another count": Mishap(
        adapter_with({ROWS: draw(3, HIDDEN)}, trainable_token_indices=[1, 2]), "AdapterError",
        ("do not fit the config", "2 rows", "(3, 16)")),
    "token rows of no table": Mishap(
        adapter_with({f"{PREFIX}model.norm.token_adapter.trainable_tokens_delta": draw(1, HIDDEN)},
                     trainable_token_indices={"norm": [1]}),
        "MismatchError", ("model.norm.weight", "token rows need a table", "(16,)")),
    "a bias that the base does not have": Mishap(
        adapter_with({f"{KEY}.lora_B.bias": draw(HIDDEN)}, lora_bias=True), "MismatchError",
        ("lora_bias needs a bias", f"{Q0}.bias"), "Nobody can merge this"),
    "a head that is nowhere": Mishap(
        adapter_with({}, task_type="SEQ_CLS"), "MismatchError",
        ("a head that neither it nor the base holds", "LlamaForSequenceClassification"),
        "modules_to_save"),
}  # fmt: skip


# Configs and folders


def without(*names: str) -> Callable[[Path], Any]:
    """Return a function that removes files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def config_of(which: str, **fields: Any) -> Callable[[Path], Any]:
    """Return a function that changes fields of the base's or the adapter's config."""
    name = {"base": "base/config.json", "adapter": "adapter/adapter_config.json"}[which]
    return lambda folder: write_json(folder / name, toys.read_json(folder / name) | fields)


def indexed(weight_map: Mapping[str, str]) -> Callable[[Path], Any]:
    """Return a function that puts an index in the place of the base's only file."""

    def spoil(folder: Path) -> None:
        (folder / "base" / "model.safetensors").rename(folder / "base" / "one.safetensors")
        write_json(folder / "base" / INDEX, {"weight_map": weight_map})

    return spoil


def nothing_of_the_kind(folder: Path) -> None:
    """Make a folder of photographs."""
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"\xff\xd8\xff")


def fifo(folder: Path) -> None:
    """Put a pipe, from which nothing ever comes, in the place of the weights."""
    import os

    (folder / BASE).unlink()
    os.mkfifo(folder / BASE)


INSIDE = dict.fromkeys(toys.llama_tensors(), "one.safetensors")
BAD_TYPES = {"r": "8", "lora_alpha": [], "bias": 3, "use_dora": "yes", "rank_pattern": {"q": -1}}

MISHAPS |= {
    "config of the wrong types": Mishap(
        config_of("adapter", **BAD_TYPES), "AdapterError",
        ("adapter_config.json", "'r'", "'lora_alpha'", "'bias'", "'use_dora'", "rank_pattern['q']"),
        "Fix adapter_config.json", count=5),
    "config with a broken expression": Mishap(
        config_of("adapter", target_modules="(q_proj"), "AdapterError",
        ("'target_modules'", "a regular expression", "'(q_proj'"), "Fix"),
    "config with flags inside a pattern": Mishap(
        config_of("adapter", rank_pattern={"(?i)q_proj": 3}), "AdapterError",
        ("'rank_pattern'", "a regular expression", "global flags"), "Fix"),
    "config with a rank that is no whole number": Mishap(
        config_of("adapter", rank_pattern={"q_proj": 3.0}), "AdapterError",
        ("rank_pattern['q_proj']", "positive whole number", "3.0"), "Fix"),
    "config that is no JSON": Mishap(
        put("adapter/adapter_config.json", b"{'r': 8}"), "FormatError",
        ("adapter_config.json", "cannot be read as JSON"), "again"),
    "config that is a list": Mishap(
        put("adapter/adapter_config.json", b"[]"), "FormatError", ("adapter_config.json", "object"),
        "again"),
    "config that is missing": Mishap(
        without("adapter/adapter_config.json"), "InputError", ("adapter_config.json is missing",),
        "trained"),
    "weights that are missing": Mishap(
        without(ADAPTER), "InputError", ("weights are missing", "adapter_model.safetensors"),
        "Check the path"),
    "base config that is no JSON": Mishap(
        put("base/config.json", b"{,}"), "FormatError", ("base/config.json", "JSON"), "again"),
    "base config with half a character": Mishap(
        put("base/config.json", b'{"model_type": "\\ud800"}'), "FormatError",
        ("base/config.json", "surrogate"), "again"),
    "base quantized by an unnamed method": Mishap(
        config_of("base", quantization_config={"bits": 4}), "UnsupportedError",
        ("the base is quantized", "unnamed"), "16-bit base"),
    "a folder that is neither, as base": Mishap(
        nothing_of_the_kind, "InputError", ("photos", "is not a checkpoint", "neither"), "Check",
        base="photos"),
    "a folder that is neither, as adapter": Mishap(
        nothing_of_the_kind, "InputError", ("photos", "is not an adapter", "neither"), "Check",
        adapter="photos"),
    "an adapter as base": Mishap(
        lambda _: None, "InputError", ("is not a checkpoint", "found an adapter"), "as ADAPTER",
        base="adapter"),
    "a base as adapter": Mishap(
        lambda _: None, "InputError", ("is not an adapter", "found a full model"), "Give",
        adapter="base"),
    "no such base": Mishap(
        lambda _: None, "InputError", ("nowhere", "no such file or folder"), "Check",
        base="nowhere"),
    "no such adapter": Mishap(
        lambda _: None, "InputError", ("nowhere", "no such file or folder"), "Check",
        adapter="nowhere"),
    "index that leaves the folder": Mishap(
        indexed(INSIDE | {"lm_head.weight": "../adapter/adapter_model.safetensors"}), "FormatError",
        (INDEX, "lm_head.weight", "does not name a weights file", "../adapter/"), "again"),
    "index with an absolute path": Mishap(
        indexed(INSIDE | {"lm_head.weight": "/etc/passwd.safetensors"}), "FormatError",
        ("lm_head.weight", "/etc/passwd"), "again"),
    "index of a shard that is missing": Mishap(
        indexed(INSIDE | {"lm_head.weight": "two.safetensors"}), "FormatError",
        ("a shard is missing", "two.safetensors"), "Download"),
    "index of a tensor that is nowhere": Mishap(
        indexed(INSIDE | {"more.weight": "one.safetensors"}), "FormatError",
        ("more.weight", "a tensor is missing"), "again"),
    "a pipe in the place of the weights": Mishap(
        fifo, "InputError", ("base", "is not a checkpoint"), "Check"),
    "a weight that is no number": Mishap(
        lambda _: None, "UsageError", ("has to be a number", "'much'"), "=0.5", exit_code=2,
        adapter="adapter=much"),
    "a weight that is not finite": Mishap(
        lambda _: None, "UsageError", ("has to be a number", "'inf'"), "=0.5", exit_code=2,
        adapter="adapter=inf"),
}  # fmt: skip
