"""Runs that would train nothing, or go on with another run's state, are refused before a step."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import regraft
from regraft.errors import MismatchError, UsageError

FIELDS: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
ROWS = [{"input_ids": torch.arange(n, n + 7), "labels": torch.arange(n, n + 7)} for n in range(8)]


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.02}
    return TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=True, **(options | more)
    )


@pytest.mark.slow
def test_trainer_with_the_plain_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    plain = model()
    handle = regraft.attach(plain, regraft.LoraConfig(**FIELDS))
    before = [p.detach().clone() for p in handle.parameters()]
    trainer = Trainer(plain, arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(UsageError, match="for_trainer"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))


def test_loops_with_the_adapters_parameters_run(tmp_path: Path) -> None:
    del tmp_path
    plain = model()
    handle = regraft.attach(plain, regraft.LoraConfig(**FIELDS))
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    prepared, optimizer = accelerator.prepare(plain, optimizer)
    before = [p.detach().clone() for p in handle.parameters()]
    accelerator.backward(prepared(**{k: v[None] for k, v in ROWS[0].items()}).loss)
    optimizer.step()
    other.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))


def test_an_optimizers_state_of_other_parameters_is_refused() -> None:
    plain = model()
    handle = regraft.attach(plain, regraft.LoraConfig(**FIELDS))
    parameters = list(handle.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    plain(**{k: v[None] for k, v in ROWS[0].items()}).loss.backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    again = torch.optim.AdamW(list(reversed(parameters)), lr=0.1)
    again.load_state_dict(state)
    with pytest.raises(MismatchError, match="another parameter"):
        again.step()


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def started(folder: Path) -> Path:
    live = get_peft_model(model(), LoraConfig(**FIELDS, init_lora_weights=False))
    live.save_pretrained(folder)
    return folder


def with_regraft(folder: Path, output: Path, **more: Any) -> Trainer:
    handle = regraft.attach(model(), folder, is_trainable=True)
    return Trainer(handle.for_trainer(), arguments(output, **more), train_dataset=ROWS)


def with_peft(folder: Path, output: Path, **more: Any) -> Trainer:
    live = PeftModel.from_pretrained(model(), folder, is_trainable=True)
    return Trainer(live, arguments(output, **more), train_dataset=ROWS)


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_peft_with_the_same_losses(tmp_path: Path) -> None:
    folder = started(tmp_path / "adapter")
    whole = with_peft(folder, tmp_path / "whole")
    whole.train()
    with_regraft(folder, tmp_path / "run").train()
    again = with_peft(folder, tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(losses(again), losses(whole), rtol=1e-4, atol=1e-4)


class Wrapper(nn.Module):
    """A model inside of another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_the_twins_state_is_that_of_a_wrapper_too() -> None:
    handle = regraft.attach(model(), regraft.LoraConfig(**FIELDS))
    twin = handle.for_trainer()
    wrapper = Wrapper(twin)
    state = {key: value.clone() for key, value in wrapper.state_dict().items()}
    assert set(state) == {f"inner.{key}" for key in twin.state_dict()}
    assert len(state) == 4
    for value in state.values():
        value.fill_(0.5)
    assert not any(wrapper.load_state_dict(state))
    assert all((value == 0.5).all() for value in handle.parameters())
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="lora_A"):
        wrapper.load_state_dict(state)


class Preferences:
    """Does with its models what TRL's trainers do."""

    def __init__(self, model: Any, ref_model: Any = None, *, needs_one: bool = True) -> None:
        self.ref_model = ref_model or (object() if needs_one else None)
        model.add_model_tags(["trl", "dpo"])


class Rewards:
    """As GRPOTrainer: the reference is loaded by name, and cannot be given."""

    def __init__(self, model: Any) -> None:
        self.ref_model = object()
        model.add_model_tags(["trl", "grpo"])


def test_a_trainer_that_takes_no_reference_gets_another_way_on(tmp_path: Path) -> None:
    going_on = regraft.attach(model(), started(tmp_path / "a"), is_trainable=True).for_trainer()
    with pytest.raises(UsageError, match=r"Rewards.*beta=0\.0.*regraft\.merge") as caught:
        Rewards(going_on)
    assert "ref_model=" not in str(caught.value)


def test_a_reference_that_is_not_the_start_of_the_run_is_refused(tmp_path: Path) -> None:
    going_on = regraft.attach(model(), started(tmp_path / "a"), is_trainable=True).for_trainer()
    with pytest.raises(UsageError, match=r"Preferences.*reference.*load_merged"):
        Preferences(going_on)
    Preferences(going_on, object())
    Preferences(going_on, needs_one=False)
    new = regraft.attach(model(), regraft.LoraConfig(**FIELDS)).for_trainer()
    Preferences(new)
    assert new.model_tags == ["trl", "dpo"]


class ContinuousBatchingManager:
    """Runs a model in a thread of its own, as that of transformers does."""

    def __init__(self, model: Any) -> None:
        self.model, self.error = model, ""
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        self.thread.join()

    def run(self) -> None:
        try:
            self.model(input_ids=ROWS[0]["input_ids"][None])
        except UsageError as error:
            self.error = str(error)


def test_a_library_thread_that_has_no_scope_does_not_answer_for_it() -> None:
    plain = model().eval()
    handle = regraft.attach(plain, regraft.LoraConfig(**FIELDS), "a")
    for scope in (handle.using("a"), handle.rows(["a"]), handle.disable_adapter()):
        with scope:
            assert "set_adapter" in ContinuousBatchingManager(plain).error
    assert ContinuousBatchingManager(plain).error == ""
