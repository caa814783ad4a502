"""Runs of transformers' Trainer, each beside the same run of PEFT's model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import regraft
from practice.bases import BASES, made
from practice.outcome import Case, require, require_close

LLAMA = next(base for base in BASES if base.name == "llama")
T5 = next(base for base in BASES if base.name == "t5")
CLASSES = next(base for base in BASES if base.name == "bert_classes")
Settings = dict[str, Any]

ARGUMENTS: dict[str, Settings] = {
    "as it is": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "gradient checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "gradient checkpointing, not reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "bfloat16 autocast": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 2},
    "best model at the end": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    },
    "saved each epoch": {"save_strategy": "epoch"},
    "clipped gradients": {"max_grad_norm": 0.01},
    "weight decay and warmup": {"weight_decay": 0.1, "warmup_steps": 2},
}
"""Situations that are arguments of Trainer alone."""

CONFIGS: dict[str, Settings] = {
    "DoRA": {"use_dora": True},
    "a head in modules_to_save": {"modules_to_save": ["lm_head"]},
    "token rows": {"trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
}
"""Situations that are the adapter's config alone."""


def cases() -> Iterator[Case]:
    """Yield every situation."""
    for name, arguments in ARGUMENTS.items():
        yield Case(name, _same_losses(LLAMA, arguments, {}))
    for name, config in CONFIGS.items():
        yield Case(name, _same_losses(LLAMA, {}, config))
    yield Case("a classifier", _same_losses(CLASSES, {}, {"task_type": "SEQ_CLS"}))
    yield Case("encoder and decoder", _same_losses(T5, {}, {}))
    yield Case("resumed from a checkpoint", _resumed)
    yield Case("the plain model is refused", _plain)


def _data(base: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 64, (12, 6), generator=generator)
    if base is CLASSES:
        return [{"input_ids": row, "labels": row[0] % 3} for row in rows]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def _trainer(model: Any, base: Any, folder: Path, settings: Settings) -> Any:
    fixed: Settings = {
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
    arguments = tf.TrainingArguments(str(folder), **{**fixed, **settings})
    data = _data(base)
    trainer = tf.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
    trainer.remove_callback(tf.PrinterCallback)
    return trainer


def _losses(trainer: Any) -> Any:
    logs = [log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log]
    return torch.tensor([log.get("loss", log.get("eval_loss")) for log in logs])


def _adapter(base: Any, folder: Path, config: Settings) -> Path:
    common: Settings = {"r": 4, "target_modules": list(base.linear)}
    torch.manual_seed(4)
    model = peft.get_peft_model(made(base), peft.LoraConfig(**{**common, **config}))
    model.save_pretrained(folder / "start", save_embedding_layers=False)
    return folder / "start"


def _ours(base: Any, start: Path) -> tuple[Any, Any]:
    model = made(base)
    return model, regraft.attach(model, start, "one", is_trainable=True)


def _same_losses(base: Any, arguments: Settings, config: Settings) -> Callable[[], None]:
    def attempt() -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            start = _adapter(base, folder, config)
            theirs = peft.PeftModel.from_pretrained(made(base), start, is_trainable=True)
            expected = _trainer(theirs, base, folder / "theirs", arguments)
            expected.train()
            _, adapters = _ours(base, start)
            found = _trainer(adapters.for_trainer(), base, folder / "ours", arguments)
            found.train()
            tolerance = 0.02 if arguments.get("bf16") else 1e-3
            require_close(_losses(found), _losses(expected), "losses", tolerance)

    return attempt


def _resumed() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = _adapter(LLAMA, folder, {})
        saving: Settings = {"save_strategy": "steps", "save_steps": 3}
        whole = _trainer(_ours(LLAMA, start)[1].for_trainer(), LLAMA, folder / "run", saving)
        whole.train()
        again = _trainer(_ours(LLAMA, start)[1].for_trainer(), LLAMA, folder / "run", saving)
        again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
        require_close(_losses(again), _losses(whole), "losses", 1e-3)


def _plain() -> None:
    """Trainer is given the model itself: an error, or a warning, before the first step."""
    import warnings

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = Path(name)
        model, _ = _ours(LLAMA, _adapter(LLAMA, folder, {}))
        try:
            _trainer(model, LLAMA, folder / "run", {}).train()
        except (regraft.RegraftError, ValueError):
            return
        require(any("for_trainer" in str(w.message) for w in caught), "nothing was said")
