"""A model that serves two adapters, and PEFT's model that serves the same two."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import regraft
from practice.bases import BASES, Base, answer, inputs, made
from practice.outcome import TOLERANCE, moves, require, require_close

LLAMA = next(base for base in BASES if base.name == "llama")
Settings = dict[str, Any]


class World:
    """A model with two adapters attached, and PEFT's model with the same two."""

    def __init__(
        self, base: Base, folder: Path, loaded: Settings | None = None, **config: Any
    ) -> None:
        self.base, self.folder, self._loaded, self._config = base, folder, loaded, config
        self.plain = self.fresh()
        self.paths = {name: self._made(name, seed) for seed, name in enumerate(("one", "two"))}
        self.model = self.fresh()
        self.adapters = regraft.attach(self.model, self.paths["one"], "one")
        self.adapters.load_adapter(self.paths["two"], "two")
        theirs = peft.PeftModel.from_pretrained(self.fresh(), self.paths["one"], "one")
        theirs.load_adapter(self.paths["two"], "two")
        self.theirs = theirs.eval()
        moves(self.expected("two"), self.expected(None))
        moves(self.expected("two"), self.expected("one"))

    def fresh(self) -> Any:
        """Return the base anew, as it is loaded."""
        if self._loaded is None:
            return made(self.base)
        if not (self.folder / "stored").exists():
            made(self.base).save_pretrained(self.folder / "stored")
        auto = getattr(tf, self.base.auto)
        return auto.from_pretrained(self.folder / "stored", **self._loaded).eval()

    def _made(self, name: str, seed: int) -> Path:
        common: Settings = {"r": 4, "target_modules": list(self.base.linear)}
        common["init_lora_weights"] = False
        config = peft.LoraConfig(**{**common, **self._config})
        base = made(self.base)
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config)
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def expected(self, name: str | None) -> Any:
        """Return what PEFT's model answers with an adapter, or as the base."""
        if name is None:
            return answer(self.plain, self.base).detach()
        self.theirs.set_adapter(name)
        return answer(self.theirs, self.base).detach()

    def answer(self) -> Any:
        """Return what the model with regraft's adapters answers now."""
        return answer(self.model, self.base).detach()

    def agree(self, what: str, name: str | None = "one", tolerance: float = TOLERANCE) -> None:
        """Raise `WrongError` if the model answers now otherwise than PEFT's with an adapter."""
        require_close(self.answer(), self.expected(name), what, tolerance)

    def inner(self, name: str) -> Any:
        """Return the model inside PEFT's, with an adapter, for what takes no ``PeftModel``."""
        self.theirs.set_adapter(name)
        return self.theirs.base_model.model


def generated(model: Any, seed: int = 0, **settings: Any) -> Any:
    """Return ids that the model generates for two prompts of six tokens."""
    torch.manual_seed(seed)
    fixed: Settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given = {} if "inputs_embeds" in settings else {"input_ids": inputs(LLAMA)["input_ids"]}
    return model.generate(**{**given, **fixed, **settings})


def in_world(
    way: Callable[[World], None],
    base: Base = LLAMA,
    loaded: Settings | None = None,
    **config: Any,
) -> Callable[[], None]:
    """Return what tries a way of serving a base, which is loaded by some settings."""

    def attempt() -> None:
        with tempfile.TemporaryDirectory() as folder:
            way(World(base, Path(folder), loaded, **config))

    return attempt


def answers_by_row(world: World, first: str = "one") -> None:
    """Answer with an adapter in the first row and as the base in the second."""
    with world.adapters.rows([first, None]):
        found = world.answer()
    require_close(found[:1], world.expected(first)[:1], "first row")
    require_close(found[1:], world.expected(None)[1:], "second row")


def generates(settings: Settings, world: World) -> None:
    """Raise `WrongError` if the two models generate other tokens."""
    found = generated(world.model, **settings)
    require(torch.equal(found, generated(world.theirs, **settings)), "other tokens")
