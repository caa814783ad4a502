"""Adapters in other programs' layouts are named for what they are, and nothing is asked of the user
that would not help."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import regraft
from merging import toys
from regraft.adapters.dialects.registry import DIALECTS

Q = "model.layers.0.self_attn.q_proj"
A, B = np.zeros((2, 16), np.float32), np.zeros((16, 2), np.float32)

LONE = {
    "LitGPT": {"transformer.h.0.attn.attn.lora_A": A, "transformer.h.0.attn.attn.lora_B": B},
    "torchtune": {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B},
    "mistral-finetune": {"layers.0.attention.wq.lora_A.weight": A,
                         "layers.0.attention.wq.lora_B.weight": B},
    "LyCORIS": {"lycoris_img_in.lokr_w1": A, "lycoris_img_in.lokr_w2": B},
    "ComfyUI": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": A,
                "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": B},
    "XLabs": {"double_blocks.0.processor.qkv_lora1.down.weight": A,
              "double_blocks.0.processor.qkv_lora1.up.weight": B},
}  # fmt: skip

IN_PEFTS_FILES = {
    "Tinker": {"base_model.model.model.unembed_tokens.lora_A.weight": A,
               "base_model.model.model.unembed_tokens.lora_B.weight": B},
    "Tinker's layout": {f"base_model.model.model.layers.0.mlp.experts.w1.lora_{n}.weight":
                        np.zeros((2, 4, 4), np.float32) for n in "AB"},
    "NeMo Automodel": {f"base_model.model.model.layers.0.mlp.experts.lora_{n}":
                       np.zeros((2, 4, 4), np.float32) for n in ("gate_and_up_A", "down_B")},
    "Megatron": {"model.layers.0.self_attn.linear_qkv.adapter.linear_in.weight": A},
}  # fmt: skip

BY_FILE = {
    "adapter_model.pt": "torchtune",
    "lit_model.pth.lora": "LitGPT",
    "checkpoint.nemo": "Megatron",
    "pytorch_model_fsdp_0/__0_0.distcp": "FSDP",
    "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt": "DeepSpeed",
    "adapter_model.safetensors.index.json": "several files",
}


SHOWN = {dialect.shown for dialect in DIALECTS.values() if dialect.reads}


def is_read(name: str) -> bool:
    """Whether adapters of a dialect are read, which then need no other refusal than a sound one."""
    return any(name in shown for shown in SHOWN)


def said_of(base: Path, adapter: Path, refusal: type[Exception] = regraft.UnsupportedError) -> str:
    """Return what check and inspect say, which has to be a refusal in both."""
    said = []
    for ask in (lambda: regraft.inspect(adapter), lambda: regraft.check(base, adapter)):
        with pytest.raises(refusal) as caught:
            ask()
        said.append(str(caught.value))
    assert all("Copy" not in text and "remove" not in text for text in said)
    return " ".join(said)


@pytest.mark.parametrize("name", LONE)
def test_a_file_of_another_program_is_named(tmp_path: Path, base: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "weights.safetensors"
    save_file(LONE[name], file)
    refusal = regraft.InputError if is_read(name) else regraft.UnsupportedError
    assert name in said_of(base, file, refusal)
    assert name in said_of(base, file.parent, refusal)


@pytest.mark.parametrize("name", [name for name in IN_PEFTS_FILES if not is_read(name)])
def test_other_tensors_under_pefts_file_names_are_named(
    tmp_path: Path, base: Path, name: str
) -> None:
    adapter = toys.write_adapter(tmp_path / "a", IN_PEFTS_FILES[name])
    report = regraft.check(base, adapter)
    assert [name in problem.what for problem in report.problems] == [True]
    assert "modules_to_save" not in report.problems[0].hint


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("file", BY_FILE)
def test_a_folder_is_named_by_what_lies_in_it(
    tmp_path: Path, base: Path, file: str, with_config: bool
) -> None:
    place = tmp_path / "a" / file
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    if with_config:
        toys.write_json(tmp_path / "a" / "adapter_config.json", toys.adapter_config())
    if is_read(BY_FILE[file]):  # what is in the file, and beside it, is then found wanting
        with pytest.raises(regraft.InputError, match=rf"{BY_FILE[file]}|{file}"):
            regraft.check(base, tmp_path / "a")
        return
    with pytest.raises(regraft.UnsupportedError, match=BY_FILE[file]):
        regraft.check(base, tmp_path / "a")


def test_a_gguf_adapter_is_no_model(tmp_path: Path, base: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", A)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    assert "GGUF LoRA" in said_of(base, path)


def test_rows_of_added_tokens_beside_an_adapter_are_not_passed_over(
    tmp_path: Path, base: Path
) -> None:
    adapter = toys.write_adapter(tmp_path / "a")
    save_file({"input_embeddings": A}, adapter / "new_embeddings.safetensors")
    with pytest.raises(regraft.UnsupportedError, match=r"new_embeddings\.safetensors"):
        regraft.check(base, adapter)


def write_run(folder: Path, *names: str) -> Path:
    """Write a folder of a run with an adapter of another scale in each subfolder."""
    for number, name in enumerate(names):
        toys.write_adapter(folder / name, lora_alpha=number + 1)
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "taken"),
    [(["checkpoint-9"], "checkpoint-9"), (["sql"], "sql"),
     (["checkpoint-9", "checkpoint-10", "checkpoint-100"], "checkpoint-100")],
)  # fmt: skip
def test_the_adapter_of_a_run_is_found_and_said(
    tmp_path: Path, base: Path, names: list[str], taken: str
) -> None:
    run = write_run(tmp_path / "run", *names)
    receipt = regraft.merge(base, run, tmp_path / "out")
    assert any(f"the adapter in {taken} is taken" in warning for warning in receipt.warnings)
    expected = regraft.merge(base, run / taken, tmp_path / "expected")
    assert receipt.tensors == expected.tensors
    with pytest.raises(regraft.InputError, match="below") as caught:
        regraft.inspect(run)
    assert taken in str(caught.value)


def test_several_adapters_that_are_no_checkpoints_have_to_be_named(
    tmp_path: Path, base: Path
) -> None:
    run = write_run(tmp_path / "run", "json", "sql")
    with pytest.raises(regraft.InputError, match="holds several adapters"):
        regraft.check(base, run)
    assert regraft.check(base, run / "sql").ok


def test_a_weights_file_is_named_once_in_messages(tmp_path: Path, base: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a", {f"{toys.PREFIX}{Q}.lora_A.weight": A})
    problems: Any = regraft.check(base, adapter / "adapter_model.safetensors").problems
    assert problems[0].where == str(adapter / "adapter_model.safetensors")


WRAPPED = {
    "compiled": "base_model.model._orig_mod.{}",
    "FSDP around all": "_fsdp_wrapped_module.base_model.model.{}",
    "FSDP inside": "base_model.model.model._fsdp_wrapped_module.layers.0.self_attn.q_proj",
    "checkpointing": "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj",
    "DDP": "module.base_model.model.{}",
    "several": "module.base_model.model.model.layers.0._fsdp_wrapped_module."
               "_checkpoint_wrapped_module.self_attn.q_proj",
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_of_training_are_taken_off_names(tmp_path: Path, base: Path, how: str) -> None:
    plain = toys.write_adapter(tmp_path / "plain")
    tensors = {
        WRAPPED[how].format(Q) + key.partition(Q)[2]: value
        for key, value in toys.lora(Q, toys.HIDDEN, toys.HIDDEN).items()
    }
    adapter = toys.write_adapter(tmp_path / "a", tensors)
    expected = toys.write_adapter(tmp_path / "b", toys.lora(Q, toys.HIDDEN, toys.HIDDEN))
    found = regraft.merge(base, adapter, tmp_path / "out").tensors
    assert found == regraft.merge(base, expected, tmp_path / "expected").tensors
    shutil.rmtree(plain)


def test_wrappers_are_taken_off_the_names_in_a_config(tmp_path: Path, base: Path) -> None:
    name = f"model._fsdp_wrapped_module.{Q.removeprefix('model.')}"
    config = {"target_modules": [name], "rank_pattern": {name: toys.RANK}, "r": 8}
    adapter = toys.write_adapter(tmp_path / "a", toys.lora(Q, toys.HIDDEN, toys.HIDDEN), **config)
    assert regraft.check(base, adapter).ok


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "base", {"module.proj.weight": toys.draw(4, 6)}, {})
    adapter = toys.write_adapter(
        tmp_path / "a", toys.lora("module.proj", 4, 6), target_modules=["proj"]
    )
    assert regraft.check(base, adapter).ok


def test_a_base_below_a_folder_called_gguf_is_not_taken_for_a_quantized_one(
    tmp_path: Path, base: Path
) -> None:
    moved = shutil.copytree(base, tmp_path / "gguf" / "base")
    adapter = toys.write_adapter(tmp_path / "a", base_model_name_or_path=str(moved))
    assert regraft.check(moved, adapter).warnings == ()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/model-bnb-4bit"
    toys.write_json(adapter / "adapter_config.json", config)
    assert any("quantized" in warning for warning in regraft.check(moved, adapter).warnings)
