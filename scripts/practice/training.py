"""Runs of transformers' Trainer, each beside the same run of PEFT's model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from peft.optimizers import create_loraplus_optimizer
from torch.nn.functional import cross_entropy

import regraft
from practice.bases import answer
from practice.loops import LOOPS
from practice.outcome import Case, require, require_close
from practice.runs import LLAMA, Run, Settings, base_named, data_of, losses_of

EVALUATED: Settings = {"eval_strategy": "steps", "eval_steps": 2}
SAVED: Settings = {"save_strategy": "steps", "save_steps": 2}
BEST: Settings = {**EVALUATED, **SAVED, "load_best_model_at_end": True}

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
    "label smoothing": {"label_smoothing_factor": 0.1},
    "evaluation in between": EVALUATED,
    "evaluation before the first step": {**EVALUATED, "eval_on_start": True},
    "best model at the end": BEST,
    "best model by the highest loss": {**BEST, "greater_is_better": True},
    "saved each epoch": {"save_strategy": "epoch"},
    "weights alone in checkpoints": {**SAVED, "save_only_model": True, "save_total_limit": 1},
    "clipped gradients": {"max_grad_norm": 0.01},
    "weight decay and warmup": {"weight_decay": 0.1, "warmup_steps": 2},
    "cosine schedule": {"lr_scheduler_type": "cosine"},
    "learning rate that falls on a plateau": {
        **EVALUATED,
        "lr_scheduler_type": "reduce_lr_on_plateau",
    },
    "examples in their order": {"train_sampling_strategy": "sequential"},
    "noise on embeddings (NEFTune)": {"neftune_noise_alpha": 5},
    "batch size found by itself": {"auto_find_batch_size": True},
    "two epochs, the last batch dropped": {
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 5,
        "dataloader_drop_last": True,
    },
    "SGD": {"optim": "sgd"},
    "Adafactor": {"optim": "adafactor"},
    "8-bit AdamW of bitsandbytes": {"optim": "adamw_bnb_8bit"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}
"""Situations that are arguments of Trainer alone."""

CONFIGS: dict[str, Settings] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.2},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.2},
    "a head in modules_to_save": {"modules_to_save": ["lm_head"]},
    "token rows": {"trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "MiCA": {"init_lora_weights": "mica"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}
"""Situations that are the adapter's config alone."""


def _four_bit(**settings: Any) -> Settings:
    chosen: Settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = tf.BitsAndBytesConfig(load_in_4bit=True, **{**chosen, **settings})
    return {"quantization_config": config, "dtype": torch.float32}


EIGHT_BIT: Settings = {
    "quantization_config": tf.BitsAndBytesConfig(load_in_8bit=True),
    "dtype": torch.float32,
}


class Smoothed(tf.Trainer):  # type: ignore[misc]
    """A trainer with a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        found = model(**inputs)
        loss = cross_entropy(found.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3)
        return (loss, found) if return_outputs else loss


def _loss(outputs: Any, labels: Any, **_: Any) -> Any:
    return outputs.logits.square().mean() + cross_entropy(outputs.logits[:, 0], labels[:, 0])


class Counting(tf.TrainerCallback):  # type: ignore[misc]
    """Asks the model at each step, slows it down, and ends the run after the fifth."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        del args
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        ids = data_of(LLAMA)[0]["input_ids"][None]
        was = model.training
        with torch.no_grad():
            asked = model.eval()(input_ids=ids).logits.square().mean().item()
        model.train(was)
        state.log_history.append({"loss": asked})
        optimizer.param_groups[0]["lr"] *= 0.9
        control.should_training_stop = state.global_step >= 5
        return control


def _padded(rows: list[Settings]) -> Settings:
    """Return a batch of rows of unlike lengths."""
    width = max(len(row["input_ids"]) for row in rows)
    rest = [width - len(row["input_ids"]) for row in rows]
    pad = torch.nn.functional.pad
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": torch.stack([pad(a, (0, n)) for a, n in zip(ids, rest, strict=True)]),
        "attention_mask": torch.stack(
            [pad(torch.ones_like(a), (0, n)) for a, n in zip(ids, rest, strict=True)]
        ),
        "labels": torch.stack([pad(a, (0, n), value=-100) for a, n in zip(ids, rest, strict=True)]),
    }


