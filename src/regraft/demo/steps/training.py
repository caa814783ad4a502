"""Train the demo's adapters: a few steps on a few short sentences, in a plain loop."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import regraft
from regraft.demo.progress import Progress
from regraft.demo.settings import Settings
from regraft.demo.state import DemoFolder, adapter_part
from regraft.demo.steps.answers import prompt_ids
from regraft.demo.steps.data import Example
from regraft.demo.steps.lessons import Lesson
from regraft.demo.steps.model import Base
from regraft.demo.telling.result import Training

_IGNORED = -100
"""The label that transformers leaves out of the loss."""


def get_adapter(
    folder: DemoFolder, base: Base, lesson: Lesson, progress: Progress, *, fresh: bool
) -> Training:
    """Train an adapter into ``folder.adapter(lesson.name)``, unless the same one is there."""
    part, data = adapter_part(lesson.name), [asdict(each) for each in lesson.training()]
    key = {"base": base.source, "settings": asdict(lesson.settings), "data": data}
    facts = None if fresh else folder.recall(part, key)
    if facts is not None:
        return Training(**facts | {"kept": True})
    with folder.building(part) as unfinished:
        training = _train(base.path, unfinished, lesson, progress)
    folder.note(part, key, asdict(training))
    return training


def _train(base: Path, out: Path, lesson: Lesson, progress: Progress) -> Training:
    start = time.perf_counter()
    settings, examples = lesson.settings, lesson.training()
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters = regraft.attach(model, _config(settings), lesson.name)
    batches = [
        batch_of(tokenizer, examples[i : i + settings.batch])
        for i in range(0, len(examples), settings.batch)
    ]
    trained = list(adapters.parameters())
    losses = optimize(model, trained, batches, settings, progress)
    regraft.save(model, out)
    return Training(
        steps=settings.steps,
        seconds=time.perf_counter() - start,
        first_loss=losses[0],
        last_loss=losses[-1],
        parameters=sum(weight.numel() for weight in trained),
        modules=len(trained) // 2,  # A and B
    )


def _config(settings: Settings) -> regraft.LoraConfig:
    return regraft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def batch_of(tokenizer: Any, examples: list[Example]) -> dict[str, Any]:
    """Return token ids, mask and labels, each (batch, length); only answers have labels."""
    prompts = [prompt_ids(tokenizer, example.sentence) for example in examples]
    answers = [_answer_ids(tokenizer, example) for example in examples]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, _IGNORED)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _answer_ids(tokenizer: Any, example: Example) -> list[int]:
    text = example.answer + tokenizer.eos_token
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def optimize(
    model: Any,
    weights: list[Any],
    batches: list[dict[str, Any]],
    settings: Settings,
    progress: Progress,
) -> list[float]:
    """Take one step per batch and return the losses."""
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.warmed_and_decayed)
    losses: list[float] = []
    model.train()
    with progress("   training", len(batches)) as bar:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.advance(f"loss {losses[-1]:.4f}")
    return losses
