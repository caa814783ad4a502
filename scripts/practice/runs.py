"""One run of transformers' Trainer on a model of regraft, and the same on one of PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import regraft
from practice.bases import BASES, Base, answer, inputs, made
from practice.outcome import require, require_close

Settings = dict[str, Any]
FIXED: Settings = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}
"""Arguments of every run."""


def base_named(name: str) -> Base:
    """Return a base of the list of bases."""
    return next(base for base in BASES if base.name == name)


LLAMA = base_named("llama")


def _nothing(_: Any) -> Settings:
    return {}


@dataclass(frozen=True)
class Run:
    """A situation: what is trained, how, and what is made of the base before.

    ``options`` makes further arguments of the trainer from the model that it is given;
    ``prepared`` gets the base, and returns what the adapter is put on.
    """

    base: Base = LLAMA
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    trainer: Any = tf.Trainer
    options: Callable[[Any], Settings] = _nothing
    prepared: Callable[[Any], Any] = lambda model: model
    loaded: Mapping[str, Any] | None = None
    tolerance: float = 1e-3

    def hold(self) -> None:
        """Raise `WrongError` at the first loss, metric or answer that is not that of PEFT's run."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            start = self.start(folder)
            theirs = self.theirs(start)
            expected = self.trained(theirs, folder / "theirs")
            model, adapters = self.ours(start)
            found = self.trained(adapters.for_trainer(), folder / "ours")
            self.compare(found, expected)
            self.compare_answers(model, theirs)

    def start(self, folder: Path) -> Path:
        """Return the folder of the adapter that both runs begin with."""
        common: Settings = {"r": 4, "target_modules": list(self.base.linear)}
        torch.manual_seed(4)
        config = peft.LoraConfig(**{**common, **self.config})
        model = peft.get_peft_model(self.model(folder), config)
        model.save_pretrained(folder / "start", save_embedding_layers=False)
        return folder / "start"

    def model(self, folder: Path) -> Any:
        """Return the base anew, as ``prepared`` leaves it."""
        if self.loaded is None:
            return self.prepared(made(self.base))
        if not (folder / "base").exists():
            made(self.base).save_pretrained(folder / "base")
        auto = getattr(tf, self.base.auto)
        return self.prepared(auto.from_pretrained(folder / "base", **self.loaded))

    def theirs(self, start: Path) -> Any:
        """Return PEFT's model."""
        return peft.PeftModel.from_pretrained(self.model(start.parent), start, is_trainable=True)

    def ours(self, start: Path) -> tuple[Any, regraft.Adapters]:
        """Return a model with the adapter on it, and the handle."""
        model = self.model(start.parent)
        return model, regraft.attach(model, start, "one", is_trainable=True)

    def trained(self, model: Any, folder: Path, **changes: Any) -> Any:
        """Return the trainer after its run."""
        trainer = self.trainer_of(model, folder, **changes)
        trainer.train()
        return trainer

    def trainer_of(self, model: Any, folder: Path, **changes: Any) -> Any:
        """Return the trainer before its run; ``changes`` are further arguments of the run."""
        seq2seq = issubclass(self.trainer, tf.Seq2SeqTrainer)
        kind = tf.Seq2SeqTrainingArguments if seq2seq else tf.TrainingArguments
        arguments = kind(str(folder), **{**FIXED, **self.arguments, **changes})
        data = data_of(self.base)
        settings: Settings = {"train_dataset": data, "eval_dataset": data[:4]}
        settings |= self.options(model)
        if "model_init" not in settings:
            settings["model"] = model
        trainer = self.trainer(args=arguments, **settings)
        trainer.remove_callback(tf.PrinterCallback)
        return trainer

    def compare(self, found: Any, expected: Any) -> None:
        """Compare the losses, and every other figure in the logs but those of time."""
        losses = losses_of(expected)
        require(bool(torch.isfinite(losses).all()), "losses of PEFT's run are not finite")
        require_close(losses_of(found), losses, "losses", self.tolerance)

    def compare_answers(self, model: Any, theirs: Any) -> None:
        """Compare what the two models answer after their runs."""
        was = model.training
        found, expected = model.eval(), theirs.eval()
        with torch.no_grad():
            found, expected = answer(found, self.base), answer(expected, self.base)
        require_close(found, expected, "answers after the run", 10 * self.tolerance)
        model.train(was)


def losses_of(trainer: Any) -> Any:
    """Return the losses of a run, and those of its evaluations, in their order."""
    kinds = ("loss", "eval_loss", "eval_right")
    logs = [log[kind] for log in trainer.state.log_history for kind in kinds if kind in log]
    return torch.tensor(logs)


def data_of(base: Base) -> list[Settings]:
    """Return twelve examples to train on."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 63, (12, 6), generator=generator)
    made_of = _DATA.get(base.name, _language)
    return [made_of(base, row, generator) for row in rows]


def _language(_base: Base, row: Any, _: Any) -> Settings:
    return {"input_ids": row, "labels": row.clone()}


def _classes(_base: Base, row: Any, _: Any) -> Settings:
    return {"input_ids": row, "labels": row[0] % 3}


def _tokens(_base: Base, row: Any, _: Any) -> Settings:
    return {"input_ids": row, "labels": row % 3}


def _answers(_base: Base, row: Any, _: Any) -> Settings:
    return {"input_ids": row, "start_positions": row[0] % 3, "end_positions": 3 + row[0] % 3}


def _images(_base: Base, row: Any, generator: Any) -> Settings:
    return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": row[0] % 3}


def _images_and_text(base: Base, row: Any, generator: Any) -> Settings:
    ids = torch.cat([inputs(base)["input_ids"][0, :4], row])
    labels = torch.cat([torch.full((4,), -100), row])
    images = torch.randn(3, 8, 8, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": images}


_DATA: dict[str, Callable[[Base, Any, Any], Settings]] = {
    "bert_classes": _classes,
    "llama_classes": _classes,
    "bert_tokens": _tokens,
    "roberta_answers": _answers,
    "vit_classes": _images,
    "resnet_classes": _images,
    "llava": _images_and_text,
}