def _ragged(_: Any) -> Settings:
    rows = [{"input_ids": row["input_ids"][: 2 + n % 5]} for n, row in enumerate(data_of(LLAMA))]
    return {"train_dataset": rows, "eval_dataset": rows[:4], "data_collator": _padded}


def _two_groups(model: Any) -> Settings:
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [each for name, each in named if "lora_B" in name], "lr": 0.08},
        {"params": [each for name, each in named if "lora_B" not in name], "lr": 0.01},
    ]
    return {"optimizers": (torch.optim.AdamW(groups), None)}


def _loraplus(model: Any) -> Settings:
    """Choose LoRA+'s rates: by PEFT's function, which takes a ``PeftModel``, or by names."""
    if isinstance(model, peft.PeftModel):
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=0.005, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
        )
        return {"optimizers": (optimizer, None)}
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [each for name, each in named if "lora_B" not in name], "lr": 0.005},
        {"params": [each for name, each in named if "lora_B" in name], "lr": 0.005 * 16},
    ]
    return {"optimizers": (torch.optim.AdamW(groups, weight_decay=0.1), None)}


def _metrics(prediction: Any) -> Settings:
    return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _generated(prediction: Any) -> Settings:
    width = prediction.predictions.shape[1]
    return {"right": float((prediction.predictions * range(1, width + 1)).sum() / 1000)}


def _stopped_early(_: Any) -> Settings:
    return {"callbacks": [tf.EarlyStoppingCallback(early_stopping_patience=1)]}


RUNS: dict[str, Run] = {
    "bfloat16 autocast": Run(arguments={"bf16": True}, tolerance=0.02),
    "float16 autocast": Run(arguments={"fp16": True}, tolerance=0.02),
    "base in bfloat16": Run(prepared=lambda model: model.to(torch.bfloat16), tolerance=0.02),
    "base in float16": Run(prepared=lambda model: model.to(torch.float16), tolerance=0.02),
    "a loss of its own": Run(trainer=Smoothed),
    "a loss function": Run(options=lambda _: {"compute_loss_func": _loss}),
    "callbacks": Run(options=lambda _: {"callbacks": [Counting()]}),
    "stopped early, best model at the end": Run(
        arguments={**BEST, "eval_steps": 1, "save_steps": 1, "greater_is_better": True},
        options=_stopped_early,
    ),
    "rows of unlike lengths": Run(options=_ragged),
    "grouped by length": Run(
        options=_ragged, arguments={"train_sampling_strategy": "group_by_length"}
    ),
    "metrics": Run(arguments=EVALUATED, options=lambda _: {"compute_metrics": _metrics}),
    "two groups of parameters": Run(options=_two_groups),
    "LoRA+": Run(options=_loraplus),
    "an optimizer's class": Run(
        options=lambda _: {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 0.005})}
    ),
    "a model that is made by a function": Run(options=lambda model: {"model_init": lambda: model}),
    "checkpointing switched on before": Run(prepared=lambda model: _checkpointed(model)),
    "a base in 4 bits": Run(loaded=_four_bit(), tolerance=2e-3),
    "a base in 4 bits, twice quantized": Run(
        loaded=_four_bit(bnb_4bit_use_double_quant=True), tolerance=2e-3
    ),
    "a base in 4 bits, fp4": Run(loaded=_four_bit(bnb_4bit_quant_type="fp4"), tolerance=2e-3),
    "a base in 4 bits, prepared by PEFT": Run(
        loaded=_four_bit(), prepared=peft.prepare_model_for_kbit_training, tolerance=2e-3
    ),
    "a base in 4 bits, DoRA": Run(loaded=_four_bit(), config={"use_dora": True}, tolerance=2e-3),
    "a base in 8 bits": Run(loaded=EIGHT_BIT, tolerance=2e-3),
    "a base in 8 bits, prepared by PEFT": Run(
        loaded=EIGHT_BIT, prepared=peft.prepare_model_for_kbit_training, tolerance=2e-3
    ),
    "experts": Run(base_named("mixtral"), config={"target_parameters": ["mlp.experts.down_proj"]}),
    "a classifier": Run(base_named("bert_classes"), config={"task_type": "SEQ_CLS"}),
    "a classifier of Llama": Run(base_named("llama_classes"), config={"task_type": "SEQ_CLS"}),
    "a class for each token": Run(base_named("bert_tokens"), config={"task_type": "TOKEN_CLS"}),
    "answers in a text": Run(base_named("roberta_answers"), config={"task_type": "QUESTION_ANS"}),
    "images": Run(base_named("vit_classes"), config={"modules_to_save": ["classifier"]}),
    "images with batch norms": Run(
        base_named("resnet_classes"), config={"modules_to_save": ["classifier", "normalization"]}
    ),
    "images and text": Run(base_named("llava")),
    "encoder and decoder": Run(base_named("t5")),
    "encoder and decoder, generating": Run(
        base_named("t5"),
        trainer=tf.Seq2SeqTrainer,
        arguments={**EVALUATED, "predict_with_generate": True, "generation_max_length": 6},
        options=lambda _: {"compute_metrics": _generated},
    ),
    "encoder and decoder, generating with beams": Run(
        base_named("bart"),
        trainer=tf.Seq2SeqTrainer,
        arguments={
            **EVALUATED,
            "predict_with_generate": True,
            "generation_max_length": 6,
            "generation_num_beams": 2,
        },
        options=lambda _: {"compute_metrics": _generated},
    ),
}
"""Situations that are more than arguments."""


