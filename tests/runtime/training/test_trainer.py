"""transformers' Trainer on a live model."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import regraft
from regraft.errors import MismatchError, UsageError
from regraft.runtime.training.new_adapter import LoraConfig
from regraft.runtime.training.trainer import trainer_model
from regraft.testing import zoo
from regraft.testing.zoo import make_model

pytestmark = pytest.mark.usefixtures("_what_is_there_is_frozen")

WEIGHTS = "adapter_model.safetensors"
CONFIG = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 16}


class Killed(TrainerCallback):
    """Ends a run in the middle as a kill does: nothing more is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, use_cache=False,
        )
    )  # fmt: skip
    zoo.randomize(model)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def load(base: Path, *, four_bit: bool = False) -> Any:
    if not four_bit:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 60, (9,), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": 2, "max_steps": 8, "save_steps": 3, "logging_steps": 1,
        "learning_rate": 0.02, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "save_total_limit": 4,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(options | more))


def attached(model: Any, config: Any = CONFIG) -> Any:
    torch.manual_seed(11)
    return regraft.attach(model, LoraConfig(**config), "new")


def trained(model: Any, folder: Path, *, resume: bool = False, **more: Any) -> Trainer:
    """Train a new adapter on a model, and return the trainer at its end."""
    callbacks = [Killed(more.pop("killed_at"))] if "killed_at" in more else []
    twin = trainer_model(attached(model))
    evaluated = {"eval_dataset": rows(4)} if "eval_strategy" in more else {}
    trainer = Trainer(
        twin, arguments(folder, **more), train_dataset=rows(), callbacks=callbacks, **evaluated
    )
    if callbacks:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    base: Path, tmp_path: Path, four_bit: bool
) -> None:
    whole = trained(load(base, four_bit=four_bit), tmp_path / "whole")
    trained(load(base, four_bit=four_bit), tmp_path / "killed", killed_at=5)
    assert not (tmp_path / "killed" / "checkpoint-6").exists()
    resumed = trained(load(base, four_bit=four_bit), tmp_path / "killed", resume=True)
    expected, found = adapter_of(whole), adapter_of(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert all(tensor.abs().max() > 0.01 for tensor in expected.values())
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
def test_an_adapter_loaded_from_a_checkpoint_goes_on_too(base: Path, tmp_path: Path) -> None:
    whole = trained(load(base), tmp_path / "whole")
    model = load(base)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    adapters = regraft.attach(model, checkpoint, "new", is_trainable=True)
    trainer = Trainer(trainer_model(adapters), arguments(tmp_path / "again"), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    expected, found = adapter_of(whole), adapter_of(trainer)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
def test_losses_are_those_of_pefts_model(base: Path, tmp_path: Path, four_bit: bool) -> None:
    model = load(base, four_bit=four_bit)
    twin = trainer_model(attached(model))
    start = {key: tensor.clone() for key, tensor in twin.state_dict().items()}
    trainer = Trainer(twin, arguments(tmp_path / "ours"), train_dataset=rows())
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(load(base, four_bit=four_bit), peft.LoraConfig(**CONFIG))
        set_peft_model_state_dict(theirs, start)
        other = Trainer(theirs, arguments(tmp_path / "theirs"), train_dataset=rows())
        other.train()
    torch.testing.assert_close(losses(trainer), losses(other), rtol=1e-5, atol=1e-5)
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e]
             for t in (trainer, other)]  # fmt: skip
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_checkpoints_are_adapters(base: Path, tmp_path: Path) -> None:
    trainer = trained(load(base), tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", WEIGHTS, "README.md", "optimizer.pt"} <= files
    assert "config.json" not in files
    again = PeftModel.from_pretrained(load(base), checkpoint)
    assert again.peft_config["default"].r == 4
    size = sum(t.nbytes for t in trainer.model.state_dict().values())
    assert (checkpoint / WEIGHTS).stat().st_size < size + 10_000
    assert (checkpoint / "model.safetensors").stat().st_size < size + 10_000


@pytest.mark.slow
def test_what_is_saved_at_the_end_is_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    trainer = trained(load(base), tmp_path / "out", save_strategy="no")
    trainer.save_model()
    regraft.save(trainer.model, tmp_path / "saved")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", WEIGHTS, "README.md", "training_args.bin"}
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(found[k], t) for k, t in trainer.model.state_dict().items())
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(base: Path, tmp_path: Path) -> None:
    trainer = trained(
        load(base), tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        learning_rate=5.0, metric_for_best_model="eval_loss", max_steps=9,
    )  # fmt: skip
    evaluations = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    best = load_file(Path(trainer.state.best_model_checkpoint) / WEIGHTS)
    assert all(torch.equal(best[k], t) for k, t in trainer.model.state_dict().items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-6)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")


