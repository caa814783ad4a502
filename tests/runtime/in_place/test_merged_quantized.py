"""Merges into weights that bitsandbytes has quantized have the codes of merges on files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes")

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import regraft
from regraft.errors import MismatchError
from regraft.merging.compute.requantize import Coder
from regraft.runtime.in_place import quantized
from regraft.runtime.model.live_base import LiveBase
from regraft.testing import zoo
from regraft.testing.adapters import make_adapter
from runtime.in_memory import adapters_of, assert_same, load, merge, state_bits, swap

IDS = torch.tensor([[3, 4, 5, 6, 7]])

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


class Room:
    """Bases, adapters and merged folders, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plain(self) -> Path:
        """Return a base; layers have whole blocks of scales, and whole packs of the CPU's."""
        folder = self.folder / "plain"
        if not folder.exists():
            torch.manual_seed(zoo.SEED)
            config = LlamaConfig(
                vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, bos_token_id=1,
                eos_token_id=2, pad_token_id=0,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
            zoo.randomize(model)
            model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    def base(self, kind: str) -> Path:
        """Return the base in a format."""
        folder = self.folder / kind
        if not folder.exists():
            how = BitsAndBytesConfig(**FORMATS[kind], bnb_4bit_compute_dtype=torch.bfloat16)
            load(self.plain(), quantization_config=how, device_map="cpu").save_pretrained(folder)
        return folder

    def adapter(self, name: str) -> Path:
        """Return an adapter."""
        folder = self.folder / name
        if not folder.exists():
            make_adapter(self.plain(), folder, LoraConfig(r=4, lora_alpha=6, **ADAPTERS[name]))
        return folder

    def merged(self, kind: str, name: str, **choices: Any) -> Any:
        """Return the model that the merge of files gives."""
        label = "-".join(map(str, choices.values())) or "out"
        folder = self.folder / f"{kind}-{name}-{label}"
        if not folder.exists():
            regraft.merge(self.base(kind), self.adapter(name), folder, undo=False, **choices)
        return load(folder, device_map="cpu")

    def live(self, kind: str) -> Any:
        """Return the base as a live model."""
        return load(self.base(kind), device_map="cpu")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """Return the maker of this module's files."""
    return Room(tmp_path_factory.mktemp("quantized"))


def answers(model: nn.Module) -> torch.Tensor:
    """Return what a model says; on some processors this packs the codes of 4-bit weights anew."""
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["fresh", "after-forward"])
@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("kind", FORMATS)
def test_codes_are_those_of_files_and_come_back(
    room: Room, kind: str, name: str, after: bool
) -> None:
    model, files = room.live(kind), room.merged(kind, name, quantize="keep")
    base, before = LiveBase(model), state_bits(model)
    if after:
        first = answers(model)
    merged = merge(base, adapters_of([room.adapter(name)]))
    assert_same(state_bits(model), state_bits(files))
    assert torch.equal(answers(model), answers(files))
    merged.unmerge()
    assert_same(state_bits(model), before)
    assert torch.equal(answers(model), first if after else answers(room.live(kind)))


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_scales_rounded_before_the_model_was_known_are_taken_as_they_are(
    room: Room, kind: str
) -> None:
    model = room.live(kind)
    first = answers(model)
    packed = any(quantized.is_packed(p.quant_state) for p in model.parameters()
                 if hasattr(p, "quant_state"))  # fmt: skip
    merged = merge(LiveBase(model), adapters_of([room.adapter("lora")]))
    changed = answers(model)
    assert not torch.equal(changed, first)
    merged.unmerge()
    assert torch.equal(answers(model), first)
    if not packed:  # nothing was lost
        assert_same(state_bits(model), state_bits(room.live(kind)))


def test_the_codes_of_a_saved_state_are_found_after_a_forward(room: Room) -> None:
    model, files = room.live("nf4"), room.merged("nf4", "lora", quantize="keep")
    base = LiveBase(model)
    answers(model)
    model.state_dict()  # bitsandbytes unpacks the codes here, but not the scales
    merge(base, adapters_of([room.adapter("lora")]))
    assert_same(state_bits(model), state_bits(files))


