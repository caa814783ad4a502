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
from practice.bases import BASES, TOYS, Base, answer, inputs, made
from practice.outcome import Case, moves, require, require_close
from practice.toys import TABLE, Settings, toy


def _with_head(base: Base) -> Settings | None:
    return {"modules_to_save": [base.head]} if base.head else None


def _with_embedding(base: Base) -> Settings | None:
    return {"target_modules": [*base.linear, base.embedding]} if base.embedding else None


def _with_rows(base: Base) -> Settings | None:
    return {"trainable_token_indices": {base.embedding: [3, 5, 9]}} if base.embedding else None


def _one_layer(base: Base) -> Settings | None:
    return {"layers_to_transform": [1]} if base.auto else None


def _experts(base: Base, *parameters: str, **settings: Any) -> Settings | None:
    names = [base.experts.rpartition(".")[0] + each for each in parameters] or [base.experts]
    return {"target_parameters": names, **settings} if base.experts else None


def _experts_apart(base: Base) -> Settings | None:
    path = base.experts.rpartition(".")[0]
    names = [f"0.{path}.gate_up_proj", f"1.{path}.down_proj"]
    return {"target_modules": [], "target_parameters": names} if base.experts else None


def _rows_by_the_models_name(base: Base) -> Settings | None:
    return {"trainable_token_indices": [0, 3, 5]} if base.embedding and base.auto else None


def _of_transformers(base: Base, **settings: Any) -> Settings | None:
    return settings if base.auto else None


def _as_peft_chooses(base: Base) -> Settings | None:
    known = base.auto and not base.experts and "images" not in base.asked
    return {"target_modules": None, "r": 8, "lora_alpha": 32} if known else None


def _mica(base: Base) -> Settings | None:
    linear = base.auto and base.linear != ("convolution",)
    return {"init_lora_weights": "mica"} if linear else None


def _alora(base: Base) -> Settings | None:
    if base.name not in ("llama", "gpt2"):
        return None
    invoked = inputs(base)["input_ids"][0, 1:3].tolist()
    return {"alora_invocation_tokens": invoked, "task_type": "CAUSAL_LM"}


def _with_bias(base: Base, **settings: Any) -> Settings | None:
    biased = ("qwen2", "gpt2", "opt", "bloom", "gpt_neox", "bert_classes", "deberta_v2_features")
    return settings if base.name in biased else None


def _head_and_embedding(base: Base) -> Settings | None:
    both = base.head and base.embedding
    return {"modules_to_save": [base.head, base.embedding]} if both else None


def _tied(base: Base, **settings: Any) -> Settings | None:
    return {**settings, "ensure_weight_tying": True} if base.name == "llama_tied" else None


def _norms(base: Base) -> Settings | None:
    return {"modules_to_save": ["normalization"]} if base.name == "resnet_classes" else None


def _all_linear(base: Base) -> Settings | None:
    fails_in_peft = base.name == "llama4"  # its router returns two tensors
    of_text = base.auto == "AutoModelForCausalLM" and not fails_in_peft
    return {"target_modules": "all-linear"} if of_text else None


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
    "experts, both parameters": lambda b: _experts(b, ".down_proj", ".gate_up_proj"),
    "experts alone": lambda b: _experts(b, target_modules=[]),
    "experts, other ones in each layer": _experts_apart,
    "as PEFT chooses": _as_peft_chooses,
    "dropout": lambda _: {"lora_dropout": 0.05},
    "token rows by the model's name": _rows_by_the_models_name,
    "head and embedding saved": _head_and_embedding,
    "norms saved": _norms,
    "DoRA with rsLoRA": lambda b: _of_transformers(b, use_dora=True, use_rslora=True),
    "a bias of B": lambda b: _with_bias(b, lora_bias=True),
    "MiCA": _mica,
    "aLoRA": _alora,
    "embedding, tied": lambda b: _tied(b, target_modules=["q_proj", "embed_tokens"]),
    "embedding saved, tied": lambda b: _tied(b, modules_to_save=["embed_tokens"]),
    "token rows, tied": lambda b: _tied(b, trainable_token_indices=[3, 5]),
}
"""Configs by name: what each adds to a config of rank 4 on the base's linear layers, or None."""


def cases() -> Iterator[Case]:
    """Yield every pair of a base and a config that it can have."""
    for base in (*BASES, *TOYS):
        for name, settings in CONFIGS.items():
            found = settings(base)
            if found is not None:
                yield Case(f"{base.name}, {name}", _attempt(base, found))
    for (model, name), config in TABLE.items():
        common: Settings = {"r": 8, "lora_alpha": 16}
        yield Case(f"PEFT's {model}, {name}", _attempt(toy(model), {**common, **config}))


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
        moves(self.expected, answer(self.plain, base).detach())

    def hold(self) -> None:
        """Raise `WrongError` at the first verb that does not do what PEFT does."""
        self.attached()
        self.trained()
        self.merged_in_memory()
        if self.base.auto:
            self.merged_on_files()

    def attached(self) -> None:
        """Answer live, as the base where that is asked, and save for PEFT."""
        model = copy.deepcopy(self.plain)
        adapters = regraft.attach(model, self.folder / "adapter", "one")
        with adapters.disable_adapter():
            found = answer(model, self.base)
            require_close(found, answer(self.plain, self.base), "disabled", 0.0)
        require_close(answer(model, self.base), self.expected, "attached")
        regraft.save(model, self.folder / "saved")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(self.plain), self.folder / "saved")
        require_close(answer(again.eval(), self.base), self.expected, "saved, loaded by PEFT")

    def merged_in_memory(self) -> None:
        """Merge in memory, and take it back to the bit."""
        model = copy.deepcopy(self.plain)
        adapters = regraft.attach(model, self.folder / "adapter", "one")
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
