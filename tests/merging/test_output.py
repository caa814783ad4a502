"""What a merge writes: the base's files with other weights in them, and everything around them."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

import regraft
from merging import toys
from merging.processes import command_here, python
from merging.toys import BF16, INDEX, Q0, tree, write_adapter, write_base, write_json

MERGED = {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qv"}


def header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a file's tensors in order of offset, and its metadata."""
    with path.open("rb") as file:
        fields = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = fields.pop("__metadata__")
    ordered = sorted(fields, key=lambda name: fields[name]["data_offsets"])
    return {name: fields[name] for name in ordered}, metadata


# Weights


def test_only_the_adapted_tensors_change(base: Path, adapter: Path, tmp_path: Path) -> None:
    regraft.merge(base, adapter, tmp_path / "out")
    before, after = toys.load(base), toys.load(tmp_path / "out")
    assert list(before) == list(after)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == MERGED
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(BF16)}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_part_of_a_diffusers_pipeline_keeps_its_config_and_names(
    tmp_path: Path, form: str
) -> None:
    import torch

    base, config = tmp_path / "unet", {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    write_json(base / "config.json", config)
    name = "diffusion_pytorch_model"
    tensors = {"down.0.to_q.weight": toys.draw(8, 8), "down.0.to_q.bias": toys.draw(8)}
    if form == "bin":
        torch.save({n: torch.from_numpy(t) for n, t in tensors.items()}, base / f"{name}.bin")
    else:
        save_file(tensors, base / f"{name}.safetensors", {"format": "pt"})
    adapter = write_adapter(tmp_path / "a", toys.lora("down.0.to_q", 8, 8), target_modules=["to_q"])
    for number, options in enumerate(({}, {"dtype": "bfloat16"}, {"shard_size": 200})):
        out = tmp_path / str(number)
        regraft.merge(base, adapter, out, **options)
        assert toys.read_json(out / "config.json") == config
        found = {path.name.split(".")[0].split("-")[0] for path in out.glob("*.safetensors*")}
        assert found == {name}
        again = regraft.merge(out, adapter, tmp_path / f"{number} again")
        assert len(again.tensors) == 2


def test_the_files_of_a_sharded_base_are_kept(adapter: Path, tmp_path: Path) -> None:
    base, out = toys.write_sharded_base(tmp_path / "sharded"), tmp_path / "out"
    regraft.merge(base, adapter, out)
    names = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    for name in names:
        assert header(out / name) == header(base / name)
        assert header(out / name)[1] == {"format": "pt"}
    index, old = toys.read_json(out / INDEX), toys.read_json(base / INDEX)
    assert index["weight_map"] == old["weight_map"]
    tensors = toys.load(out).values()
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in tensors),
        "total_parameters": sum(tensor.size for tensor in tensors),
    }