@pytest.mark.parametrize("name", ["lora", "saved"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_dequantized_merge_has_the_bits_of_files_and_can_be_saved(
    room: Room, kind: str, name: str, tmp_path: Path
) -> None:
    model, files = room.live(kind), room.merged(kind, name)
    base, before = LiveBase(model), state_bits(model)
    modules = {path: id(module) for path, module in model.named_modules()}
    merged = merge(base, adapters_of([room.adapter(name)]), dequantize=True)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert_same(state_bits(model), state_bits(files))
    assert torch.equal(answers(model), answers(files))
    model.save_pretrained(tmp_path)
    assert_same(state_bits(load(tmp_path)), state_bits(files))
    merged.unmerge()
    assert {path: id(module) for path, module in model.named_modules()} == modules
    assert_same(state_bits(model), before)
    assert model.config.quantization_config is not None


@pytest.mark.slow
def test_a_seed_and_a_rounding_give_the_codes_that_they_give_on_files(room: Room) -> None:
    choices: dict[str, Any]
    for choices in ({"seed": 7}, {"rounding": "nearest"}):
        model = room.live("nf4")
        merged = merge(LiveBase(model), adapters_of([room.adapter("lora")]), **choices)
        files = room.merged("nf4", "lora", quantize="keep", **choices)
        assert_same(state_bits(model), state_bits(files))
        assert merged.report.survived is not None


def test_what_survives_is_reported_as_on_files(room: Room, tmp_path: Path) -> None:
    adapter = room.adapter("lora")
    receipt = regraft.merge(room.base("nf4"), adapter, tmp_path / "out", quantize="keep")
    model = room.live("nf4")
    report = merge(LiveBase(model), adapters_of([adapter])).report
    assert report.survived == pytest.approx(receipt.totals.survived, rel=1e-6)
    assert report.noise == pytest.approx(receipt.totals.noise, rel=1e-6)


def test_a_hook_of_a_layer_stays_with_the_layer_that_takes_its_place(room: Room) -> None:
    model, seen = room.live("nf4"), []
    layer = model.model.layers[0].mlp.up_proj
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    merge(LiveBase(model), adapters_of([room.adapter("lora")]), dequantize=True)
    answers(model)
    assert seen == [1]
    hook.remove()
    answers(model)
    assert seen == [1]


def test_a_swap_of_codes_has_the_bits_of_files(room: Room) -> None:
    model = room.live("nf4-double")
    base, before = LiveBase(model), state_bits(model)
    merged = merge(base, adapters_of([room.adapter("lora")]))
    answers(model)
    swapped = swap(merged, adapters_of([room.adapter("dora")]))
    assert_same(state_bits(model), state_bits(room.merged("nf4-double", "dora", quantize="keep")))
    swapped.unmerge()
    assert_same(state_bits(model), before)


def test_a_failure_among_codes_leaves_the_model_as_it_was(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = room.live("nf4")
    base, before = LiveBase(model), state_bits(model)
    whole, count = Coder.codes, iter(range(10**9))

    def codes(self: Coder, *arguments: Any) -> Any:
        if next(count) == 20:
            raise MemoryError("no more")
        return whole(self, *arguments)

    monkeypatch.setattr(Coder, "codes", codes)
    with pytest.raises(MemoryError):
        merge(base, adapters_of([room.adapter("lora")]))
    assert_same(state_bits(model), before)


def test_a_quantized_weight_that_an_adapter_replaces_cannot_keep_its_codes(room: Room) -> None:
    model = room.live("nf4")
    before = state_bits(model)
    with pytest.raises(MismatchError, match="replaces a quantized weight"):
        merge(LiveBase(model), adapters_of([room.adapter("saved")]))
    assert_same(state_bits(model), before)


def test_plain_weights_of_a_quantized_model_are_merged_beside(room: Room) -> None:
    model = room.live("int8")
    base, before = LiveBase(model), state_bits(model)
    merged = merge(base, adapters_of([room.adapter("head")]))
    assert_same(state_bits(model), state_bits(room.merged("int8", "head", quantize="keep")))
    merged.unmerge()
    assert_same(state_bits(model), before)