@pytest.mark.slow
def test_gradients_are_accumulated_clipped_and_checkpointed(base: Path, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.1}
    plain = trained(load(base), tmp_path / "a", **options)
    for reentrant in (False, True):
        kwargs = {"use_reentrant": reentrant}
        saving = trained(
            load(base), tmp_path / f"b{reentrant}", gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs, **options,
        )  # fmt: skip
        torch.testing.assert_close(losses(saving), losses(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_model_itself_is_not_touched(base: Path, tmp_path: Path) -> None:
    model = load(base)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names, cls = [name for name, _ in model.named_modules()], type(model)
    trainer = trained(model, tmp_path, max_steps=3)
    assert [name for name, _ in model.named_modules()] == names
    assert type(model) is cls
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert "_hf_peft_config_loaded" not in vars(model)
    ids = rows(1)[0]["input_ids"][None]
    trainer.model.eval()
    assert not model.training
    with torch.no_grad():
        found = model(ids).logits
    assert torch.equal(found, trainer.model(ids).logits)
    regraft.handle_of(model).detach()
    assert not torch.equal(found, model(ids).logits)


def test_the_twin_looks_like_the_model() -> None:
    model = make_model("llama")
    twin = trainer_model(attached(model))
    assert isinstance(twin, type(model))
    assert type(twin).__name__ == type(model).__name__
    assert inspect.signature(twin.forward) == inspect.signature(model.forward)
    trainable = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    own = {id(p) for p in regraft.handle_of(model).parameters()}
    assert {id(p) for p in trainable.values()} == own
    assert twin.get_input_embeddings() is model.get_input_embeddings()
    count = sum(p.numel() for p in model.parameters())
    assert twin.num_parameters() == count + sum(p.numel() for p in trainable.values())


def test_the_twin_loads_only_what_is_the_adapters() -> None:
    twin = trainer_model(attached(make_model("llama")))
    state = {key: torch.ones_like(tensor) for key, tensor in twin.state_dict().items()}
    first = next(iter(state))
    result = twin.load_state_dict({first: state[first], "other": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["other"]
    assert set(result.missing_keys) == state.keys() - {first}
    assert torch.equal(twin.state_dict()[first], state[first])
    with pytest.raises(RuntimeError, match="missing"):
        twin.load_state_dict({first: state[first]})
    with pytest.raises(RuntimeError, match="shape"):
        twin.load_state_dict({first: torch.ones(1)}, strict=False)


def test_which_adapter_is_trained_has_to_be_clear(tmp_path: Path) -> None:
    model = make_model("llama")
    adapters = attached(model)
    regraft.save(model, tmp_path)
    adapters.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(UsageError, match="several adapters can be trained"):
        trainer_model(adapters)
    with pytest.raises(UsageError, match="does not answer"):
        trainer_model(adapters, "second")
    assert set(trainer_model(adapters, "new").state_dict()) == set(load_file(tmp_path / WEIGHTS))
    adapters.load_adapter(tmp_path, "frozen")
    with pytest.raises(UsageError, match="cannot be trained"):
        trainer_model(adapters, "frozen")
    adapters.detach()
    with pytest.raises(UsageError, match="no adapter can be trained"):
        trainer_model(regraft.attach(model, tmp_path))


@pytest.mark.slow
def test_a_model_that_is_none_of_transformers_is_trained_too(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(9, 8), torch.nn.Linear(8, 9)

        def forward(self, input_ids: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
            out = self.second(torch.tanh(self.first(input_ids.float() / 60)))
            return {"loss": (out - labels / 60).square().mean(), "logits": out}

    torch.manual_seed(0)
    start = Net()
    state = {key: tensor.clone() for key, tensor in start.state_dict().items()}

    def run(folder: str, **more: Any) -> Trainer:
        net = Net()
        net.load_state_dict(state)
        torch.manual_seed(1)
        adapters = regraft.attach(net, LoraConfig(r=2, target_modules=["first", "second"]), "new")
        resume, killed = more.pop("resume", False), more.pop("killed", False)
        trainer = Trainer(
            trainer_model(adapters), arguments(tmp_path / folder), train_dataset=rows(),
            callbacks=[Killed(5)] if killed else [],
        )  # fmt: skip
        if killed:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = adapter_of(run("whole"))
    run("killed", killed=True)
    resumed = adapter_of(run("killed", resume=True))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# -- runs that PEFT began --------------------------------------------------------------------------


BEGUN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["v_proj", "q_proj", "embed_tokens"], "use_dora": True}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"],
               "trainable_token_indices": [1, 5]}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "ln_1"]}),
    ("qwen3_moe", {"target_modules": ["q_proj"],
                   "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
]  # fmt: skip


def run_of(model: Any, out: Path) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 50, (8,), generator=generator) for _ in range(8)]
    args = TrainingArguments(
        str(out), max_steps=4, save_steps=2, per_device_train_batch_size=2, logging_steps=1,
        report_to="none", use_cpu=True, learning_rate=0.02, weight_decay=0.3, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, args, train_dataset=[{"input_ids": x, "labels": x} for x in ids])


def logged(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "config"), BEGUN, ids=lambda value: str(value)[:40])
def test_a_run_that_peft_began_goes_on_with_its_optimizer(
    tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    config = {"r": 4, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(make_model(architecture), peft.LoraConfig(**copy.deepcopy(config)))
        whole = run_of(theirs, tmp_path / "theirs")
        whole.train()
        checkpoint = tmp_path / "theirs" / "checkpoint-2"
        adapters = regraft.attach(make_model(architecture), config, "mine")
        trainer = run_of(adapters.for_trainer(checkpoint=checkpoint), tmp_path / "ours")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert logged(trainer) == pytest.approx(logged(whole), abs=2e-3)
    assert len(logged(trainer)) == 4


def test_a_run_of_another_config_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    theirs = get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    adapters = regraft.attach(
        make_model("llama"), {"lora_alpha": 3, "target_modules": ["v_proj"]}, "mine"
    )
    with pytest.raises(MismatchError) as caught:
        adapters.for_trainer(checkpoint=tmp_path)
    assert all(part in str(caught.value) for part in ("'lora_alpha'", "q_proj", "v_proj"))
    assert not (tmp_path / "model.safetensors").exists()