def _checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def cases() -> Iterator[Case]:
    """Yield every situation."""
    for name, arguments in ARGUMENTS.items():
        yield Case(name, Run(arguments=arguments).hold)
    for name, config in CONFIGS.items():
        yield Case(name, Run(config=config).hold)
    for name, run in RUNS.items():
        yield Case(name, run.hold)
    for name, way in {**WAYS, **LOOPS}.items():
        yield Case(name, _in_folder(way))


def _in_folder(way: Callable[[Path], None]) -> Callable[[], None]:
    def attempt() -> None:
        with tempfile.TemporaryDirectory() as folder:
            way(Path(folder))

    return attempt


def _ours(run: Run, folder: Path, checkpoint: Path | None = None) -> Any:
    return run.ours(folder / "start")[1].for_trainer(checkpoint=checkpoint)


def _resumed(folder: Path) -> None:
    run = Run(arguments={**SAVED, "save_steps": 3})
    run.start(folder)
    whole = run.trained(_ours(run, folder), folder / "run")
    again = run.trainer_of(_ours(run, folder), folder / "run")
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    require_close(losses_of(again), losses_of(whole), "losses")


class Killing(tf.TrainerCallback):  # type: ignore[misc]
    """Kills the process in the middle of a step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed_run(folder: Path) -> None:
    torch.set_num_threads(1)
    run = Run(arguments=SAVED, options=lambda _: {"callbacks": [Killing()]})
    run.trained(_ours(run, folder), folder / "run")


def _killed(folder: Path) -> None:
    """Go on after the process was killed, and end as PEFT's run does that was not."""
    run = Run(arguments=SAVED)
    theirs = run.theirs(run.start(folder))
    process = multiprocessing.get_context("spawn").Process(target=_killed_run, args=(folder,))
    process.start()
    process.join()
    require(process.exitcode == -signal.SIGKILL, f"the run ended with {process.exitcode}")
    model, adapters = run.ours(folder / "start")
    again = run.trainer_of(adapters.for_trainer(), folder / "run")
    again.train(resume_from_checkpoint=True)
    run.compare(again, run.trained(theirs, folder / "theirs"))
    run.compare_answers(model, theirs)


class Stopping(tf.TrainerCallback):  # type: ignore[misc]
    """Ends a run after its fourth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        del args
        control.should_training_stop = state.global_step >= 4
        return control


def _handed_over(folder: Path, *, to_peft: bool) -> None:
    """Begin a run on one side, go on with its checkpoint on the other."""
    run = Run(arguments=SAVED)
    start = run.start(folder)
    whole = run.trained(run.theirs(start), folder / "whole")
    begun = Run(arguments=SAVED, options=lambda _: {"callbacks": [Stopping()]})
    left = folder / "run" / "checkpoint-4"
    begun.trained(_ours(run, folder) if to_peft else run.theirs(start), folder / "run")
    second = run.theirs(start) if to_peft else _ours(run, folder, left)
    again = run.trainer_of(second, folder / "run")
    again.train(resume_from_checkpoint=str(left))
    run.compare(again, whole)


def _plain(folder: Path) -> None:
    """Trainer is given the model itself: an error, or a warning, before the first step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run()
        model, _ = run.ours(run.start(folder))
        try:
            run.trained(model, folder / "run")
        except (regraft.RegraftError, ValueError):
            return
        require(any("for_trainer" in str(w.message) for w in caught), "nothing was said")


