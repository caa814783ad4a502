"""Bases and configs in pairs, after the tables of PEFT's own tests."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import regraft
from practice.bases import BASES, TOYS, Base, answer, made
from practice.outcome import Case, require, require_close

Settings = dict[str, Any]


def _with_head(base: Base) -> Settings | None:
    return {"modules_to_save": [base.head]} if base.head else None


def _with_embedding(base: Base) -> Settings | None:
    return {"target_modules": [*base.linear, base.embedding]} if base.embedding else None


def _with_rows(base: Base) -> Settings | None:
    return {"trainable_token_indices": {base.embedding: [3, 5, 9]}} if base.embedding else None


def _one_layer(base: Base) -> Settings | None:
    return {"layers_to_transform": [1]} if base.auto else None


def _experts(base: Base) -> Settings | None:
    return {"target_parameters": [base.experts]} if base.experts else None


def _all_linear(base: Base) -> Settings | None:
    return {"target_modules": "all-linear"} if base.auto == "AutoModelForCausalLM" else None


CONFIGS: dict[str, Callable[[Base], Settings | None]] = {
    "plain": lambda _: {},
    "alpha 16, rank 6": lambda _: {"r": 6, "lora_alpha": 16},
    "rslora": lambda _: {"use_rslora": True, "r": 4},
    "dora": lambda b: None if b.name == "attention" else {"use_dora": True},
    "patterns": lambda b: {"rank_pattern": {b.linear[0]: 2}, "alpha_pattern": {b.linear[0]: 3}},
    "expression": lambda b: {"target_modules": rf"(.*\.)?{b.linear[0]}"},
    "bias lora_only": lambda _: {"bias": "lora_only"},
    "bias all": lambda _: {"bias": "all"},
    "all linear": _all_linear,
    "head saved": _with_head,
    "embedding": _with_embedding,
    "token rows": _with_rows,
    "one layer": _one_layer,
    "experts": _experts,
}
"""Configs by name: what each adds to a config of rank 4 on the base's linear layers, or None."""


def cases() -> Iterator[Case]:
    """Yield every pair of a base and a config that it can have."""
    for base in (*BASES, *TOYS):
        for name, settings in CONFIGS.items():
            found = settings(base)
            if found is not None:
                yield Case(f"{base.name}, {name}", _attempt(base, found))


def _attempt(base: Base, settings: Settings) -> Callable[[], None]:
    def attempt() -> None:
        with tempfile.TemporaryDirectory() as folder:
            _Pair(base, settings, Path(folder)).hold()

    return attempt


class _Pair:
    """One adapter that PEFT made, and everything regraft does with it."""

    def __init__(self, base: Base, settings: Settings, folder: Path) -> None:
        self.base, self.folder, self.plain = base, folder, made(base)
        common: Settings = {"r": 4, "lora_alpha": 8, "target_modules": list(base.linear)}
        config = peft.LoraConfig(**{**common, **settings})
        self.live = peft.get_peft_model(copy.deepcopy(self.plain), config).eval()
        _randomize(self.live)
        self.live.save_pretrained(folder / "adapter", save_embedding_layers=False)
        self.expected = answer(self.live, base).detach()

    def hold(self) -> None:
        """Raise `WrongError` at the first verb that does not do what PEFT does."""
        self.attached()
        self.trained()
        if self.base.auto:
            self.merged_on_files()

    def attached(self) -> None:
        """Answer live, save for PEFT, merge in memory and take it back."""
        model = copy.deepcopy(self.plain)
        adapters = regraft.attach(model, self.folder / "adapter", "one")
        require_close(answer(model, self.base), self.expected, "attached")
        regraft.save(model, self.folder / "saved")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(self.plain), self.folder / "saved")
        require_close(answer(again.eval(), self.base), self.expected, "saved, loaded by PEFT")
        adapters.merge_adapter("one")
        require_close(answer(model, self.base), self.expected, "merged in memory")
        adapters.unmerge_adapter()
        adapters.detach()
        same = all(
            torch.equal(a, b)
            for a, b in zip(
                model.state_dict().values(), self.plain.state_dict().values(), strict=True
            )
        )
        require(same, "unmerged: not every bit of the base is back")

    def trained(self) -> None:
        """Make one step of gradient descent, and answer as PEFT's model after its step."""
        model = copy.deepcopy(self.plain)
        adapters = regraft.attach(model, self.folder / "adapter", "one", is_trainable=True)
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(self.plain), self.folder / "adapter", is_trainable=True
        )
        for step_of, parameters in (
            (model, list(adapters.parameters())),
            (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        ):
            step_of.eval()
            answer(step_of, self.base).square().mean().backward()
            torch.optim.SGD(parameters, lr=0.1).step()
        require_close(answer(model, self.base), answer(theirs, self.base), "one step of training")

    def merged_on_files(self) -> None:
        """Merge on files, load the result with transformers."""
        self.plain.save_pretrained(self.folder / "base")
        regraft.merge(self.folder / "base", self.folder / "adapter", self.folder / "merged")
        loaded = getattr(tf, self.base.auto).from_pretrained(self.folder / "merged").eval()
        require_close(answer(loaded, self.base), self.expected, "merged on files")


def _randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "mha.base_layer.out_proj" in name:
                parameter.zero_()  # PEFT adds this delta twice; regraft warns, and adds it once
            elif "magnitude" in name:
                parameter.mul_(1.1)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
