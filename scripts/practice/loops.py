"""Training loops that are written by hand, each beside the same loop on PEFT's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch

from practice.outcome import require_close
from practice.runs import LLAMA, Run, data_of

Step = Callable[[Any, Any, Any], Any]
"""Makes one step of a model, an optimizer and a batch; returns the loss."""


def _batches() -> list[dict[str, Any]]:
    rows = data_of(LLAMA)
    return [
        {key: torch.stack([row[key] for row in rows[at : at + 3]]) for key in rows[0]}
        for at in range(0, len(rows), 3)
    ]


def _plain_step(model: Any, optimizer: Any, batch: Any) -> Any:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _losses(model: Any, parameters: list[Any], step: Step) -> Any:
    torch.manual_seed(11)
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    return torch.stack([step(model, optimizer, batch) for batch in _batches()])


def _loop(
    run: Run,
    step: Step,
    folder: Path,
    wrapped: Callable[[Any], Any] = lambda model: model,
    *,
    twin: bool = False,
) -> None:
    theirs = run.theirs(run.start(folder)).train()
    model, adapters = run.ours(folder / "start")
    trained = [each for each in theirs.parameters() if each.requires_grad]
    expected = _losses(wrapped(theirs), trained, step)
    trained_model = adapters.for_trainer() if twin else model
    found = _losses(wrapped(trained_model.train()), list(adapters.parameters()), step)
    require_close(found, expected, "losses", run.tolerance)
    run.compare_answers(model, theirs)


def _by_hand(folder: Path) -> None:
    _loop(Run(), _plain_step, folder)


def _switched(folder: Path) -> None:
    """Evaluate between the steps, with dropout in training and none in evaluation."""

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss = _plain_step(model, optimizer, batch)
        with torch.inference_mode():
            evaluated = model.eval()(**batch).loss
        model.train()
        return torch.stack([loss, evaluated])

    _loop(Run(config={"lora_dropout": 0.3}), step, folder)


def _half(folder: Path) -> None:
    """Train in float16 autocast with a scaler of gradients."""
    scalers: dict[int, Any] = {}

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        scaler = scalers.setdefault(id(optimizer), torch.amp.GradScaler("cpu", init_scale=64.0))
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach().float()

    _loop(Run(tolerance=0.02), step, folder)


def _compiled(folder: Path) -> None:
    _loop(Run(), _plain_step, folder, lambda m: torch.compile(m, backend="aot_eager"))


def _accelerated(folder: Path) -> None:
    """Train with accelerate, which accumulates gradients."""
    accelerators: dict[int, Any] = {}

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        if id(optimizer) not in accelerators:
            new = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
            accelerators[id(optimizer)] = (new, *new.prepare(model, optimizer), optimizer)
        accelerator, model, optimizer, _ = accelerators[id(optimizer)]
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    _loop(Run(), step, folder, twin=True)


def _two_losses(folder: Path) -> None:
    """Run the model twice for one step, once as the base, as preference losses do."""

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        with torch.no_grad(), _bases[id(model)].disable_adapter():
            reference = model(**batch).logits
        loss = (model(**batch).logits - reference - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    run = Run(config={"init_lora_weights": False})
    theirs = run.theirs(run.start(folder)).train()
    model, adapters = run.ours(folder / "start")
    _bases.update({id(theirs): theirs, id(model): adapters})
    trained = [each for each in theirs.parameters() if each.requires_grad]
    expected = _losses(theirs, trained, step)
    require_close(_losses(model.train(), list(adapters.parameters()), step), expected, "losses")
    _bases.clear()


_bases: dict[int, Any] = {}
"""Who switches a model's adapters off, by the model's id."""

LOOPS: dict[str, Callable[[Path], None]] = {
    "a loop by hand": _by_hand,
    "a loop with dropout, evaluated in between": _switched,
    "a loop in float16 with scaled gradients": _half,
    "a loop of a compiled model": _compiled,
    "a loop of accelerate": _accelerated,
    "a loop with the base as its reference": _two_losses,
}