def test_a_single_file_needs_no_index(base: Path, adapter: Path, tmp_path: Path) -> None:
    regraft.merge(base, adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md", "regraft"}


@pytest.mark.parametrize(
    ("size", "least", "most"), [("4KB", 3, 12), ("1KB", 10, 21), (900, 10, 21)]
)
def test_the_shard_size_bounds_every_file(
    base: Path, adapter: Path, tmp_path: Path, size: str | int, least: int, most: int
) -> None:
    out = tmp_path / "out"
    regraft.merge(base, adapter, out, shard_size=size)
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert least <= count <= most
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    limit = {"4KB": 4000, "1KB": 1000}.get(str(size), 900)
    for path in files:
        tensors, _ = header(path)
        held = max(entry["data_offsets"][1] for entry in tensors.values())
        assert held <= limit or len(tensors) == 1  # one tensor alone may be larger
    weight_map = toys.read_json(out / INDEX)["weight_map"]
    assert weight_map == {name: path.name for path in files for name in header(path)[0]}
    assert weight_map.keys() == toys.llama_tensors().keys()


def test_a_sharded_base_becomes_one_file_when_asked(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    regraft.merge(toys.write_sharded_base(tmp_path / "sharded"), adapter, out, shard_size="5GB")
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert toys.load(out).keys() == toys.llama_tensors().keys()


@pytest.mark.parametrize(
    ("asked", "stored"), [("float32", "F32"), ("float16", "F16"), ("torch.bfloat16", "BF16")]
)
def test_the_dtype_changes_every_floating_tensor_and_the_config(
    tmp_path: Path, adapter: Path, asked: str, stored: str
) -> None:
    tensors = {**toys.llama_tensors(), "position_ids": np.arange(3, dtype=np.int64)}
    config = {**toys.CONFIG, "torch_dtype": "bfloat16", "vision_config": {"dtype": "bfloat16"}}
    base, out = write_base(tmp_path / "base", tensors, config), tmp_path / "out"
    regraft.merge(base, adapter, out, dtype=asked)
    dtypes = {name: entry["dtype"] for name, entry in header(out / "model.safetensors")[0].items()}
    assert dtypes.pop("position_ids") == "I64"
    assert set(dtypes.values()) == {stored}
    written = toys.read_json(out / "config.json")
    name = asked.removeprefix("torch.")
    assert written == config | {
        "dtype": name, "torch_dtype": name, "vision_config": {"dtype": name},
    }  # fmt: skip


def test_a_config_is_otherwise_as_it_was(base: Path, adapter: Path, tmp_path: Path) -> None:
    odd = {
        **toys.CONFIG,
        "ünïcode": "✓ 模型",
        "rope": {"factor": 1e-06, "big": 12345678901234567890},
    }
    write_json(base / "config.json", odd)
    regraft.merge(base, adapter, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text("utf-8")
    assert list(json.loads(text).items()) == list(odd.items())
    assert "模型" in text
    assert text.endswith("}\n")


# Side files

TRAVELS = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json", "qwen.tiktoken", "LICENSE", "LICENSE.txt",
    "NOTICE", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja",
]  # fmt: skip
STAYS = [
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
    "model.gguf", "adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors",
    "modeling_custom.py", ".git/config", ".gitattributes", "original/params.json",
    "runs/events.out", "checkpoint-5/config.json", "onnx/config.json", "requirements.txt",
    ".cache/huggingface/x.json",
]  # fmt: skip


def put(folder: Path, *names: str, mark: str = "") -> None:
    """Write files that hold their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"is": f"{mark}{name}"}
        path.write_text(json.dumps(content) if name.endswith(".json") else f"{mark}{name}")


def test_side_files_travel_byte_for_byte_and_nothing_else_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    put(base, *TRAVELS, *STAYS, "README.md")
    (base / "linked.txt").symlink_to("merges.txt")
    regraft.merge(base, adapter, tmp_path / "out")
    files = {n: c for n, c in tree(tmp_path / "out").items() if c is not None}
    found = {name: content for name, content in files.items() if "/undo/" not in name}
    own = {"config.json", "model.safetensors", "README.md", "regraft/receipt.json"}
    assert found.keys() - own == {*TRAVELS, "linked.txt"}
    for name in TRAVELS:
        assert found[name] == (base / name).read_bytes()
    assert b"README.md" not in (found["README.md"] or b"")


def test_the_undo_keeps_the_bases_side_files_and_the_adapters_own(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    put(base, "tokenizer.json", "notes.txt", "additional_chat_templates/a.jinja", "old.gguf")
    put(base, "logs/train.log")
    put(adapter, "tokenizer.json", "optimizer.pt", mark="adapter ")
    regraft.merge(base, adapter, tmp_path / "out")
    undo = tmp_path / "out" / "regraft" / "undo"
    kept = {n: c for n, c in tree(undo).items() if c is not None}
    sides = ("config.json", "tokenizer.json", "notes.txt", "additional_chat_templates/a.jinja")
    assert kept.keys() == {
        "patch.safetensors", "undo.json", *(f"base/{name}" for name in sides),
        "adapter-0/adapter_config.json", "adapter-0/adapter_model.safetensors",
    }  # fmt: skip
    for name in sides:
        assert kept[f"base/{name}"] == (base / name).read_bytes()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert kept[f"adapter-0/{name}"] == (adapter / name).read_bytes()
    assert toys.read_json(undo / "undo.json")["left_out"] == ["logs", "old.gguf"]


def test_no_index_of_the_base_survives(base: Path, adapter: Path, tmp_path: Path) -> None:
    put(base, INDEX, "pytorch_model.bin.index.json")
    regraft.merge(base, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_shards_of_any_names_get_an_index_that_loaders_find(adapter: Path, tmp_path: Path) -> None:
    base = toys.write_sharded_base(tmp_path / "sharded")
    index = toys.read_json(base / INDEX)
    others = {old: f"{letter}.safetensors" for old, letter in zip(
        sorted(set(index["weight_map"].values())), "Abc", strict=True
    )}  # fmt: skip
    for old, new in others.items():
        (base / old).rename(base / new)
    index["weight_map"] = {name: others[old] for name, old in index["weight_map"].items()}
    write_json(base / INDEX, index)
    regraft.merge(base, adapter, tmp_path / "out")
    merged = toys.read_json(tmp_path / "out" / INDEX)
    assert set(merged["weight_map"].values()) == set(others.values())
    again = regraft.merge(tmp_path / "out", adapter, tmp_path / "twice")
    assert again.totals.merged > 0


def test_code_travels_only_where_the_config_names_it(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    put(base, "modeling_custom.py", "helper.py")
    put(adapter, "evil.py")
    named = {**toys.CONFIG, "auto_map": {"AutoModel": "modeling_custom.Model"}}
    write_json(base / "config.json", named)
    regraft.merge(base, adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {
        "modeling_custom.py", "helper.py",
    }  # fmt: skip


def test_the_adapters_tokenizer_and_template_win_as_a_whole(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    template, extra = "chat_template.jinja", "additional_chat_templates/"
    both = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", template)
    put(base, *both, "added_tokens.json", "merges.txt", f"{extra}tool_use.jinja", mark="base ")
    put(adapter, *both, f"{extra}rag.jinja", mark="adapter ")
    regraft.merge(base, adapter, tmp_path / "out")
    found = tree(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", template, f"{extra}rag.jinja"):
        assert found[name] == (adapter / name).read_bytes()
    assert found["generation_config.json"] == (base / "generation_config.json").read_bytes()
    assert not {
        "added_tokens.json",
        "merges.txt",
        "additional_chat_templates/tool_use.jinja",
    } & set(found)


@pytest.mark.parametrize(
    "names",
    [
        ("tokenizer.json",), ("added_tokens.json",), ("special_tokens_map.json",),
        ("tokenizer_config.json",), ("tokenizer_config.json", "added_tokens.json"),
    ],
)  # fmt: skip
def test_a_part_of_a_tokenizer_is_laid_over_the_bases(
    base: Path, adapter: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Without a vocabulary and its settings it would not be one by itself."""
    every = ("tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.json")
    for name in every:
        write_json(base / name, {"of": "the base"})
    for name in names:
        write_json(adapter / name, {"of": "the adapter"})
    regraft.merge(base, adapter, tmp_path / "out")
    found = tree(tmp_path / "out")
    for name in {*every, *names}:
        source = adapter if name in names else base
        assert found[name] == (source / name).read_bytes(), name


def test_a_template_alone_leaves_the_bases_tokenizer(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    put(base, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", mark="base ")
    put(adapter, "chat_template.jinja", mark="adapter ")
    regraft.merge(base, adapter, tmp_path / "out")
    found = tree(tmp_path / "out")
    assert found["chat_template.jinja"] == b"adapter chat_template.jinja"
    assert found["tokenizer.json"] == (base / "tokenizer.json").read_bytes()


def test_a_template_inside_the_adapters_tokenizer_config_wins_over_the_bases_file(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    put(base, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", mark="base ")
    put(adapter, "tokenizer.json")
    write_json(adapter / "tokenizer_config.json", {"chat_template": "{{ adapter }}"})
    regraft.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert toys.read_json(tmp_path / "out" / "tokenizer_config.json")["chat_template"]


def test_of_several_adapters_the_first_with_a_tokenizer_gives_it(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    second, third = (write_adapter(tmp_path / name) for name in ("second", "third"))
    put(second, "tokenizer.json", "tokenizer_config.json", mark="second ")
    put(third, "tokenizer.json", "tokenizer_config.json", mark="third ")
    regraft.merge(base, [adapter, second, third], tmp_path / "out")
    found = tree(tmp_path / "out")
    assert found["tokenizer.json"] == (second / "tokenizer.json").read_bytes()


# The model card


def card(out: Path) -> tuple[dict[str, Any], str]:
    """Return a model card's front matter and its text."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", (out / "README.md").read_text(), re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


def test_the_card_names_the_base_the_licence_and_the_command(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: its-own\nlicense_link: https://example.org/l\n"
        "language: [en, de]\npipeline_tag: text-generation\ntags: [secret]\n---\n# Base\n"
    )
    adapter = write_adapter(tmp_path / "style", base_model_name_or_path="org/model")
    done = command_here("merge", base, f"{adapter}=0.5", "-o", tmp_path / "my model")
    assert (done.returncode, done.stderr) == (0, "")
    front, text = card(tmp_path / "my model")
    assert front == {
        "base_model": ["org/model"],
        "base_model_relation": "merge",
        "license": "other",
        "license_name": "its-own",
        "license_link": "https://example.org/l",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["merge", "lora", "regraft"],
    }
    assert "# my model\n" in text
    assert "AutoModelForCausalLM.from_pretrained(" in text
    assert "| adapter 1 | `style` | 0.5 |" in text
    assert "4 of 21 tensors were merged" in text
    assert "```\nregraft merge base style=0.5 --out 'my model'\n```" in text
    assert str(tmp_path) not in text  # a card is published, and paths are nobody else's business


@pytest.mark.parametrize(
    "readme", ["no front matter", "---\n: [broken\n---\n", "---\n- list\n---\n"]
)
def test_a_card_that_cannot_be_read_hands_nothing_on(
    base: Path, adapter: Path, tmp_path: Path, readme: str
) -> None:
    (base / "README.md").write_text(readme)
    regraft.merge(base, adapter, tmp_path / "out")
    front, _ = card(tmp_path / "out")
    assert "license" not in front
    assert "base_model" not in front  # nobody named one that the Hub has
    assert front["library_name"] == "transformers"


# Modes of the files


@pytest.mark.parametrize(
    ("umask", "file", "folder"),
    [(0o027, 0o640, 0o750), (0o022, 0o644, 0o755), (0o002, 0o664, 0o775)],
)
def test_modes_follow_the_umask(
    base: Path, adapter: Path, tmp_path: Path, umask: int, file: int, folder: int
) -> None:
    put(base, "tokenizer.json", "additional_chat_templates/a.jinja")
    (base / "tokenizer.json").chmod(0o600)
    out = tmp_path / "new" / "out"
    usual = os.umask(umask)
    try:
        regraft.merge(base, adapter, out)
    finally:
        os.umask(usual)
    paths = [out.parent, out, *out.rglob("*")]
    undo = out / "regraft" / "undo"
    assert {undo, undo / "patch.safetensors", undo / "base" / "tokenizer.json"} < set(paths)
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (folder if path.is_dir() else file), path


# Loading


LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
found = {}
for folder in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto")
    wrong = sum(len(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weight = model.model.layers[0].self_attn.q_proj.weight
    found[folder.rpartition("/")[2]] = [wrong, str(weight.dtype), float(weight.double().sum())]
assert "peft" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_it_loads_where_peft_is_not_installed(base: Path, adapter: Path, tmp_path: Path) -> None:
    sharded = toys.write_sharded_base(tmp_path / "sharded-base")
    regraft.merge(base, adapter, tmp_path / "plain")
    regraft.merge(sharded, adapter, tmp_path / "sharded")
    regraft.merge(base, adapter, tmp_path / "resharded", shard_size="2KB", dtype="float32")
    regraft.merge(base / "model.safetensors", adapter, tmp_path / "single", dtype="float16")
    outs = {"plain": "bfloat16", "sharded": "bfloat16", "resharded": "float32", "single": "float16"}
    done = python(LOAD, *(tmp_path / name for name in outs), without=["peft"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, dtype in outs.items():
        wrong, loaded, total = found[name]
        assert (wrong, loaded) == (0, f"torch.{dtype}")
        expected = toys.load(tmp_path / name)[f"{Q0}.weight"].astype(np.float64).sum()
        assert total == pytest.approx(expected, rel=1e-12)


def test_the_reference_library_reads_every_file(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    regraft.merge(toys.write_sharded_base(tmp_path / "sharded"), adapter, out)
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(header(path)[0])
