"""Saving an adapter: PEFT's format, whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import regraft
from merging.processes import python
from regraft.errors import AdapterError, BusyError, OutputExistsError, UsageError
from regraft.formats.adapter_files import open_adapter
from regraft.formats.hub import locate
from regraft.runtime.model.fingerprint import KEY
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter, adapter_of
from regraft.runtime.saving.files import write_adapter
from regraft.runtime.saving.saved import Saved, of_live, with_base, write_saved
from regraft.testing import adapters as made
from regraft.testing.zoo import make_base, make_model

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def small(rank: int = 2, modules: int = 2, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the tensors of an adapter of a few kilobytes."""
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    tensors = {}
    for layer in range(modules):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj."
        tensors[f"{key}lora_A.weight"] = torch.randn(rank, 27, generator=generator)
        tensors[f"{key}lora_B.weight"] = torch.randn(24, rank, generator=generator)
    return config, tensors


def peft_model(architecture: str = "llama", **settings: Any) -> PeftModel:
    """Return a PEFT model whose adapter has been trained, so to speak."""
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]} | settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make_model(architecture), config)
    made.perturb(model, 3)
    return model


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -- a PEFT model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True, "task_type": "CAUSAL_LM"}),
        ("llama", {"bias": "all", "modules_to_save": ["lm_head"]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [1, 5]}}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("toynet", {"target_modules": ["conv1d", "conv2d", "attention"]}),
    ],
)
def test_a_peft_model_is_saved_as_peft_saves_it(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    model = peft_model(architecture, **settings)
    regraft.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    configs = [json.loads((tmp_path / f / CONFIG).read_text()) for f in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_embeddings_that_nobody_trained_stay_in_the_base(tmp_path: Path) -> None:
    model = peft_model("gemma3", target_modules=["embed_tokens", "q_proj"])
    regraft.save(model, tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs = get_peft_model_state_dict(model)
    extra = theirs.keys() - found.keys()
    assert extra
    assert all(key.endswith("base_layer.weight") for key in extra)
    assert any("lora_embedding_A" in key for key in found)


def test_embeddings_that_were_trained_are_saved(tmp_path: Path) -> None:
    model = peft_model()
    model.base_model.model.model.embed_tokens.weight.requires_grad_(True)
    regraft.save(model, tmp_path)
    key = "base_model.model.model.embed_tokens.weight"
    assert torch.equal(load_file(tmp_path / WEIGHTS)[key], model.state_dict()[key])


def test_embeddings_of_a_grown_vocabulary_are_saved(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    model = made.load_base(base)
    model.resize_token_embeddings(67)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    regraft.save(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found["base_model.model.model.embed_tokens.weight"].shape[0] == 67
    assert found["base_model.model.lm_head.weight"].shape[0] == 67


def test_one_of_several_adapters_is_saved_by_its_name(tmp_path: Path) -> None:
    model = peft_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    regraft.save(model, tmp_path / "active")
    regraft.save(model, tmp_path / "other", name="other")
    assert all("k_proj" in key for key in load_file(tmp_path / "other" / WEIGHTS))
    assert not any("k_proj" in key for key in load_file(tmp_path / "active" / WEIGHTS))
    with pytest.raises(UsageError, match="no adapter of this name"):
        regraft.save(model, tmp_path / "none", name="third")
    assert not (tmp_path / "none").exists()


def test_adapters_of_transformers_own_integration_are_saved(tmp_path: Path) -> None:
    model = make_model("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    regraft.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert ours.keys() == theirs.keys()


def test_peft_loads_what_was_saved(tmp_path: Path) -> None:
    model = peft_model("llama", use_rslora=True)
    regraft.save(model, tmp_path)
    again = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_what_has_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter to save"):
        regraft.save(object(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- an adapter in memory --------------------------------------------------------------------------


def live(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LiveAdapter:
    return LiveAdapter("a", config, adapter_of("a", config, tensors), tensors)


def test_an_adapter_in_memory_comes_back_with_the_fingerprint_of_its_base(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config._name_or_path = "org/base"
    model.config._commit_hash = "c0ffee"
    config, tensors = small()
    write_saved(of_live(live(config, tensors), LiveBase(model), None), tmp_path / "out")
    files = open_adapter(locate(tmp_path / "out", kind="adapter"))
    assert files.config["base_model_name_or_path"] == "org/base"
    assert files.config["revision"] == "c0ffee"
    assert set(files.metadata) == {"format", KEY}
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_an_adapter_without_its_base_keeps_its_metadata(tmp_path: Path) -> None:
    config, tensors = small()
    adapter = live(config, tensors)
    adapter.metadata = {"format": "pt", KEY: "what it was"}
    regraft.save(adapter, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == adapter.metadata


def test_r8_on_q_and_v_of_a_7b_model_takes_less_than_10_mb_in_bfloat16(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig())  # the sizes of Llama 2 7B
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    tensors = {}
    for layer in range(32):
        for module in config["target_modules"]:
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}."
            tensors[f"{key}lora_A.weight"] = torch.ones(8, 4096)
            tensors[f"{key}lora_B.weight"] = torch.ones(4096, 8)
    saved = of_live(live(config, tensors), LiveBase(base), None)
    write_saved(saved, tmp_path / "out", dtype="bfloat16")
    assert sum(t.numel() for t in tensors.values()) == 4_194_304
    assert sum(len(file) for file in content(tmp_path / "out").values()) < 10e6


# -- the files -------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    config, tensors = small()
    turned = dict(reversed(tensors.items()))
    write_adapter(tmp_path / "a", config, tensors, metadata={"x": "1", "y": "2"})
    write_adapter(tmp_path / "b", config, turned, metadata={"y": "2", "x": "1"})
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with_set = {**config, "target_modules": {"q_proj", "a", "b", "c"}}
    write_adapter(tmp_path / "c", with_set, tensors)
    assert json.loads((tmp_path / "c" / CONFIG).read_text())["target_modules"] == [
        *("a", "b", "c", "q_proj")
    ]


def test_the_config_is_written_as_peft_writes_it(tmp_path: Path) -> None:
    config, tensors = small()
    write_adapter(tmp_path, config | {"inference_mode": False}, tensors)
    expected = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True)
    assert (tmp_path / CONFIG).read_text() == expected


def test_a_dtype_is_for_the_factors_and_magnitudes_stay(tmp_path: Path) -> None:
    model = peft_model("llama", use_dora=True, modules_to_save=["lm_head"])
    regraft.save(model, tmp_path, dtype="bf16")
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        wide = "magnitude" in key
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    config, tensors = small()
    first = next(iter(tensors))
    tensors[first][1, 2] = value
    with pytest.raises(AdapterError, match="not finite") as caught:
        write_adapter(tmp_path / "out", config, tensors)
    assert first in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_values_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    config, tensors = small()
    tensors[next(iter(tensors))][0, 0] = 1e5
    with pytest.raises(AdapterError, match="float16"):
        write_adapter(tmp_path / "out", config, tensors, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_stale_bin_file_is_removed_and_all_else_stays(tmp_path: Path) -> None:
    config, tensors = small()
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    (tmp_path / "training_args.bin").write_bytes(b"kept")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events").write_bytes(b"kept too")
    write_adapter(tmp_path, config, tensors)
    write_adapter(tmp_path, config | {"lora_alpha": 7}, tensors)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "training_args.bin", "runs"}
    assert (tmp_path / "runs" / "events").read_bytes() == b"kept too"
    assert [p.name for p in tmp_path.parent.iterdir() if "saving" in p.name] == []


@pytest.mark.parametrize("alpha", [4, 9], ids=["the same config", "another config"])
@pytest.mark.parametrize("here", [False, True], ids=["swapped", "file by file"])
def test_a_stale_bin_file_is_removed_from_beside_an_adapter_that_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: int, here: bool
) -> None:
    config, tensors = small()
    config = config | {"lora_alpha": 4}
    folder = write_adapter(tmp_path / "a", config, tensors)
    (folder / "adapter_model.bin").write_bytes(b"old")
    if here:  # which cannot be swapped
        monkeypatch.chdir(folder)
    write_adapter(folder, config | {"lora_alpha": alpha}, tensors)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert open_adapter(locate(folder, kind="adapter")).config["lora_alpha"] == alpha


def test_an_adapter_is_replaced_only_where_it_may_be(tmp_path: Path) -> None:
    model = peft_model()
    regraft.save(model, tmp_path / "a")
    with pytest.raises(OutputExistsError, match="an adapter already"):
        regraft.save(model, tmp_path / "a", overwrite=False)
    base = make_base("llama", tmp_path / "base")
    with pytest.raises(OutputExistsError, match="full model"):
        regraft.save(model, base)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        regraft.save(model, tmp_path / "file")


def test_the_current_folder_can_be_saved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = small()
    monkeypatch.chdir(tmp_path)
    for alpha in (1, 2):
        write_adapter(".", config | {"lora_alpha": alpha}, tensors)
        assert {path.name for path in Path().iterdir()} == {CONFIG, WEIGHTS}
    assert json.loads(Path(CONFIG).read_text())["lora_alpha"] == 2


def test_two_saves_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    import fcntl

    config, tensors = small()
    (tmp_path / ".out.saving").mkdir()
    fd = os.open(tmp_path / ".out.saving", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BusyError):
        write_adapter(tmp_path / "out", config, tensors)
    os.close(fd)
    write_adapter(tmp_path / "out", config, tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    config, tensors = small()
    for _ in range(2):
        write_adapter(tmp_path, config, tensors, tokenizer=fast)
        assert {CONFIG, WEIGHTS, "tokenizer.json"} < {path.name for path in tmp_path.iterdir()}


def test_a_folder_whose_name_is_not_utf8_is_saved_to_with_card_and_tokenizer(
    tmp_path: Path,
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    config, tensors = small()
    folder = tmp_path / os.fsdecode(b"x\xff")
    write_saved(Saved({**config, "task_type": "CAUSAL_LM"}, tensors), folder, tokenizer=fast)
    assert {CONFIG, WEIGHTS, CARD, "tokenizer.json"} < {path.name for path in folder.iterdir()}
    assert 'from_pretrained(model, "x\\udcff")' in (folder / CARD).read_text("utf-8")
    assert open_adapter(locate(folder, kind="adapter")).config["r"] == config["r"]


def test_a_pipe_in_place_of_a_card_is_not_waited_for(tmp_path: Path) -> None:
    config, tensors = small()
    os.mkfifo(tmp_path / CARD)
    write_adapter(tmp_path, config, tensors, card="new")
    assert (tmp_path / WEIGHTS).is_file()


# -- the card --------------------------------------------------------------------------------------


def test_the_card_says_what_the_hub_and_people_want(tmp_path: Path) -> None:
    model = peft_model(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model.get_base_model().config._name_or_path = "org/base"
    regraft.save(model, tmp_path / "mine", base_revision="v1.2")
    text = (tmp_path / "mine" / CARD).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "org/base"
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    assert {"lora", "regraft", "base_model:adapter:org/base"} <= set(front["tags"])
    size = sum(t.nbytes for t in load_file(tmp_path / "mine" / WEIGHTS).values())
    for said in (
        *("| rank | 3 |", "| alpha | 5 |", "`q_proj`, `v_proj`", "`lm_head`", "`v1.2`"),
        *('regraft.attach(model, "mine")', "PeftModel.from_pretrained", "regraft merge org/base"),
        f"{size / 1e6:.2f} MB",
    ):
        assert said in text


def test_a_card_that_somebody_wrote_is_kept(tmp_path: Path) -> None:
    model = peft_model()
    regraft.save(model, tmp_path)
    made_here = (tmp_path / CARD).read_text()
    (tmp_path / CARD).write_text("My adapter.")
    regraft.save(model, tmp_path)
    assert (tmp_path / CARD).read_text() == "My adapter."
    (tmp_path / CARD).unlink()
    model.save_pretrained(tmp_path)
    regraft.save(model, tmp_path)
    assert (tmp_path / CARD).read_text() == made_here


# -- killed ----------------------------------------------------------------------------------------

KILLED = """
import gc, json, os, shutil, sys
from pathlib import Path
import torch
from regraft.runtime.saving import files
from regraft.system import renaming

changes = True

def tensors(value):
    key = "base_model.model.q_proj."
    return {key + "lora_A.weight": torch.full((2, 3), value),
            key + "lora_B.weight": torch.full((5, 2), value)}

def config(value):
    return {"peft_type": "LORA", "lora_alpha": value if changes else 1}

def killing(function, left):
    def step(*args, **kwargs):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        return function(*args, **kwargs)
    return step

def save_and_die(folder, steps):
    left = [steps]
    for name in ("open", "fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir", "write"):
        setattr(os, name, killing(getattr(os, name), left))
    renaming.kernel_rename = killing(renaming.kernel_rename, left)
    files.write_adapter(folder, config(2.0), tensors(2.0), card="Saved by")
    os._exit(0)

def run(root, inside):
    for steps in range(1000):
        folder = root / f"a{steps}"
        files.write_adapter(folder, config(1.0), tensors(1.0))
        (folder / "runs").mkdir()
        (folder / "runs" / "log").write_text("kept")
        os.chdir(folder if inside else root)
        child = os.fork()
        if child == 0:
            save_and_die(folder, steps)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 9:
            assert code == 0 and steps > 12, (code, steps)
            return

gc.collect()
gc.freeze()  # a child that looked at all that is imported would make pages of its own of it
gc.disable()
for mode in ("same", "changed", "inside"):
    changes = mode != "same"
    run(Path(sys.argv[1]) / mode, mode == "inside")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders of adapters whose replacement was killed at every step, by kind."""
    root = tmp_path_factory.mktemp("killed")
    for mode in ("same", "changed", "inside"):
        (root / mode).mkdir()
    done = python(KILLED, root)
    assert done.returncode == 0, done.stderr
    return root


def alpha_and_value(folder: Path) -> tuple[float, float]:
    values = {v for t in load_file(folder / WEIGHTS).values() for v in t.flatten().tolist()}
    assert len(values) == 1
    return json.loads((folder / CONFIG).read_text())["lora_alpha"], values.pop()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [False, True])
def test_a_kill_at_any_step_leaves_the_old_adapter_or_the_new_one(
    killed: Path, changes: bool
) -> None:
    seen, root = set(), killed / ("changed" if changes else "same")
    for folder in sorted(root.glob("a*")):
        alpha, value = alpha_and_value(folder)
        assert alpha == (value if changes else 1)
        assert (folder / "runs" / "log").read_text() == "kept"
        seen.add(value)
        config, tensors = small()
        write_adapter(folder, config, tensors)  # goes on from whatever is left
        assert load_file(folder / WEIGHTS).keys() == tensors.keys()
    assert seen == {1.0, 2.0}
    assert [path for path in root.iterdir() if "saving" in path.name] == []


@pytest.mark.slow
def test_where_folders_cannot_be_swapped_a_kill_leaves_no_mix(killed: Path) -> None:
    without = 0
    for folder in (killed / "inside").glob("a*"):
        if (folder / CONFIG).exists():
            alpha, value = alpha_and_value(folder)
            assert alpha == value
        else:
            without += 1
    assert without > 0


# -- what is attached ------------------------------------------------------------------------------


def test_an_attached_model_and_its_handle_are_saved_by_the_active_adapter(tmp_path: Path) -> None:
    model = make_model("llama")
    adapters = regraft.attach(model, regraft.LoraConfig(target_modules=["q_proj"]), "first")
    adapters.add_adapter("second", regraft.LoraConfig(target_modules=["v_proj"]))
    regraft.save(model, tmp_path / "model")
    regraft.save(adapters, tmp_path / "handle")
    regraft.save(adapters, tmp_path / "second", name="second")
    assert content(tmp_path / "model").keys() == content(tmp_path / "handle").keys()
    paths = [tmp_path / folder / WEIGHTS for folder in ("model", "handle", "second")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert all("v_proj" in key for key in load_file(paths[2]))
    adapters.set_adapter(["first", "second"])
    with pytest.raises(UsageError, match="several adapters"):
        regraft.save(model, tmp_path / "none")


def test_another_base_is_told_when_the_adapter_comes_back(tmp_path: Path) -> None:
    model = make_model("llama")
    regraft.attach(model, regraft.LoraConfig(target_modules=["q_proj"]), "mine")
    regraft.save(model, tmp_path)
    other = make_model("llama")
    for parameter in other.parameters():
        parameter.data = parameter.data.roll(1, -1)
    with pytest.warns(regraft.BaseMismatchWarning, match="trained on other weights"):
        regraft.attach(other, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", regraft.BaseMismatchWarning)
        regraft.attach(make_model("llama"), tmp_path)
        regraft.attach(make_model("llama").bfloat16(), tmp_path)


def test_the_fingerprint_is_of_the_base_and_not_of_what_was_merged_into_it(tmp_path: Path) -> None:
    made_on = peft_model()
    regraft.save(made_on, tmp_path / "a")
    model = make_model("llama")
    adapters = regraft.attach(model, tmp_path / "a", "a")
    adapters.merge_adapter("a")
    regraft.save(adapters, tmp_path / "b", name="a")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def fingerprint_in(folder: Path) -> str | None:
    """Return the fingerprint that an adapter's file carries."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return (file.metadata() or {}).get(KEY)


@pytest.mark.parametrize("merged", ["a", "b"])
def test_saved_while_adapters_are_merged_it_gets_no_fingerprint_of_them(
    tmp_path: Path, merged: str
) -> None:
    for seed, name in enumerate("ab"):
        config, tensors = small(seed=seed)
        regraft.save(live(config, tensors), tmp_path / name)  # without a base
    model = make_model("llama")
    adapters = regraft.attach(model, tmp_path / "a", "a")
    adapters.load_adapter(tmp_path / "b", "b")
    regraft.save(adapters, tmp_path / "before", name="a")
    adapters.merge_adapter(merged)
    regraft.save(adapters, tmp_path / "while", name="a")
    assert fingerprint_in(tmp_path / "while") is None
    with adapters.disable_adapter():
        regraft.save(adapters, tmp_path / "disabled", name="a")
    adapters.unmerge_adapter()
    regraft.save(adapters, tmp_path / "after", name="a")
    expected = fingerprint_in(tmp_path / "before")
    assert expected is not None
    assert fingerprint_in(tmp_path / "disabled") == fingerprint_in(tmp_path / "after") == expected


def test_trained_on_another_base_it_carries_that_ones_fingerprint(tmp_path: Path) -> None:
    regraft.save(peft_model(), tmp_path / "first")
    other = make_model("llama")
    for parameter in other.parameters():
        parameter.data = parameter.data.roll(1, -1)
    for is_trainable, name in ((False, "used"), (True, "trained")):
        with pytest.warns(regraft.BaseMismatchWarning):
            adapters = regraft.attach(other, tmp_path / "first", is_trainable=is_trainable)
        regraft.save(adapters, tmp_path / name)
        adapters.detach()
    assert fingerprint_in(tmp_path / "used") == fingerprint_in(tmp_path / "first")
    assert fingerprint_in(tmp_path / "trained") not in (None, fingerprint_in(tmp_path / "first"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", regraft.BaseMismatchWarning)
        regraft.attach(other, tmp_path / "trained")


@pytest.mark.parametrize(
    ("source", "heading"),
    [("mine.tmp", "mine"), ("tmp-checkpoint-5", "checkpoint-5"), ("tmpab12_xyz", "adapter")],
)
def test_a_card_does_not_name_a_folder_that_is_temporary(
    tmp_path: Path, source: str, heading: str
) -> None:
    regraft.save(peft_model(), tmp_path / source)
    text = (tmp_path / source / CARD).read_text()
    assert f"\n# {heading}\n" in text
    assert "tmp" not in text


def test_a_card_names_no_path_and_the_repository_of_a_cached_base(tmp_path: Path) -> None:
    model = peft_model()
    for base, named in [
        (str(tmp_path / "models" / "base"), None),
        ("/cache/models--org--base/snapshots/0123abc", "org/base"),
    ]:
        model.get_base_model().config._name_or_path = base
        model.peft_config["default"].base_model_name_or_path = base
        regraft.save(model, tmp_path / "mine")
        text = (tmp_path / "mine" / CARD).read_text()
        assert yaml.safe_load(text.split("---")[1]).get("base_model") == named
        assert f"regraft merge {named or 'base'} mine" in text
        assert json.loads((tmp_path / "mine" / CONFIG).read_text())["base_model_name_or_path"] == (
            base
        )


# -- loading without being told the class ----------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["save", "trainer", "loaded"])
def test_an_adapter_without_a_task_type_loads_as_peft_infers_it(
    tmp_path: Path, base_folder: Path, way: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    adapters = regraft.attach(model, regraft.LoraConfig(target_modules=["q_proj"]))
    if way == "trainer":
        adapters.for_trainer().save_pretrained(tmp_path / "mine")
    else:
        regraft.save(model, tmp_path / "mine")
    if way == "loaded":
        fields = json.loads((tmp_path / "mine" / CONFIG).read_text()) | {"auto_mapping": None}
        (tmp_path / "mine" / CONFIG).write_text(json.dumps(fields))
        adapters.set_adapter(None)
        adapters.delete_adapter(adapters.names[0])
        adapters.load_adapter(tmp_path / "mine", "mine")
        regraft.save(model, tmp_path / "mine")
    mapping = json.loads((tmp_path / "mine" / CONFIG).read_text())["auto_mapping"]
    assert mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    for auto in (AutoPeftModel, AutoPeftModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "mine")
        assert type(loaded.get_base_model()).__name__ == "LlamaForCausalLM"
    assert "from transformers import LlamaForCausalLM" in (tmp_path / "mine" / CARD).read_text()


def test_a_task_type_and_a_class_of_ones_own_need_no_mapping(base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    assert with_base({"task_type": "CAUSAL_LM"}, model, None).get("auto_mapping") is None
    model.__class__ = type("Own", (type(model),), {"__module__": __name__})
    globals()["Own"] = type(model)
    assert with_base({}, model, None)["auto_mapping"] is None
