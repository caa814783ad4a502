"""The demo's sections on a running model, with a tiny model in the place of the real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regraft
from regraft.demo.state import DemoFolder
from regraft.demo.steps import live
from regraft.demo.steps.lessons import LESSONS
from regraft.demo.steps.live import LiveModel

SENTENCES = ["one", "three", "eleven"]


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


class TinyAsker:
    """Answers with the token that is the most likely at each letter."""

    def __init__(self, folder: Path, *, four_bits: bool = False) -> None:
        del folder, four_bits
        self.model = tiny_model()

    def answers(self, sentences: Sequence[str]) -> list[str]:
        rows = [[ord(letter) % 64 for letter in f"{text:<8}"] for text in sentences]
        with torch.inference_mode():
            tokens = self.model(input_ids=torch.tensor(rows)).logits.argmax(-1)
        return [str(row) for row in tokens.tolist()]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LiveModel:
    monkeypatch.setattr(live, "Asker", TinyAsker)
    folder = DemoFolder(tmp_path)
    for seed, lesson in enumerate(LESSONS):
        taught = tiny_model()
        torch.manual_seed(seed)
        config = regraft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        regraft.save(regraft.attach(taught, config, lesson.name), folder.adapter(lesson.name))
    return LiveModel(tmp_path / "base", folder)


def test_each_adapter_answers_in_its_turn_and_then_the_base(model: LiveModel) -> None:
    switched = model.switched(SENTENCES)
    answers = [switched.base, *switched.adapters.values()]
    assert len({str(each) for each in answers}) == 1 + len(LESSONS)
    assert switched.base == TinyAsker(Path()).answers(SENTENCES)
    assert model.switched(SENTENCES).base == switched.base


def test_rows_of_a_batch_get_what_each_adapter_answers_alone(model: LiveModel) -> None:
    switched = model.switched(SENTENCES)
    assert model.all_by_row(SENTENCES) == switched.adapters
    mixed = model.by_row([None, "fields", "table"], [SENTENCES[0]] * 3)
    alone = [switched.base, switched.adapters["fields"], switched.adapters["table"]]
    assert mixed == [answers[0] for answers in alone]


def test_a_merge_in_memory_answers_as_the_adapter_and_goes_away_again(model: LiveModel) -> None:
    switched = model.switched(SENTENCES)
    found = model.merged_in_memory("fields", SENTENCES)
    assert found.answers == switched.adapters["fields"]
    assert found.restored
    assert (found.changed, found.tensors) == (14, 21)
    assert found.undo_bytes > 0


def test_a_bit_that_does_not_come_back_is_seen(
    model: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = model._adapters.unmerge_adapter

    def all_but_one_bit() -> None:
        back()
        with torch.no_grad():
            model._asker.model.lm_head.weight.view(torch.int32)[0, 0] ^= 1

    monkeypatch.setattr(model._adapters, "unmerge_adapter", all_but_one_bit)
    assert not model.merged_in_memory("fields", SENTENCES).restored