def _one_of_two(folder: Path) -> None:
    """Train one adapter while another one, which is frozen, answers with it."""
    run = Run()
    frozen = Run(config={"init_lora_weights": False}).start(folder / "frozen")
    theirs = run.theirs(run.start(folder))
    theirs.load_adapter(frozen, "two")
    theirs.base_model.set_adapter(["default", "two"])
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".default." in name)
    model, adapters = run.ours(folder / "start")
    adapters.load_adapter(frozen, "two")
    adapters.set_adapter(["one", "two"])
    before = {key: t.clone() for key, t in adapters.adapter("two").tensors.items()}
    expected = run.trained(theirs, folder / "theirs")
    run.compare(run.trained(adapters.for_trainer(), folder / "ours"), expected)
    run.compare_answers(model, theirs)
    after = adapters.adapter("two").tensors
    require(all(torch.equal(before[key], after[key]) for key in before), "the frozen one changed")


def _two_in_turn(folder: Path) -> None:
    """Train two adapters, one after the other, on one model."""
    run = Run()
    start = run.start(folder)
    model, adapters = run.ours(start)
    adapters.load_adapter(start, "two", is_trainable=True)
    theirs = run.theirs(start)
    theirs.load_adapter(start, "two", is_trainable=True)
    for name, of_peft, seed in (("one", "default", 7), ("two", "two", 8)):
        adapters.set_adapter(name)
        theirs.set_adapter(of_peft)
        expected = run.trained(theirs, folder / "theirs", seed=seed)
        run.compare(run.trained(adapters.for_trainer(name), folder / "ours", seed=seed), expected)
        run.compare_answers(model, theirs)


def _loaded_by_peft(folder: Path) -> None:
    """What ``save_model`` and the last checkpoint hold is what PEFT and regraft load."""
    run = Run(arguments=SAVED)
    model, adapters = run.ours(run.start(folder))
    trainer = run.trained(adapters.for_trainer(), folder / "run")
    trainer.save_model(str(folder / "saved"))
    expected = answer(model.eval(), LLAMA)
    for saved in (folder / "saved", folder / "run" / "checkpoint-6"):
        theirs = peft.PeftModel.from_pretrained(run.model(folder), saved).eval()
        require_close(answer(theirs, LLAMA), expected, f"{saved.name}, loaded by PEFT")
        again = run.model(folder)
        regraft.attach(again, saved)
        require_close(answer(again.eval(), LLAMA), expected, f"{saved.name}, attached")


def _predicted(folder: Path) -> None:
    run = Run()
    theirs = run.theirs(run.start(folder))
    _, adapters = run.ours(folder / "start")
    data = data_of(LLAMA)[:5]
    expected = run.trained(theirs, folder / "theirs").predict(data)
    found = run.trained(adapters.for_trainer(), folder / "ours").predict(data)
    ours, pefts = (torch.from_numpy(each.predictions) for each in (found, expected))
    require_close(ours, pefts, "predictions", 1e-2)


WAYS: dict[str, Callable[[Path], None]] = {
    "resumed from a checkpoint": _resumed,
    "resumed after the process was killed": _killed,
    "a checkpoint of PEFT goes on in regraft": lambda f: _handed_over(f, to_peft=False),
    "a checkpoint of regraft goes on in PEFT": lambda f: _handed_over(f, to_peft=True),
    "one adapter trained, another one frozen": _one_of_two,
    "two adapters trained in turn": _two_in_turn,
    "what is saved, loaded by PEFT": _loaded_by_peft,
    "predictions": _predicted,
    "the plain model is refused": _plain,
}
"""Situations that are more than one run."""
