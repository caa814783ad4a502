"""Adapters together on every base, and what else PEFT's tests ask of each of its models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch

import regraft
from practice.bases import BASES, Base, answer, inputs, made
from practice.outcome import TOLERANCE, Case, moves, require, require_close
from practice.toys import Settings, toy

Two = tuple[Settings, Settings]


class Pair:
    """Two adapters of PEFT in files, and a model of each side with both of them."""

    def __init__(self, base: Base, configs: Two, folder: Path) -> None:
        self.base, self.folder, self.plain = base, folder, made(base)
        self.configs = configs
        self.paths = [self._made(at, config) for at, config in enumerate(configs)]
        self.model = made(base)
        self.adapters = regraft.attach(self.model, self.paths[0], "one")
        self.adapters.load_adapter(self.paths[1], "two")
        theirs = peft.PeftModel.from_pretrained(made(base), self.paths[0], "one")
        theirs.load_adapter(self.paths[1], "two")
        self.theirs = theirs.eval()
        moves(self.expected("two"), answer(self.plain, base).detach())
        moves(self.expected("one"), self.expected("two"))

    def _made(self, seed: int, config: Settings) -> Path:
        common: Settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
        model = made(self.base)
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**{**common, **config}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        folder = self.folder / str(seed)
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def expected(self, *names: str) -> Any:
        """Return what PEFT's model answers with some adapters."""
        self.theirs.base_model.set_adapter(list(names) if len(names) > 1 else names[0])
        return answer(self.theirs, self.base).detach()

    def agree(self, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
        """Raise `WrongError` if the model answers otherwise now."""
        require_close(answer(self.model, self.base).detach(), expected, what, tolerance)


def _both(pair: Pair) -> None:
    """Answer with each, with both, and merged; then with one after the other is deleted."""
    for name in ("one", "two", "one"):
        pair.adapters.set_adapter(name)
        pair.agree(pair.expected(name), f"with {name}")
    expected = pair.expected("one", "two")
    pair.adapters.set_adapter(["one", "two"])
    pair.agree(expected, "with both")
    pair.adapters.merge_adapter(["one", "two"])
    pair.agree(expected, "both merged")
    pair.adapters.unmerge_adapter()
    pair.agree(expected, "taken back")
    pair.adapters.set_adapter("two")
    pair.adapters.delete_adapter("one")
    pair.agree(pair.expected("two"), "the other one deleted")


def _rows(pair: Pair) -> None:
    """Answer each row with an adapter of its own."""
    of_row = [None, "one", "two"]
    count = len(next(iter(inputs(pair.base).values())))
    names = [of_row[(row + 1) % 3] for row in range(count)]
    with pair.adapters.rows(names):
        found = answer(pair.model, pair.base).detach()
    answers: dict[str | None, Any] = {name: pair.expected(name) for name in ("one", "two")}
    answers[None] = answer(pair.plain, pair.base).detach()
    for row, name in enumerate(names):
        require_close(found[row], answers[name][row], f"row {row} with {name}")


def _cast(dtype: torch.dtype, tolerance: float) -> Callable[[Pair], None]:
    def way(pair: Pair) -> None:
        floats = inputs(pair.base)
        asked = {k: v.to(dtype) if v.is_floating_point() else v for k, v in floats.items()}
        pair.model.to(dtype)
        pair.theirs.to(dtype)
        for name in ("one", "two"):
            pair.adapters.set_adapter(name)
            pair.theirs.set_adapter(name)
            found, expected = (answer(m, pair.base, asked) for m in (pair.model, pair.theirs))
            require_close(found, expected, f"{name} in {dtype}", tolerance)

    return way


def _vectors(pair: Pair) -> None:
    """Give embeddings in place of token ids."""
    asked = inputs(pair.base)
    vectors = pair.plain.get_input_embeddings()(asked.pop("input_ids")).detach()
    asked["inputs_embeds"] = vectors
    pair.theirs.set_adapter("one")
    found, expected = (answer(m, pair.base, asked) for m in (pair.model, pair.theirs))
    require_close(found, expected, "embeddings given")


def _pickled(pair: Pair) -> None:
    """Attach an adapter that PEFT saved as ``.bin``, and merge it into files."""
    pair.theirs.set_adapter("two")
    pair.theirs.save_pretrained(
        pair.folder / "bin", safe_serialization=False, save_embedding_layers=False
    )
    model = made(pair.base)
    regraft.attach(model, pair.folder / "bin" / "two")
    require_close(answer(model, pair.base).detach(), pair.expected("two"), "saved as .bin")


def _checkpointed(reentrant: bool) -> Callable[[Pair], None]:
    def way(pair: Pair) -> None:
        model = made(pair.base)
        adapters = regraft.attach(model, pair.paths[0], "one", is_trainable=True)
        theirs = peft.PeftModel.from_pretrained(
            made(pair.base), pair.paths[0], "one", is_trainable=True
        )
        for each in (model, theirs):
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                each.enable_input_require_grads()
            torch.manual_seed(5)
            answer(each.train(), pair.base).square().mean().backward()
        tensors = adapters.adapter("one").tensors
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                found, expected = tensors[name.replace(".one.", ".")].grad, parameter.grad
                if found is None or expected is None:  # a layer of which nothing is used
                    require(found is expected, f"gradient of {name}: one has none")
                    continue
                require_close(found, expected, f"gradient of {name}")

    return way


WAYS: dict[str, Callable[[Pair], None]] = {
    "together": _both,
    "rows": _rows,
    "bfloat16": _cast(torch.bfloat16, 0.06),
    "float16": _cast(torch.float16, 0.01),
    "embeddings given": _vectors,
    "saved as .bin": _pickled,
    "checkpointed": _checkpointed(False),
    "checkpointed, reentrant": _checkpointed(True),
}
"""What is asked of each base."""

LIN0, CONV1D = {"target_modules": ["lin0"]}, {"target_modules": ["conv1d"]}
ROWS = {"trainable_token_indices": {"emb": [0, 1, 2]}}
OTHER_ROWS = {"trainable_token_indices": {"emb": [3, 4, 5, 6]}}
SAVED = {**LIN0, "modules_to_save": ["lin1"]}
EMBEDDED = {"target_modules": ["emb", "conv1d"]}

PARAMETER = {"target_parameters": ["lin0.weight"]}

TABLE: dict[tuple[str, str], Two] = {
    ("MLP", "the same layer"): (LIN0, LIN0),
    ("MLP", "other ranks"): (LIN0, {**LIN0, "r": 16}),
    ("MLP", "other layers"): (LIN0, {"target_modules": ["lin1"]}),
    ("MLP", "layers that overlap"): (LIN0, {"target_modules": ["lin0", "lin1"]}),
    ("MLP", "DoRA and LoRA"): ({**LIN0, "use_dora": True}, LIN0),
    ("MLP of parameters", "the same parameter"): (PARAMETER, PARAMETER),
    ("EmbConv1D", "embeddings"): (EMBEDDED, {**EMBEDDED, "r": 16}),
    ("Conv2d", "other ranks"): (
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d"], "r": 16},
    ),
    ("Conv3d", "other ranks"): (
        {"target_modules": ["conv3d"]},
        {"target_modules": ["conv3d"], "r": 16},
    ),
}
"""PEFT's tables of several active adapters, and of batches of several."""

ROWS_ALONE: dict[tuple[str, str], Two] = {
    ("EmbConv1D", "token rows"): ({**LIN0, **ROWS}, {**LIN0, **OTHER_ROWS}),
    ("EmbConv1D", "other layers, token rows"): ({**LIN0, **ROWS}, {**CONV1D, **OTHER_ROWS}),
    ("MLP", "heads saved"): (SAVED, SAVED),
    ("GRU", "recurrent layers saved"): (
        {**LIN0, "modules_to_save": ["gru"]},
        {**LIN0, "modules_to_save": ["gru"]},
    ),
    ("EmbConv1D", "heads saved"): (
        {**EMBEDDED, "modules_to_save": ["lin0"]},
        {**EMBEDDED, "modules_to_save": ["lin0"]},
    ),
}
"""Pairs of which PEFT runs one at a time."""


def cases() -> Iterator[Case]:
    """Yield every base with every way, and the toys."""
    for base in BASES:
        linear = list(base.linear)
        configs = ({"target_modules": linear}, {"target_modules": linear[:1], "r": 6})
        for name, way in WAYS.items():
            if _takes(base, name):
                yield Case(f"{base.name}, {name}", _attempt(base, configs, way))
    for (model, name), configs in TABLE.items():
        yield Case(f"PEFT's {model}, {name}, together", _attempt(toy(model), configs, _both))
    for (model, name), configs in (TABLE | ROWS_ALONE).items():
        yield Case(f"PEFT's {model}, {name}, rows", _attempt(toy(model), configs, _rows))


def _takes(base: Base, way: str) -> bool:
    """Whether a base can be asked in a way, with PEFT as well."""
    if way == "embeddings given":
        return base.asked == "ids"
    return not (way.startswith("checkpointed") and base.name == "resnet_classes")


def _attempt(base: Base, configs: Two, way: Callable[[Pair], None]) -> Callable[[], None]:
    def attempt() -> None:
        with tempfile.TemporaryDirectory() as folder:
            way(Pair(base, configs, Path(folder)))

    return attempt
