"""Train the demo's adapter with PEFT: a few steps on a few short sentences."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from regraft.demo.answers import prompt_ids
from regraft.demo.data import TRAIN_WORDS, Example, make_examples
from regraft.demo.model import Base
from regraft.demo.progress import Progress
from regraft.demo.settings import Settings
from regraft.demo.state import DemoFolder

_IGNORED = -100
"""The label that transformers leaves out of the loss."""


@dataclass(frozen=True)
class Training:
    """What training came to.

    Attributes:
        steps: optimizer steps.
        seconds: time it took, when it was done.
        first_loss: loss of the first step's sentences, before any update.
        last_loss: loss of the last step's sentences.
        parameters: trained parameters.
        modules: linear layers that were adapted.
        kept: whether an earlier run of the demo trained it.
    """

    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    parameters: int
    modules: int
    kept: bool = False


def get_adapter(
    folder: DemoFolder, base: Base, settings: Settings, progress: Progress, *, fresh: bool
) -> Training:
    """Train the adapter into ``folder.adapter``, unless the same one is there."""
    examples = make_examples(TRAIN_WORDS, settings.steps * settings.batch, settings.seed)
    key = {"base": base.source, "settings": asdict(settings), "data": [asdict(e) for e in examples]}
    facts = None if fresh else folder.recall("adapter", key)
    if facts is not None:
        return Training(**facts | {"kept": True})
    with folder.building("adapter") as unfinished:
        training = _train(base.path, unfinished, examples, settings, progress)
    folder.note("adapter", key, asdict(training))
    return training


def _train(
    base: Path, out: Path, examples: list[Example], settings: Settings, progress: Progress
) -> Training:
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = _adapted(base, settings)
    batches = [
        _batch(tokenizer, examples[i : i + settings.batch])
        for i in range(0, len(examples), settings.batch)
    ]
    losses = _optimize(model, batches, settings, progress)
    model.save_pretrained(out)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return Training(
        steps=settings.steps,
        seconds=time.perf_counter() - start,
        first_loss=losses[0],
        last_loss=losses[-1],
        parameters=sum(weight.numel() for weight in trained),
        modules=len(trained) // 2,  # A and B
    )


def _adapted(base: Path, settings: Settings) -> Any:
    """Return the base at float32, with an untrained adapter on every linear layer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _batch(tokenizer: Any, examples: list[Example]) -> dict[str, Any]:
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


def _optimize(
    model: Any, batches: list[dict[str, Any]], settings: Settings, progress: Progress
) -> list[float]:
    """Take one step per batch and return the losses."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
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
